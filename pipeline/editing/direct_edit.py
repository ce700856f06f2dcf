"""DirectEdit (Yang and Ye, arXiv 2605.02417): the target is predicted where the inversion predicted, and moves by the
difference.

An inversion predicts each step at the less noisy latents, a sampler at the noisier: that gap is what makes it drift.
Here the target's latents are displaced by the gap before each prediction, so that the source would repeat the
inversion's predictions to the bit. What is left is an offset from the image, moved along the difference of the target's
prediction and the stored one: FlowEdit, with the inverted trajectory in place of fresh noise.

In the first steps the target's attention may take the source's values, which keeps more of the image.

After the inversion `dna` it is displaced to where that predicted, as in DNAEdit; whose pull towards a reference, the
image moved along the same differences, is `target_share`.

Cost: one row per step, two where the target is guided against another prompt; one more in each step that takes values.
Where nothing is to change the image comes back bit for bit. Deterministic. The paper speaks of flow-matching models
alone; here levels are points of a straight line, which those of other models are, too (`Level.scale`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Level, Prediction
from pipeline.diffusion.steps import DDIM
from pipeline.editing.base import EditingMethod
from pipeline.editing.observing import StepRecord, observer
from pipeline.editing.problems import Problem, target_problems
from pipeline.editing.walk import no_masks
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import Conditioning, Denoise, Denoised, EncodeText, Steps
from pipeline.engine.controls import Control, Layers, Route
from pipeline.engine.halfway import SecondOrder
from pipeline.engine.prompts import GuidedPrompt
from pipeline.errors import PrepareError
from pipeline.inversion.base import Inversion
from pipeline.inversion.direct import DirectInversion
from pipeline.records import EditedLatents, EditRequest, Trajectory

VALUES = Layers(kind="any", swapping_values=True)
GUIDED_RATIO, TOLD_RATIO = 0.3, 0.15  # the authors', of Stable Diffusion 3.5 and FLUX.1-dev


class DirectEdit(EditingMethod):
    """Move an offset from an inverted trajectory along the difference of predictions at one place."""

    needs: ClassVar = frozenset({"DDIM steps", "path", "upward velocities"})
    takes: ClassVar = frozenset({"source branch", "displaced target"})
    paper: ClassVar = "DirectEdit, arXiv 2605.02417"

    method: Literal["direct_edit"] = "direct_edit"
    """DirectEdit: predictions for the target where the inversion predicted, and an offset along their difference."""
    guidance_scale: float = Field(default=2.0, allow_inf_nan=False)
    """Guidance of the target prompt, against the edit's negative prompt or told to the network (FLUX.1-dev); 1: none;
    2 to 3.5. The source is guided as its inversion was."""
    attn_ratio: float | None = Field(default=None, ge=0, le=1)
    """Share of the schedule's steps, from the first that is walked, in which the target's attention takes the source's
    values; more keeps more of the image. None: 0.3, and 0.15 where the network is told its guidance. 0: it never
    does."""

    target_share: float = Field(default=1.0, gt=0, le=1)
    """Weight of the target's prediction; the rest goes straight to the image moved by the edit so far, which keeps more
    of it. DNAEdit's is 0.8; 1: DirectEdit."""

    @property
    @override
    def guides(self) -> bool:
        return self.guidance_scale != 1.0

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        yield from target_problems(self.method, request)

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        if isinstance(inversion, DirectInversion) and inversion.pin_shares(inversion.num_steps) is not None:
            yield (
                "direct_edit keeps its source on the trajectory, and the inversion's offset_scale and interval let it "
                "drift. Leave them at 1"
            )
        if getattr(inversion, "solver", "first_order") in get_args(SecondOrder):
            yield (
                "direct_edit reads along what each step of the inversion went up, which steps of second order do not "
                "tell. Leave inversion.solver out"
            )

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        if self.attn_ratio != 0 and not (offers.openings.layers or offers.openings.joint):
            yield (
                "in its first steps direct_edit takes values of attention from the source, and this model has no "
                "attention that lets them in. Set editing.attn_ratio: 0"
            )

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        """Where a user's mask is black the latents end as the image was encoded."""
        source, target, negative = yield EncodeText(
            (trajectory.source_prompt, request.target_prompt, request.negative_prompt)
        )
        if request.negative_prompt and target.is_told_guidance:
            raise PrepareError(
                "direct_edit tells this network its guidance, in one row, which leaves no place for the edit's "
                "negative_prompt. Leave negative_prompt out, or use editing.method cfg"
            )
        prompt = GuidedPrompt.as_model_guides(target, negative, self.guidance_scale)
        assert trajectory.velocities is not None
        assert isinstance(trajectory.solver, DDIM)
        taking = self.steps_taking_values(trajectory, told=target.is_told_guidance)
        offset = torch.zeros_like(trajectory.latents[0])
        moved = torch.zeros_like(offset)  # the image's, along the target's own predictions
        for step, (start, end) in enumerate(trajectory.solver.steps):
            below, at, level, scale = _where_predicted(trajectory, step)
            # An offset of zeros leaves the latents that the inversion predicted at: equal prompts predict equal bits.
            displaced = at + scale * offset
            if step < taking:
                prediction = yield from _with_values(prompt, source, at, displaced, level)
            else:
                prediction = yield from prompt.predict(displaced, level)
            velocity = prediction.velocity
            down, difference = end.share - start.share, velocity - trajectory.velocities[step]
            if self.target_share < 1.0:
                moved = moved + down * difference
                state = trajectory.latents[step] / start.scale + offset
                reference = trajectory.latents[-1] / trajectory.solver.steps[-1].end.scale + moved
                pulled = (state - reference) / start.share
                mixed = self.target_share * velocity + (1.0 - self.target_share) * pulled
                difference = mixed - trajectory.velocities[step]
            offset = offset + down * difference
            if user_mask is not None:
                offset, moved = user_mask * offset, user_mask * moved
            if tell := observer():
                state = below + end.scale * offset
                seen = {"velocity": velocity}
                tell(StepRecord(step=step, latents=state, masks=no_masks(state), source_latents=below, details=seen))
        latents = trajectory.latents[-1] + trajectory.solver.steps[-1].end.scale * offset
        return EditedLatents(latents=latents, masks=None)

    def steps_taking_values(self, trajectory: Trajectory, *, told: bool) -> int:
        """How many of the steps that are walked, from the first."""
        ratio = self.attn_ratio
        if ratio is None:
            ratio = TOLD_RATIO if told else GUIDED_RATIO
        return int(trajectory.total_steps * ratio)


