"""Classifier-free guidance under a target prompt (Ho and Salimans, arXiv 2207.12598), from any level of a trajectory.

On a `ddpm` trajectory this is the edit-friendly paper's own editor; on `noise` it is text to image (start_step 0) or
SDEdit (above 0); on `ddim` it is the plain edit that the other methods improve on.

Cost: two UNet rows per step walked, one at guidance 1 or 0. Masks: none.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pipeline.editing.base import Editor
from pipeline.editing.walk import walk
from pipeline.engine.calls import Steps
from pipeline.engine.prompts import GuidedPrompt
from pipeline.errors import PrepareError
from pipeline.records import EditedLatents, EditRequest, Trajectory


class ClassifierFreeGuidance(Editor):
    """Sample under the request's target prompt, against its negative prompt."""

    paper: ClassVar = "Classifier-Free Diffusion Guidance, arXiv 2207.12598"

    keeps_to_masks: ClassVar = False

    method: Literal["cfg"] = "cfg"
    """Sampling under the target prompt by classifier-free guidance."""
    guidance_scale: float = Field(default=7.5, allow_inf_nan=False)
    """Classifier-free guidance of the target prompt against the negative one; 1: the prompt alone; typical 3 to 15."""
    start_step: int = Field(default=0, ge=0)
    """Steps left out at the noisy end; more keeps more of the image."""

    def check(self, request: EditRequest, num_steps: int) -> None:
        """See `Editor`."""
        if not request.target_prompt:
            raise PrepareError(
                "the cfg editor samples under a target_prompt, and this edit has none. Add target_prompt"
            )
        if self.start_step > num_steps:
            raise PrepareError(
                f"start_step {self.start_step} lies beyond the trajectory's {num_steps} steps. Lower editing.start_step"
            )

    def edit(
        self,
        trajectory: Trajectory,
        request: EditRequest,
        user_mask: Tensor | None = None,
        *,
        keep_history: bool = False,
    ) -> Steps[EditedLatents]:
        """See `Editor`."""
        if user_mask is not None:
            self.check_mask()
        prompt = yield from GuidedPrompt.encode(request.target_prompt, self.guidance_scale, request.negative_prompt)
        latents, history = yield from walk(trajectory, self.start_step, prompt.predict, keep_history=keep_history)
        return EditedLatents(latents=latents, masks=None, history=history)
