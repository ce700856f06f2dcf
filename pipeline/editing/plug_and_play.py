"""Plug-and-Play (Tumanyan et al., arXiv 2211.12572): the layout of the source, the appearance of the target prompt.

In the first steps the target's rows take over two things from a row that shows the source at the same noise level: the
features of one residual block of the decoder, and the queries and keys of the decoder's self-attention. The source row
has the empty prompt whatever the inversion's was, and its prediction is not used.

Cost: per step one row of the source, as long as something is injected, and two of the target (one at guidance 1).
After `ddim` also one row for each step but the last of those, which resample the source; after `direct` none. Masks:
the user's, else none. Memory: nothing is stored, features and attention are recomputed beside the target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline import compat
from pipeline.editing.base import EditingMethod
from pipeline.editing.observing import observer
from pipeline.editing.problems import Problem, target_problems
from pipeline.editing.two_branch import BranchEdit, Branches, BranchRows, two_branch
from pipeline.editing.walk import take_step
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import EncodeText, Steps
from pipeline.engine.controls import Control, Layers, Part, Plan, Residuals, Route, TakeFeatures
from pipeline.engine.prompts import GuidedPrompt
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, Trajectory

# The block whose features are injected, up_blocks.1.resnets.1 of Stable Diffusion 1.x, told so that a UNet of another
# depth has it, too.
FEATURES = Residuals(factor=4, index_in_block=1)
DECODER = Layers(place="up", min_index_in_place=1)  # whose queries and keys are injected: all but its first layer
PLAN = Plan(routes=True, takes=(FEATURES,))


class PlugAndPlay(EditingMethod):
    """Sample under the target prompt with the source's features and self-attention."""

    needs: ClassVar = frozenset({"DDIM steps", "path"})
    takes: ClassVar = frozenset({"source branch"})
    paper: ClassVar = "Plug-and-Play Diffusion Features for Text-Driven Image-to-Image Translation, arXiv 2211.12572"

    method: Literal["plug_and_play"] = "plug_and_play"
    """Plug-and-Play: the source's features and self-attention under the target prompt."""
    guidance_scale: float = Field(default=7.5, allow_inf_nan=False)
    """Classifier-free guidance of the target prompt against the negative one; 1: none."""
    feature_steps: float = Field(default=0.8, ge=0, le=1)
    """Share of the schedule's steps, from its noisy end on, that take the source's features; more keeps more of the
    layout, 0: none."""
    attention_steps: float = Field(default=0.5, ge=0, le=1)
    """Share of the schedule's steps, from its noisy end on, that take the source's self-attention; more keeps more of
    the layout, 0: none."""
    negative_prompt: str = "ugly, blurry, black, low res, unrealistic"
    """For edits that bring none of their own."""
    compat_shift: bool = False
    """Source latents one step less noisy than the row's timestep, and the target's start, too: what the published
    comparison of `ddim` with `direct` does. For parity only."""

    @property
    @override
    def guides(self) -> bool:
        return self.guidance_scale != 1.0

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        if not any(map(FEATURES.picks, offers.openings.residuals)):
            yield (
                "plug_and_play takes features of a decoder block at a quarter of the latents' side, and this model has "
                "none there. Use editing.method prompt_to_prompt or ledits_pp"
            )

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        yield from target_problems(self.method, request)

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        if self.compat_shift and inversion.method != "ddim":
            yield (
                "compat_shift shifts the source that is resampled after inversion.method 'ddim'; after "
                f"'{inversion.method}' there is none. Leave it out"
            )

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        empty, target, negative = yield EncodeText(
            ("", request.target_prompt, request.negative_prompt or self.negative_prompt)
        )
        num_steps = trajectory.num_steps
        branches = Branches(
            source=empty, source_uncond=(empty,) * num_steps, target=target, target_uncond=(negative,) * num_steps
        )
        edit = PlugAndPlayEdit(self, trajectory)
        if not trajectory.pinned:
            read = num_steps if user_mask is not None or observer() else edit.last_step
            trajectory = yield from resampled(trajectory, read, shift=self.compat_shift)
        return (yield from two_branch(trajectory, branches, edit, user_mask))


def resampled(trajectory: Trajectory, read: int, *, shift: bool) -> Steps[Trajectory]:
    """The trajectory as unguided sampling of its source prompt walks it, pinned.

    An inverted latent is not what sampling returns to; the published method reads the source from a walk down.

    Args:
        trajectory: where the walk starts.
        read: the last of the N + 1 levels that will be read; below it the inversion's latents stay.
        shift: give each level the latents of the next less noisy one.
    """
    num_steps = trajectory.num_steps
    prompt = yield from GuidedPrompt.encode(trajectory.source_prompt, guidance_scale=1.0)
    latents = [trajectory.latents[0]]
    for step in range(min(read + shift, num_steps)):
        prediction = yield from prompt.predict(latents[-1], trajectory.levels[step])
        latents.append(take_step(trajectory, step, latents[-1], prediction, None)[0])
    walked = torch.cat([torch.stack(latents), trajectory.latents[len(latents) :]])
    if shift:
        walked = compat.one_step_less_noisy(walked)
    return dataclasses.replace(trajectory, latents=walked, pinned=True)


class PlugAndPlayEdit(BranchEdit):
    """One edit of one image."""

    def __init__(self, settings: PlugAndPlay, trajectory: Trajectory) -> None:
        super().__init__(trajectory, settings.guidance_scale)
        # Shares of the whole schedule, counted from the first step that is walked, as Prompt-to-Prompt's windows are.
        self.feature_steps = int(trajectory.total_steps * settings.feature_steps)
        self.attention_steps = int(trajectory.total_steps * settings.attention_steps)

    @property
    def last_step(self) -> int:
        """The last step at which something is injected; 0 also where nothing ever is."""
        return max(min(max(self.feature_steps, self.attention_steps), self.trajectory.num_steps) - 1, 0)

    @override
    def reads_attention(self, step: int) -> bool:
        return step < self.feature_steps or step < self.attention_steps

    @override
    def control(self, step: int, rows: BranchRows) -> Control | None:
        assert rows.source is not None  # it reads the source at this step
        return injection(
            rows.source,
            rows.count,
            features=step < self.feature_steps,
            attention=step < self.attention_steps,
        )


def injection(source: int, rows: int, *, features: bool, attention: bool) -> Control:
    """All of a call's rows take over what one of them has.

    Args:
        source: the row that is taken from.
        rows: how many there are.
        features: take the hidden state of `FEATURES`.
        attention: take queries and keys of `DECODER`.
    """
    parts: list[Part] = []
    for row in range(rows):
        if row != source and features:
            parts.append(TakeFeatures(row, source, FEATURES))
        if row != source and attention:
            parts.append(Route(row=row, query=source, key=source, layers=DECODER))
    return Control(tuple(parts), PLAN)
