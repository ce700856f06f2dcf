"""The forward process as a start: pure noise at step 0 (text to image), the noised image below it (SDEdit).

SDEdit: Meng et al., arXiv 2108.01073. Cost: no network row. Reconstruction: none. Memory: N + 1 latents per image.
Stochastic: one seed per image.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import override

from pipeline.diffusion.steps import DDIM
from pipeline.engine.calls import Steps
from pipeline.inversion.base import Inversion
from pipeline.records import Source, Trajectory


class NoiseStart(Inversion):
    """No inversion at all: the same noise over the image at every level, and nothing but noise at the first."""

    provides: ClassVar = frozenset({"DDIM steps", "levels alone"})
    exact: ClassVar = "none"
    paper: ClassVar = "SDEdit, arXiv 2108.01073"

    method: Literal["noise"] = "noise"
    """No inversion: noise over the image, as SDEdit has it, or noise alone at the first step."""
    num_steps: int = Field(default=50, ge=1, le=1000)
    """N: steps of the sampler."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Share of DDPM's fresh noise while sampling; 0: none, 1: as DDPM."""

    @override
    def invert(self, source: Source) -> Steps[Trajectory]:
        """The start is drawn first, then one noise map per step where eta is above 0."""
        steps = source.schedule.steps(self.num_steps, source.size)
        noise = source.draw_noise()
        noised = [step.start.noised(source.latents, noise) for step in steps[1:]]
        noise_maps = [source.draw_noise() for _ in steps] if self.eta > 0 else None
        return Trajectory(
            method=self.method,
            source=source,
            solver=DDIM(steps=steps, eta=self.eta),
            latents=torch.stack([noise, *noised, source.latents]),
            noise_maps=None if noise_maps is None else torch.stack(noise_maps),
        )
        yield  # a generator, like every inversion, although it asks nothing of the model
