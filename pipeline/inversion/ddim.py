"""DDIM inversion (Song et al., arXiv 2010.02502, section 4.3; Dhariwal and Nichol, arXiv 2105.05233, appendix F).

On a flow-matching model this is Euler's method. `solver` has two of second order, which RF-Solver (arXiv 2411.04746)
and FireFlow (arXiv 2412.07517) brought to inversion.

Cost: one network row per step at guidance 1 or 0, two otherwise; twice that by `rf_solver`, and for one more step by
`fireflow`. Steps depend on each other, so no two share a call.
Reconstruction: approximate, it drifts with guidance. Memory: 2 N + 1 latents per image. Deterministic.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.steps import DDIM
from pipeline.engine.calls import Steps
from pipeline.engine.halfway import SecondOrder, SecondOrderWalk
from pipeline.engine.prompts import GuidedPrompt
from pipeline.inversion.base import SkippingInversion
from pipeline.records import Source, Trajectory


class DDIMInversion(SkippingInversion):
    """Walk the deterministic sampler upwards, predicting each step at the timestep that it leads to."""

    provides: ClassVar = frozenset({"DDIM steps", "path", "upward velocities"})
    exact: ClassVar = "approximate"
    paper: ClassVar = "Denoising Diffusion Implicit Models, arXiv 2010.02502"

    method: Literal["ddim"] = "ddim"
    """DDIM inversion: the deterministic sampler, walked upwards."""
    num_steps: int = Field(default=50, ge=1, le=1000)
    """N: steps up, and down again."""
    skip_steps: int = Field(default=0, ge=0)
    """Steps of the schedule left out at its noisy end, as `ddpm` counts them: the schedule has num_steps + skip_steps.
    A strength of 0.8 of 50 steps is num_steps 40 with skip_steps 10; more left out stays closer to the image."""
    guidance_scale: float = Field(default=1.0, allow_inf_nan=False)
    """Classifier-free guidance of the source prompt on the way up; 1: none. Other values are unstable."""
    solver: Literal["first_order", SecondOrder] = "first_order"
    """How steps are taken, up and, by cfg and reconstruct, down again. first_order: DDIM's; rf_solver: along a
    prediction half-way, two per step; fireflow: likewise, reached along the step before, one per step and one more."""

    @override
    def invert(self, source: Source) -> Steps[Trajectory]:
        steps = source.schedule.steps(self.schedule_steps, source.size)
        solver = DDIM(steps=steps[self.skip_steps :])
        prompt = yield from GuidedPrompt.encode(source.prompt, self.guidance_scale, source.negative_prompt)
        if self.solver != "first_order":
            return (yield from self._second_order(source, prompt, solver, self.solver))
        latents, velocities = [source.latents], []
        for step in reversed(range(self.num_steps)):
            prediction = yield from prompt.predict(latents[-1], solver.level_below(step))
            latents.append(solver.inverse(step, prediction))
            velocities.append(prediction.velocity)
        return self._trajectory(source, solver, latents[::-1], torch.stack(velocities[::-1]))

    def _second_order(self, source: Source, prompt: GuidedPrompt, solver: DDIM, kind: SecondOrder) -> Steps[Trajectory]:
        upwards, latents = SecondOrderWalk(kind), [source.latents]
        for start, end in reversed(solver.steps):
            latents.append((yield from upwards.step(latents[-1], end, start, prompt.predict)))
        trajectory = self._trajectory(source, solver, latents[::-1], None)
        return dataclasses.replace(trajectory, second_order=kind)

    def _trajectory(self, source: Source, solver: DDIM, latents: list[Tensor], velocities: Tensor | None) -> Trajectory:
        above = source.schedule.steps(self.schedule_steps, source.size)[: self.skip_steps]
        return Trajectory(
            method=self.method,
            source=source,
            solver=solver,
            latents=torch.stack(latents),
            velocities=velocities,
            source_guidance=self.guidance_scale,
            skipped_steps=self.skip_steps,
            level_above=above[-1].start if above else None,
        )
