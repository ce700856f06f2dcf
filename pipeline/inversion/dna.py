"""DNAEdit's inversion (Xie et al., repository xiechenxi99/DNAEdit_code): a random noise is aligned to the image.

Each step up goes from the image's latents straight towards the noise; what the model predicts there tells by how much
that line misses the model's own, and both the latents and the noise are moved by it. The noise then lies at the end of
the line along the prediction: from the second step on this is `uni_inv`, whose first look goes towards a random noise
instead of along a prediction at the image. What is predicted, and where, is kept, and `direct_edit` displaces its
target to there.

Cost: one network row per step at guidance 1 or 0, two otherwise; steps depend on each other. Reconstruction:
approximate. Memory: 3 N + 1 latents per image. Stochastic: one seed per image.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import override

from pipeline.diffusion.steps import DDIM
from pipeline.engine.calls import Steps
from pipeline.engine.prompts import GuidedPrompt
from pipeline.inversion.base import SkippingInversion
from pipeline.records import Source, Trajectory


class DNAInversion(SkippingInversion):
    """Walk upwards along predictions at points on the way to a noise that is moved with them."""

    provides: ClassVar = frozenset({"DDIM steps", "path", "upward velocities"})
    demands: ClassVar = frozenset({"displaced target"})
    exact: ClassVar = "approximate"
    paper: ClassVar = "DNAEdit: Direct Noise Alignment for Text-Guided Rectified Flow Editing"

    method: Literal["dna"] = "dna"
    """DNAEdit's inversion: a random noise, aligned to the image step by step."""
    num_steps: int = Field(default=27, ge=1, le=1000)
    """N: steps up, and down again."""
    skip_steps: int = Field(default=13, ge=0)
    """Steps of the schedule left out at its noisy end: the schedule has num_steps + skip_steps. The authors' start step
    is 13 of 40 on Stable Diffusion 3, and 4 of 28 on FLUX.1-dev."""

    guidance_scale: float = Field(default=1.0, allow_inf_nan=False)
    """Classifier-free guidance of the source prompt on the way up; 1: none."""

    @override
    def invert(self, source: Source) -> Steps[Trajectory]:
        """In the straight frame, where latents over their level's scale are (1 - share) x0 + share n."""
        whole = source.schedule.steps(self.schedule_steps, source.size)
        steps = whole[self.skip_steps :]
        prompt = yield from GuidedPrompt.encode(source.prompt, self.guidance_scale, source.negative_prompt)
        at, noise = source.latents / steps[-1].end.scale, source.draw_noise()
        latents, predicted_at, velocities = [source.latents], [], []
        for level, below in ((step.start, step.end) for step in reversed(steps)):
            up = level.share - below.share
            reached = at + up / (1.0 - below.share) * (noise - at)
            velocity = (yield from prompt.predict(level.scale * reached, level)).velocity
            missed = (reached - at) / up - velocity
            at, noise = at + up * velocity, noise - (1.0 - below.share) * missed
            latents.append(level.scale * at)
            predicted_at.append(level.scale * reached)
            velocities.append(velocity)
        return Trajectory(
            method=self.method,
            source=source,
            solver=DDIM(steps=steps),
            latents=torch.stack(latents[::-1]),
            velocities=torch.stack(velocities[::-1]),
            predicted_at=torch.stack(predicted_at[::-1]),
            source_guidance=self.guidance_scale,
            skipped_steps=self.skip_steps,
            level_above=whole[self.skip_steps - 1].start if self.skip_steps else None,
        )
