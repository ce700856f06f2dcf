"""One guided prediction, as inversions and simple editors share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from pipeline.diffusion.guidance import classifier_free_guidance, with_norm_of
from pipeline.diffusion.levels import Level, Prediction
from pipeline.engine.calls import Conditioning, Denoise, Denoised, EncodeText, Steps


@dataclass(frozen=True, slots=True)
class GuidedPrompt:
    """A prompt under classifier-free guidance, against another. Rows whose weight is zero are not asked for.

    The prediction is `uncond + scale * (cond - uncond)`: at scale 1 the conditional row alone, at
    scale 0 the unconditional row alone.
    """

    cond: Conditioning
    uncond: Conditioning
    guidance_scale: float
    beside: Mapping[str, Tensor] = field(default_factory=dict)  # of one row: what the network takes beside its latents

    @classmethod
    def encode(cls, prompt: str, guidance_scale: float, negative_prompt: str = "") -> Steps[GuidedPrompt]:
        """Encode both prompts. Between equal ones there is no direction, hence no guidance."""
        cond, uncond = yield EncodeText((prompt, negative_prompt))
        return cls(cond, uncond, 1.0 if cond is uncond else guidance_scale)

    @classmethod
    def as_model_guides(
        cls,
        cond: Conditioning,
        uncond: Conditioning,
        guidance_scale: float,
        beside: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> GuidedPrompt:
        """Guidance as the model has it: one row that is told the scale, or two of which one has another prompt."""
        if cond.is_told_guidance:
            told = cond.telling(guidance_scale)
            return cls(told, told, 1.0, beside)
        return cls(cond, uncond, 1.0 if cond is uncond else guidance_scale, beside)

    def predict(self, latents: Tensor, level: Level) -> Steps[Prediction]:
        """Prediction (C, h, w) for latents (C, h, w)."""
        return (yield from self.predict_all(latents[None], [level]))[0]

    def predict_all(self, latents: Tensor, levels: Sequence[Level]) -> Steps[Prediction]:
        """Predictions (R, C, h, w) for R independent latents, asked for in one go."""
        rows = len(levels)
        if self.guidance_scale in (0.0, 1.0):
            conditioning = self.uncond if self.guidance_scale == 0.0 else self.cond
            denoised: Denoised = yield Denoise(
                latents, levels, [conditioning] * rows, beside=repeated(self.beside, rows)
            )
            return denoised.predictions
        denoised = yield Denoise(
            torch.cat([latents, latents]),
            [*levels, *levels],
            [self.uncond] * rows + [self.cond] * rows,
            beside=repeated(self.beside, 2 * rows),
        )
        return self.guide(denoised.predictions[:rows], denoised.predictions[rows:], levels)

    def guide(self, uncond: Prediction, cond: Prediction, levels: Sequence[Level]) -> Prediction:
        """What the scale makes of R predictions for either prompt, (R, C, h, w).

        Some models are guided in direction alone: each image token's velocity keeps its length (Qwen-Image).
        """
        guided = classifier_free_guidance(uncond, cond, self.guidance_scale)
        return with_norm_of(cond, guided, levels) if self.cond.keeps_norm else guided


def repeated(beside: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """What one row takes beside its latents, for several."""
    return {name: tensor.expand(rows, *tensor.shape) for name, tensor in beside.items()}
