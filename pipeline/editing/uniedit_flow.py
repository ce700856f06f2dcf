"""Uni-Edit (Jiao et al., arXiv 2504.13109, algorithm 2): guidance along the difference of two predictions, more where
it is large.

From a moderately noised inverted latent the walk down follows the source prompt's prediction and, on top of it, the
difference of the target's to that, weighted by its own strength at each place.

Cost: two network rows per step, at the same latents. Where both prompts are equal it walks back under the source prompt
as `reconstruct` does. Masks: one, where the difference is strong on average. Deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import avg_pool2d
from typing_extensions import override

from pipeline.diffusion.levels import Prediction
from pipeline.editing.base import EditingMethod
from pipeline.editing.observing import StepRecord, observer
from pipeline.editing.problems import Problem, target_problems
from pipeline.editing.walk import no_masks
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import Conditioning, Denoise, Denoised, EncodeText, Steps
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, InversionPrompts, Source, Trajectory

TINY = 1e-7  # keeps a difference of nothing at all from dividing by nothing
INSIDE = 0.5  # from this mean weight on a place is reported as edited


class UniEditFlow(EditingMethod):
    """Walk down along the source's prediction and the weighted difference of the target's."""

    needs: ClassVar = frozenset({"DDIM steps", "path"})
    paper: ClassVar = "UniEdit-Flow: Unleashing Inversion and Editing in the Era of Flow Models, arXiv 2504.13109"

    method: Literal["uniedit_flow"] = "uniedit_flow"
    """Uni-Edit: the source prompt's walk, guided along the difference to the target's where that is strong."""
    omega: float = Field(default=5.0, ge=0, allow_inf_nan=False)
    """Strength: along the difference the walk goes omega times where it is weakest, and 1 + 2 omega times where it is
    strongest; 0 to 10."""
    weight: Literal["absolute", "signed"] = "absolute"
    """What a place's strength is the mean of, over channels. absolute: the difference's size; signed: the difference
    itself, as the authors' schedulers for diffusers have it, which depends on the sign of each channel."""
    cell: int = Field(default=1, ge=1, le=8)
    """Side in latents of the squares that have one strength. 2 is that of FLUX's tokens, as the authors have it
    there."""
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """What a network that is told its guidance (FLUX.1-dev) is told in the edit, 1 to 2. None: what the inversion was
    told. There is no classifier-free guidance in this method."""
    inverts: Literal["empty", "source"] = "empty"
    """The prompt that the image is inverted under: none, as in the paper, or the source prompt, from which it comes
    back closer where nothing changes."""

    @property
    @override
    def guides(self) -> bool:
        return False  # away from a negative prompt

    @override
    def inverts_under(self, request: EditRequest) -> InversionPrompts:
        return InversionPrompts("" if self.inverts == "empty" else request.source_prompt)

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        yield from target_problems(self.method, request)
        if request.negative_prompt:
            yield Problem(
                "a negative_prompt",
                "uniedit_flow guides from the source prompt to the target prompt, and reads no negative_prompt. Leave "
                "it out, or use editing.method cfg",
            )

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        if self.guidance_scale is not None and not offers.embedded_guidance:
            yield (
                "guidance_scale is what a network is told, and this model's takes none. Leave editing.guidance_scale "
                "out, and set editing.omega for more or less of the edit"
            )

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        """Inside a user's mask alone; outside the latents stay on the trajectory, and so end as the image was
        encoded."""
        prompts = yield EncodeText((request.source_prompt, request.target_prompt))
        source, target = (self._told(prompt) for prompt in prompts)
        latents = trajectory.latents[0]
        total = torch.zeros(latents.shape[-2:], dtype=latents.dtype)
        for step, level in enumerate(trajectory.levels):
            both: Denoised = yield Denoise(latents.expand(2, *latents.shape), [level] * 2, [source, target])
            shown, difference = both.predictions[0], both.predictions[1] - both.predictions[0]
            if user_mask is not None:
                difference = difference * user_mask
            strength = self.strength(difference, trajectory.source)
            total += strength
            guided = shown + difference * (self.omega + (1.0 + self.omega) * strength)
            latents = trajectory.solver.transition(step, latents, guided, None).mean
            if user_mask is not None:
                latents = user_mask * latents + (1.0 - user_mask) * trajectory.latents[step + 1]
            if tell := observer():
                tell(StepRecord(step=step, latents=latents, masks=no_masks(latents)))
        return EditedLatents(latents=latents, masks=(total / trajectory.num_steps >= INSIDE)[None])

    def strength(self, difference: Prediction, source: Source) -> Tensor:
        """(h, w) from 0 where the difference (C, h, w) is weakest to 1 where it is strongest, of one image."""
        strengths = difference.contrast.abs() if self.weight == "absolute" else difference.contrast
        mean = strengths.mean(dim=0)
        if self.cell > 1:
            rows, columns = mean.shape
            mean = avg_pool2d(mean[None, None], self.cell, ceil_mode=True, count_include_pad=False)[0, 0]
            mean = mean.repeat_interleave(self.cell, dim=0).repeat_interleave(self.cell, dim=1)[:rows, :columns]
        inside = source.of_image(mean)
        least, most = inside.min(), inside.max()
        return ((mean - least) / (most - least + TINY)).clamp(0.0, 1.0)

    def _told(self, prompt: Conditioning) -> Conditioning:
        return prompt if self.guidance_scale is None else prompt.telling(self.guidance_scale)
