"""One image inverted, looked at and, where a gate asks for it, replayed; and what later attempts take over of it.

Attempts that invert with the same settings from the same noise, or without any, have the same trajectory to the last
bit: it is kept until the attempts at its image are made. What does not fit into memory is inverted anew.

Memory: at most `MOST_BYTES` for each unit at work, where several attempts read one inversion.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.engine.calls import Conditioning, Steps
from pipeline.errors import InvertError
from pipeline.gating.replay import Replayed, replay
from pipeline.inversion.base import Inversion
from pipeline.recipe import Recipe
from pipeline.records import InversionPrompts, Prepared, Source, Trajectory
from pipeline.seeds import run_seed_of

MOST_BYTES = 512 * 2**20
"""Of the trajectories that a unit keeps: 80 images of 512 x 512 in 30 steps of `ddpm`."""


class Inverted(NamedTuple):
    """A trajectory, and its picture where one was asked for."""

    trajectory: Trajectory
    replayed: Replayed | None


Key = tuple[int, Inversion, InversionPrompts, int | None]
"""A sample's index, how it is inverted, under what, and the seed of the run; None where no noise was drawn."""


class KeptInversions:
    """A unit's inversions that several attempts read. None is kept of recipes whose attempts share none."""

    def __init__(self, recipe: Recipe) -> None:
        attempts = range(1 if recipe.best_of is None else recipe.best_of.attempts)
        self._seeds = {attempt: run_seed_of(recipe.run.seed, recipe.best_of, attempt) for attempt in attempts}
        by_attempt = {
            attempt: {method.inversion for method in recipe.methods_of(attempt).values()} for attempt in attempts
        }
        self._readers = Counter(one for some in by_attempt.values() for one in some)
        self._readers_of_seed = Counter(
            (one, self._seeds[attempt]) for attempt, some in by_attempt.items() for one in some
        )
        self._kept: dict[Key, Inverted] = {}
        self._bytes = 0

    def get(self, prepared: Prepared, inversion: Inversion, source: Source) -> Inverted | None:
        """What an earlier attempt found, as this one would; its noise from here on is the attempt's own."""
        seeded, unseeded = self._keys(prepared, inversion, source)
        found = self._kept.get(seeded) or self._kept.get(unseeded)
        return (
            None if found is None else found._replace(trajectory=dataclasses.replace(found.trajectory, source=source))
        )

    def keep(self, prepared: Prepared, inversion: Inversion, source: Source, found: Inverted, *, drew: bool) -> None:
        """Remember an inversion, where another attempt reads it and it fits.

        Args:
            prepared: the image.
            inversion: its settings.
            source: what it was given.
            found: what it returned.
            drew: it drew noise.
        """
        seeded, unseeded = self._keys(prepared, inversion, source)
        readers = self._readers_of_seed[inversion, self._seeds[prepared.attempt]] if drew else self._readers[inversion]
        size = bytes_of(found.trajectory)
        if readers < 2 or "levels alone" in inversion.provides or self._bytes + size > MOST_BYTES:
            return
        self._kept[seeded if drew else unseeded] = found
        self._bytes += size

    def let_go_of_all_but(self, indexes: Iterable[int]) -> None:
        """No more attempts are made at other samples than these."""
        left = frozenset(indexes)
        self._kept = {key: found for key, found in self._kept.items() if key[0] in left}
        self._bytes = sum(bytes_of(found.trajectory) for found in self._kept.values())

    def _keys(self, prepared: Prepared, inversion: Inversion, source: Source) -> tuple[Key, Key]:
        prompts, index = InversionPrompts(source.prompt, source.negative_prompt), prepared.sample.index
        return (index, inversion, prompts, self._seeds[prepared.attempt]), (index, inversion, prompts, None)


def inverted(
    inversion: Inversion, source: Source, prepared: Prepared, kept: KeptInversions | None, *, replays: bool
) -> Steps[Inverted]:
    """The trajectory of one image.

    Args:
        inversion: how.
        source: what it is given.
        prepared: the image.
        kept: of its unit; None: nothing is.
        replays: its own picture is wanted, too.

    Raises:
        InvertError: its values are not finite, or those of its replay.
    """
    if kept is not None and (found := kept.get(prepared, inversion, source)) is not None:
        return found
    drawn = 0

    def draw() -> Tensor:
        nonlocal drawn
        drawn += 1
        return source.draw_noise()

    trajectory: Trajectory = yield from inversion.invert(dataclasses.replace(source, draw_noise=draw))
    if not bool(torch.isfinite(trajectory.latents).all()):
        raise InvertError("the inversion gave values that are not finite. Try model.dtype float32 or other settings")
    replayed = None
    if replays:
        replayed = yield from replay(trajectory, prepared)
    found = Inverted(trajectory, replayed)
    if kept is not None:
        kept.keep(prepared, inversion, source, found, drew=drawn > 0)
    return found


def bytes_of(trajectory: Trajectory) -> int:
    """Of its tensors, and of the embeddings that it brings."""
    values = [getattr(trajectory, field.name) for field in dataclasses.fields(trajectory)]
    brought: tuple[Conditioning, ...] = trajectory.uncond or ()
    return sum(one.nbytes for one in values if isinstance(one, Tensor)) + sum(one.num_bytes for one in brought)
