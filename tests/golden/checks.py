"""What the replays of golden tensors share: comparisons, and one edit with its history."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor

from pipeline.diffusion.levels import Prediction
from pipeline.editing.base import EditingMethod
from pipeline.editing.observing import StepRecord, observed_by
from pipeline.engine.calls import Steps
from pipeline.engine.engine import Engine
from pipeline.inversion.null_text import Objective
from pipeline.records import EditedLatents, EditRequest, Source, Trajectory


@dataclass(frozen=True)
class Check:
    """One compared quantity."""

    name: str
    deviation: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.deviation <= self.tolerance


def relative(ours: Tensor, golden: Tensor) -> float:
    """Largest difference over the largest golden value."""
    assert ours.shape == golden.shape, f"ours {tuple(ours.shape)}, golden {tuple(golden.shape)}"
    return float((ours.double() - golden.double()).abs().max() / golden.double().abs().max())


def relative_l2(ours: Tensor, golden: Tensor) -> float:
    """Root mean square of the difference over that of the golden values."""
    assert ours.shape == golden.shape, f"ours {tuple(ours.shape)}, golden {tuple(golden.shape)}"
    return float((ours.double() - golden.double()).norm() / golden.double().norm())


def equal(name: str, ours: Any, golden: Tensor) -> Check:
    """Integers that must agree exactly."""
    return Check(name, 0.0 if list(ours) == golden.tolist() else 1.0, 0.0)


def source_of(engine: Engine, latents: Tensor, prompt: str, noises: Tensor | None = None) -> Source:
    """One image's encoded latents, and its noise from the recording instead of a generator."""
    draws = iter(() if noises is None else noises)
    return Source(
        latents=latents,
        prompt=prompt,
        schedule=engine.backbone.schedule,
        draw_noise=lambda: next(draws),
        editing_noise=lambda: lambda: next(draws),
    )


def edit(
    engine: Engine, editor: EditingMethod, trajectory: Trajectory, request: EditRequest, **options: Any
) -> ObservedLatents:
    """One edit of one image, with what every step did."""
    return engine.run_one(observed(editor.edit(trajectory, request, **options)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedLatents(EditedLatents):
    """What an editor returned, and what it told of its steps."""

    steps: tuple[StepRecord, ...]

    @property
    def history(self) -> tuple[StepRecord, ...]:
        """At least one step: a loop over none would compare nothing."""
        assert self.steps, "no step was taken"
        return self.steps


def observed(editing: Steps[EditedLatents]) -> Steps[ObservedLatents]:
    """An edit that is looked on at, it alone, whatever the engine runs beside it."""
    steps: list[StepRecord] = []
    reply, error = None, None
    while True:
        with observed_by(steps.append):
            try:
                call = editing.send(reply) if error is None else editing.throw(error)
            except StopIteration as stop:
                edited: EditedLatents = stop.value
                return ObservedLatents(latents=edited.latents, masks=edited.masks, steps=tuple(steps))
        reply, error = None, None
        try:
            reply = yield call
        except Exception as raised:
            error = raised


@contextmanager
def losses_kept() -> Iterator[list[float]]:
    """Every loss that null-text optimisation evaluates, in order."""
    kept: list[float] = []
    evaluate = Objective.loss

    def loss(objective: Objective, uncond_pred: Prediction) -> float:
        kept.append(evaluate(objective, uncond_pred))
        return kept[-1]

    with patch.object(Objective, "loss", loss):
        yield kept
