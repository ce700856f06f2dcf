"""Editing by an instruction, with a model that was trained for it: FLUX.1 Kontext (Black Forest Labs, arXiv
2506.15742), FLUX.2 klein, Qwen-Image-Edit (Wu et al., arXiv 2508.02324).

The network reads the image as tokens of their own beside the noise, and the instruction as its prompt, with which
Qwen-Image-Edit's text encoder sees the image; what it samples is the edited image. There is no inversion and no source
prompt.

Cost: one network row per step where the network is told its guidance (Kontext), else two; each of about twice the
tokens. Masks: one, where the result differs from the image. Stochastic: one seed per image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.masks import above_otsu
from pipeline.editing.base import EditingMethod
from pipeline.editing.observing import StepRecord, observer
from pipeline.editing.problems import Problem
from pipeline.editing.walk import no_masks, take_step
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import EncodeText, Steps
from pipeline.engine.prompts import GuidedPrompt
from pipeline.errors import PrepareError
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, InversionPrompts, Trajectory

# Usual of FLUX.1 Kontext, which is told its guidance; what FLUX.2 klein's and Qwen-Image's publishers sample with.
TOLD_SCALE, GUIDED_SCALE = 2.5, 4.0


class Instruct(EditingMethod):
    """Sample under an instruction, with the image as reference."""

    needs: ClassVar = frozenset({"DDIM steps", "levels alone"})
    paper: ClassVar = "FLUX.1 Kontext, arXiv 2506.15742; Qwen-Image-Edit, arXiv 2508.02324"

    method: Literal["instruct"] = "instruct"
    """Editing by an instruction, with a model that was trained to read the image beside it (FLUX.1 Kontext, FLUX.2
    klein, Qwen-Image-Edit)."""
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Guidance of the instruction, told to the network or against the edit's negative prompt; 1: none. None: 2.5 where
    the network is told (FLUX.1 Kontext; 3.5 follows the instruction more closely), else 4 (FLUX.2 klein base,
    Qwen-Image-Edit)."""

    @property
    @override
    def guides(self) -> bool:
        return self.guidance_scale != 1.0

    @override
    def inverts_under(self, request: EditRequest) -> InversionPrompts:
        return InversionPrompts("")

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        if not request.instruction:
            yield Problem(
                "no instruction",
                "instruct does what an instruction says, and this edit has no instruction. Add instruction, such as "
                '"put a hat on the dog"',
            )

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        if not offers.references:
            yield (
                "instruct gives the network the image itself to read, and this model takes no reference image. Use a "
                "checkpoint that does, such as black-forest-labs/FLUX.1-Kontext-dev, Qwen/Qwen-Image-Edit or "
                "black-forest-labs/FLUX.2-klein-base-4B, or another editing.method"
            )

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        """Where a user's mask is black the image stands under the noise of each level, and itself at the end."""
        clean = trajectory.source.latents
        latents = yield from self.sample(
            trajectory, request.instruction, clean, user_mask, request.negative_prompt, trajectory.source.pixels
        )
        change = (latents - clean).square().sum(dim=0).sqrt()
        return EditedLatents(latents=latents, masks=above_otsu(change[None], trajectory.source.of_image))

    def sample(
        self,
        trajectory: Trajectory,
        instruction: str,
        reference: Tensor,
        user_mask: Tensor | None = None,
        negative_prompt: str = "",
        picture: np.ndarray | None = None,
    ) -> Steps[Tensor]:
        """Latents (C, h, w) from the trajectory's noise, beside a reference (C, h', w'). `picture`: the reference's
        pixels; None: of a model whose text encoder reads none."""
        guided = yield from self._guided(instruction, negative_prompt, picture)
        guided = replace(guided, beside={"reference": reference})
        clean, noise = trajectory.source.latents, trajectory.latents[0]
        latents = noise
        for step, (start, end) in enumerate(trajectory.solver.steps):
            prediction = yield from guided.predict(latents, start)
            latents, _ = take_step(trajectory, step, latents, prediction, None)
            if user_mask is not None:
                last = step + 1 == trajectory.num_steps
                around = clean if last else end.noised(clean, noise)
                latents = user_mask * latents + (1.0 - user_mask) * around
            if tell := observer():
                tell(StepRecord(step=step, latents=latents, masks=no_masks(latents)))
        return latents

    def _guided(self, instruction: str, negative_prompt: str, picture: np.ndarray | None) -> Steps[GuidedPrompt]:
        """The instruction, guided as the model was trained to be."""
        (prompt,) = yield EncodeText((instruction,), picture)
        scale = self.guidance_scale
        if scale is None:
            scale = TOLD_SCALE if prompt.is_told_guidance else GUIDED_SCALE
        if prompt.is_told_guidance and negative_prompt:
            raise PrepareError(
                "instruct tells this network its guidance, in one row, which leaves no place for the edit's "
                "negative_prompt. Leave negative_prompt out, and say in the instruction what shall not be"
            )
        if prompt.is_told_guidance or scale == 1.0:
            return GuidedPrompt.as_model_guides(prompt, prompt, scale)
        (other,) = yield EncodeText((negative_prompt,), picture)
        return GuidedPrompt.as_model_guides(prompt, other, scale)
