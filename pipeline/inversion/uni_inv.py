"""Uni-Inv (Jiao et al., arXiv 2504.13109, algorithm 1): an inversion that looks ahead to where it will predict.

Each step up is taken along a prediction at the level that it leads to, at latents which the step before has carried
there for a look: nearer to what a sampler will meet on its way down than DDIM inversion, which predicts at the latents
below.

Cost: one network row per step and one for the first look, none of it guided; steps depend on each other.
Reconstruction: approximate. Memory: N + 1 latents per image. Deterministic.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Level, Prediction
from pipeline.diffusion.steps import DDIM, along
from pipeline.engine.calls import Denoise, Denoised, EncodeText, Steps
from pipeline.inversion.base import SkippingInversion
from pipeline.records import Source, Trajectory


class UniInv(SkippingInversion):
    """Walk upwards along predictions at looked-ahead latents."""

    provides: ClassVar = frozenset({"DDIM steps", "path"})
    exact: ClassVar = "approximate, closer than ddim"
    paper: ClassVar = "UniEdit-Flow: Unleashing Inversion and Editing in the Era of Flow Models, arXiv 2504.13109"

    method: Literal["uni_inv"] = "uni_inv"
    """Uni-Inv: DDIM or Euler inversion that predicts at latents which it has looked ahead to."""
    num_steps: int = Field(default=9, ge=1, le=1000)
    """N: steps up, and down again."""
    skip_steps: int = Field(default=6, ge=0)
    """Steps of the schedule left out at its noisy end: the schedule has num_steps + skip_steps. The paper's share alpha
    of 0.6 of 15 steps is num_steps 9 with skip_steps 6; 0.6 to 0.8 is usual."""
    first_look: bool = True
    """Whether the first step is looked ahead for, with a row of its own. False: it is taken along a prediction at the
    image, one row less."""
    clean_end: Literal["alike", "authors"] = "alike"
    """Where the image stands. alike: at the level where a sampler ends; authors: at no noise at all, while a sampler
    ends at the checkpoint's last level, for parity with the authors' code on Stable Diffusion XL only. On flow-matching
    models both are the same."""

    @override
    def invert(self, source: Source) -> Steps[Trajectory]:
        whole = source.schedule.steps(self.schedule_steps, source.size)
        steps = whole[self.skip_steps :]
        (prompt,) = yield EncodeText((source.prompt,))

        def predict(latents: Tensor, level: Level) -> Steps[Prediction]:
            denoised: Denoised = yield Denoise(latents[None], [level], [prompt])
            return denoised.predictions[0]

        upwards = [(step.end, step.start) for step in reversed(steps)]
        bottom, first = upwards[0]
        ahead = first
        if self.clean_end == "authors" and bottom.noise > 0:
            # The published code looks less far than it steps: to the checkpoint's last level.
            bottom, ahead = Level(1.0, 0.0, 0.0), bottom
        upwards[0] = (bottom, first)
        latents, looked = [source.latents], source.latents
        if self.first_look:
            told = bottom._replace(timestep=max(bottom.timestep, 0.0))  # below its first timestep nothing is told
            looked = along(looked, (yield from predict(looked, told)), bottom, ahead)
        for number, (start, end) in enumerate(upwards):
            prediction = yield from predict(looked, end)
            latents.append(along(latents[-1], prediction, start, end))
            if number + 1 < len(upwards):
                looked = along(latents[-1], prediction, *upwards[number + 1])
        return Trajectory(
            method=self.method,
            source=source,
            solver=DDIM(steps=steps),
            latents=torch.stack(latents[::-1]),
            skipped_steps=self.skip_steps,
            level_above=whole[self.skip_steps - 1].start if self.skip_steps else None,
        )
