"""Classifier-free guidance under a target prompt (Ho and Salimans, arXiv 2207.12598), from any level of a trajectory.

On a `ddpm` trajectory this is the edit-friendly paper's own editor; on `noise` it is text to image (start_step 0) or
SDEdit (above 0); on `ddim` it is the plain edit that the other methods improve on. After `null_text` and
`negative_prompt` the embeddings that these bring take the empty prompt's place. There is no source branch, so that
`direct` would have nothing to put back.

Cost: two network rows per step walked, one at guidance 1 or 0. Masks: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.editing.base import EditingMethod
from pipeline.editing.problems import (
    Problem,
    guidance_problems,
    negative_prompt_problems,
    no_place_for_negative_prompt,
    raise_first,
    start_problems,
    target_problems,
)
from pipeline.editing.walk import Predict, guided, guided_against_brought, walk
from pipeline.engine.calls import EncodeText, Steps
from pipeline.engine.prompts import GuidedPrompt
from pipeline.errors import PrepareError
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, Trajectory


class ClassifierFreeGuidance(EditingMethod):
    """Sample under the request's target prompt, against its negative prompt."""

    takes: ClassVar = frozenset({"unconditional prompt"})
    paper: ClassVar = "Classifier-Free Diffusion Guidance, arXiv 2207.12598"

    keeps_to_masks: ClassVar = False

    method: Literal["cfg"] = "cfg"
    """Sampling under the target prompt by classifier-free guidance."""
    guidance_scale: float = Field(default=7.5, allow_inf_nan=False)
    """Classifier-free guidance of the target prompt against the negative one; 1: the prompt alone; typical 3 to 15."""
    start_step: int = Field(default=0, ge=0)
    """Steps left out at the noisy end; more keeps more of the image."""

    @property
    @override
    def guides(self) -> bool:
        return self.guidance_scale != 1.0

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        yield from target_problems(self.method, request)
        yield from negative_prompt_problems(request, inversion)

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        if inversion.uncond_for == "source":
            yield (
                "uncond_scope: source gives the optimised embeddings to a source branch, and cfg has none: this would "
                "be inversion.method ddim at many times its cost. Set uncond_scope: all, or inversion.method: ddim"
            )
        yield from guidance_problems(self.guidance_scale, inversion)
        yield from start_problems(self.start_step, inversion.num_steps)

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        if user_mask is not None:
            raise_first(self.mask_problems())
        if trajectory.uncond is None:
            prompt = yield from GuidedPrompt.encode(request.target_prompt, self.guidance_scale, request.negative_prompt)
            predict: Predict = guided(trajectory, prompt)
        elif request.negative_prompt:
            raise PrepareError(no_place_for_negative_prompt(trajectory.method))
        else:
            (target,) = yield EncodeText((request.target_prompt,))
            predict = guided_against_brought(trajectory, target, self.guidance_scale)
        latents = yield from walk(trajectory, self.start_step, predict)
        return EditedLatents(latents=latents, masks=None)