def _where_predicted(trajectory: Trajectory, step: int) -> tuple[Tensor, Tensor, Level, float]:
    """Of a step up: the latents below it, those that it was predicted at, their level, and the scale of an offset."""
    below = trajectory.latents[step + 1]
    start, end = trajectory.solver.steps[step]
    if trajectory.predicted_at is not None:
        return below, trajectory.predicted_at[step], start, start.scale
    assert isinstance(trajectory.solver, DDIM)
    return below, below, trajectory.solver.level_below(step), end.scale


def _with_values(
    prompt: GuidedPrompt, source: Conditioning, below: Tensor, displaced: Tensor, level: Level
) -> Steps[Prediction]:
    """Predict for the target while its conditional row takes the values of the source's. All rows are one group."""
    is_guided = prompt.guidance_scale not in (0.0, 1.0)
    cond = prompt.uncond if prompt.guidance_scale == 0.0 else prompt.cond
    told = [source, *([prompt.uncond] if is_guided else []), cond]
    rows = len(told)
    latents = torch.stack([below, *[displaced] * (rows - 1)])
    control = Control((Route(row=rows - 1, value=0, layers=VALUES),))
    denoised: Denoised = yield Denoise(latents, [level] * rows, told, control=control)
    predictions = denoised.predictions
    if not is_guided:
        return predictions[rows - 1]
    return prompt.guide(predictions[1:2], predictions[2:3], [level])[0]
