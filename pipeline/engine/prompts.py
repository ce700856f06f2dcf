"""One guided prediction, as inversions and simple editors share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.guidance import classifier_free_guidance
from pipeline.engine.calls import Denoise, Denoised, EncodeText, Steps, TextConditioning


@dataclass(frozen=True, slots=True)
class GuidedPrompt:
    """A prompt under classifier-free guidance, against another. Rows whose weight is zero are not asked for.

    The prediction is `uncond + scale * (cond - uncond)`: at scale 1 the conditional row alone, at
    scale 0 the unconditional row alone.
    """

    cond: TextConditioning
    uncond: TextConditioning
    guidance_scale: float
    inpaint: Tensor | None = None  # (1 + C, h, w): mask and masked image, for UNets that take these, too

    @classmethod
    def encode(cls, prompt: str, guidance_scale: float, negative_prompt: str = "") -> Steps[GuidedPrompt]:
        """Encode both prompts. Between equal ones there is no direction, hence no guidance."""
        cond, uncond = yield EncodeText((prompt, negative_prompt))
        return cls(cond, uncond, 1.0 if prompt == negative_prompt else guidance_scale)

    def predict(self, latents: Tensor, timestep: int) -> Steps[Tensor]:
        """Noise prediction (C, h, w) for latents (C, h, w)."""
        return (yield from self.predict_all(latents[None], [timestep]))[0]

    def predict_all(self, latents: Tensor, timesteps: Sequence[int]) -> Steps[Tensor]:
        """Noise predictions (R, C, h, w) for R independent latents, asked for in one go."""
        rows = len(timesteps)
        if self.guidance_scale in (0.0, 1.0):
            conditioning = self.uncond if self.guidance_scale == 0.0 else self.cond
            denoised: Denoised = yield Denoise(latents, timesteps, [conditioning] * rows, inpaint=self._inpaint(rows))
            return denoised.noise_preds
        denoised = yield Denoise(
            torch.cat([latents, latents]),
            [*timesteps, *timesteps],
            [self.uncond] * rows + [self.cond] * rows,
            inpaint=self._inpaint(2 * rows),
        )
        uncond, cond = denoised.noise_preds.split(rows)
        return torch.stack(
            [classifier_free_guidance(u, c, self.guidance_scale) for u, c in zip(uncond, cond, strict=True)]
        )

    def _inpaint(self, rows: int) -> Tensor | None:
        return None if self.inpaint is None else self.inpaint.expand(rows, -1, -1, -1)
