"""Edit-friendly DDPM inversion (Huberman-Spiegelglas et al., arXiv 2304.06140), as LEDITS++ extends it.

Cost: one network row per kept step (two with a guided source prompt), all asked for in one go, since each noisy latent
is drawn straight from the image. Reconstruction: exact by construction, whatever the network predicts.
Memory: 3 N + 1 latents per image. Stochastic: one seed per image.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Schedule
from pipeline.diffusion.steps import DDIM, LastMap, SDEDPMSolver, Solver
from pipeline.engine.calls import Steps
from pipeline.engine.prompts import GuidedPrompt
from pipeline.inversion.base import Inversion
from pipeline.records import Source, Trajectory

MOST_STEPS = 999  # of a model's 1000 timesteps the schedules need one to stand above


class DDPMInversion(Inversion):
    """Draw every noisy latent independently, then solve each step of a stochastic sampler for its noise map."""

    provides: ClassVar = frozenset({"noise maps", "path"})
    exact: ClassVar = "exact"
    paper: ClassVar = "An Edit Friendly DDPM Noise Space, arXiv 2304.06140; LEDITS++, arXiv 2311.16711"

    method: Literal["ddpm"] = "ddpm"
    """Edit-friendly DDPM inversion: noisy latents drawn independently, a noise map for each step."""
    solver: Literal["sde-dpmsolver++", "ddim"] = "sde-dpmsolver++"
    """Sampler whose steps are inverted: SDE DPM-Solver++ of second order, or DDIM with the variance of `eta`."""
    num_steps: int = Field(default=30, ge=1, le=999)
    """N: kept steps, what an edit walks."""
    skip: float = Field(default=0.15, ge=0)
    """The schedule has int(N * (1 + skip)) steps, of which the N least noisy are kept (LEDITS++): larger stays closer
    to the image."""
    skip_steps: int | None = Field(default=None, ge=0)
    """Number of steps left out at the noisy end, as the edit-friendly paper counts them, in place of `skip`, which is
    then not read: "36 of 100" is num_steps 64 with skip_steps 36. None: `skip` counts."""
    eta: float = Field(default=1.0, gt=0, le=1)
    """Share of DDPM's noise in a step of the ddim solver; 1: DDPM. The solver sde-dpmsolver++ has none to choose."""
    exact_last_step: bool = True
    """Whether the last step has a noise map too, and so ends at the image exactly. False: it has none, as the published
    implementations have it."""
    source_guidance_scale: float = Field(default=3.5, allow_inf_nan=False)
    """Classifier-free guidance of the source prompt; 1: none. Acts only with a source prompt."""
    eta_form: Literal["standard", "authors"] = "standard"
    """How `eta` enters the variance: its square, or, for parity with the authors' code only, itself."""

    @model_validator(mode="after")
    def _one_skip(self) -> DDPMInversion:
        if self.skip_steps is not None and "skip" in self.model_fields_set:
            raise ValueError("skip and skip_steps both say how much of the schedule is left out. Remove one of them")
        return self

    @model_validator(mode="after")
    def _eta_is_used(self) -> DDPMInversion:
        if self.solver == "sde-dpmsolver++" and self.eta != 1.0:
            raise ValueError("eta acts with solver: ddim only. Set solver: ddim or leave eta at 1")
        return self

    @model_validator(mode="after")
    def _schedule_is_possible(self) -> DDPMInversion:
        if self.schedule_steps > MOST_STEPS:
            raise ValueError(
                f"num_steps {self.num_steps} and what is skipped make a schedule of {self.schedule_steps} steps, "
                f"possible are {MOST_STEPS}. Lower num_steps or skip"
            )
        return self

    @property
    @override
    def schedule_steps(self) -> int:
        """Steps of the whole schedule, the skipped ones included."""
        if self.skip_steps is not None:
            return self.num_steps + self.skip_steps
        # Truncating the float product (100 steps, 0.15: 114) is what diffusers does.
        return int(self.num_steps * (1.0 + self.skip))

    def solver_for(self, schedule: Schedule, size: tuple[int, int], *, skipped: int = 0) -> Solver:
        """The N kept steps on a checkpoint's schedule; leading spacing, whatever the checkpoint samples with.

        `skipped`: as many of the steps before them, too.
        """
        kept = self.num_steps + skipped
        # The last step, too, has a noise map: scaled, where the schedule has a noisy level for it to end at.
        exact = self.exact_last_step
        last_map: LastMap = "residual" if exact else "none"
        if self.solver == "ddim":
            steps = schedule.steps(self.schedule_steps, size, leading=True, to_lowest=exact)
            power = 2 if self.eta_form == "standard" else 1
            return DDIM(steps=steps[-kept:], eta=self.eta, last_map=last_map, power_of_eta=power)
        levels = schedule.multistep_levels(self.schedule_steps, size, to_lowest=exact)
        return SDEDPMSolver.along(levels[-kept - 1 :], last_map)

    @override
    def invert(self, source: Source) -> Steps[Trajectory]:
        """Noise is drawn for ascending timesteps, the reference's order."""
        solver = self.solver_for(source.schedule, source.size)
        starts = [step.start for step in solver.steps]
        # One independent draw per level, unlike a forward Markov chain: this makes the noise maps carry the layout of
        # the image, hence "edit-friendly". It also frees the predictions of each other: all are asked for at once.
        noised = [level.noised(source.latents, source.draw_noise()) for level in reversed(starts)]
        latents = [*reversed(noised), source.latents]
        prompt = yield from GuidedPrompt.encode(source.prompt, self.source_guidance_scale, source.negative_prompt)
        predictions = yield from prompt.predict_all(torch.stack(latents[:-1]), starts)

        noise_maps: list[Tensor] = []
        data_preds: list[Tensor] = []
        for step in range(self.num_steps):
            previous = data_preds[-1] if data_preds else None
            mean, sigma, data_pred = solver.transition(step, latents[step], predictions[step], previous)
            noise_map = (latents[step + 1] - mean) / sigma if sigma > 0 else torch.zeros_like(mean)
            if step + 1 == self.num_steps and sigma == 0:
                latents[step + 1] = mean  # what replaying the trajectory returns
            noise_maps.append(noise_map)
            data_preds.append(data_pred)
        skips = self.schedule_steps > self.num_steps
        return Trajectory(
            method=self.method,
            source=source,
            solver=solver,
            latents=torch.stack(latents),
            noise_maps=torch.stack(noise_maps),
            data_preds=torch.stack(data_preds),
            source_guidance=self.source_guidance_scale,
            skipped_steps=self.schedule_steps - self.num_steps,
            level_above=self.solver_for(source.schedule, source.size, skipped=1).steps[0].start if skips else None,
            pinned=True,
        )
