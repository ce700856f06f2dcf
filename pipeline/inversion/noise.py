"""The forward process as a start: pure noise at step 0 (text to image), the noised image below it (SDEdit).

SDEdit: Meng et al., arXiv 2108.01073. Cost: no UNet row. Reconstruction: none. Memory: N + 1 latents per image.
Stochastic: one seed per image.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from pipeline.diffusion.steps import DDIM
from pipeline.engine.calls import Steps
from pipeline.inversion.base import Inversion
from pipeline.records import Source, Trajectory


class NoiseStart(Inversion):
    """No inversion at all: the same noise over the image at every level, and nothing but noise at the first."""

    exact: ClassVar = "none"
    paper: ClassVar = "SDEdit, arXiv 2108.01073"

    method: Literal["noise"] = "noise"
    """No inversion: noise over the image, as SDEdit has it, or noise alone at the first step."""
    num_steps: int = Field(default=50, ge=1, le=1000)
    """N: steps of the sampler."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Share of DDPM's fresh noise while sampling; 0: none, 1: as DDPM."""

    def invert(self, source: Source) -> Steps[Trajectory]:
        """See `Inversion`. The start is drawn first, then one noise map per step where eta is above 0."""
        timesteps = source.schedule.ddim_timesteps(self.num_steps)
        stride = source.schedule.num_train_timesteps // self.num_steps
        solver = DDIM.from_schedule(source.schedule, timesteps, stride, eta=self.eta)
        noise = source.draw_noise()
        noised = [solver.add_noise(source.latents, noise, step) for step in range(1, self.num_steps)]
        noise_maps = [source.draw_noise() for _ in timesteps] if self.eta > 0 else None
        return Trajectory(
            method=self.method,
            source=source,
            solver=solver,
            latents=torch.stack([noise, *noised, source.latents]),
            noise_maps=None if noise_maps is None else torch.stack(noise_maps),
        )
        yield  # a generator, like every inversion, although it asks nothing of the model
