"""LEDITS++ (Brack et al., arXiv 2311.16711): any number of concepts at once, each in a region of its own.

Cost: with N steps, sum over steps i >= w of 1 + (concepts active at i), where w is the smallest warm-up: steps before
it replay the stored trajectory and are not computed. Masks: one per concept. Memory: no attention map is kept; one
(h/4, w/4) field per active concept and step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.guidance import edit_directions, multi_edit_guidance
from pipeline.diffusion.levels import Level
from pipeline.diffusion.masks import attention_mask, change_of_data, dilated, noise_mask, strongest_region
from pipeline.editing.base import EditingMethod
from pipeline.editing.observing import StepRecord, observer
from pipeline.editing.problems import Problem
from pipeline.editing.walk import start_of, take_step
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import Denoise, Denoised, EncodeText, Steps
from pipeline.inversion.base import Inversion
from pipeline.records import Concept, EditedLatents, EditRequest, InversionPrompts, Source, Trajectory

# A concept's region moves from step to step: early steps lay out an object, late ones work at its edges. The reported
# mask is where it acted in at least this share of its steps. Against drawn truth, a half loses the inside of large
# objects, which only the early steps mark; for small ones, shares from a fifth to a half differ little.
REPORTED_SHARE = 0.25


def is_active(concept: Concept, step: int) -> bool:
    """Whether a concept guides kept step `step`."""
    return concept.warmup_steps <= step and (concept.cooldown_steps is None or step < concept.cooldown_steps)


def signed_scale(concept: Concept) -> float:
    """Guidance scale with the direction's sign."""
    return concept.guidance_scale if concept.direction == "add" else -concept.guidance_scale


def can_matter(concept: Concept) -> bool:
    """Whether a concept can change anything: a scale or weight of zero cannot."""
    return concept.guidance_scale != 0.0 and concept.weight != 0.0


def where_acted(times_in_mask: Float[Tensor, "E h w"], times_active: Float[Tensor, "E 1 1"]) -> Bool[Tensor, "E h w"]:
    """Each concept's region: where it acted in `REPORTED_SHARE` of the steps in which it was active, up to now."""
    return (times_in_mask >= REPORTED_SHARE * times_active) & (times_active > 0)


def steady_masks(concepts: list[Concept], changes: Float[Tensor, "E h w"], source: Source) -> Bool[Tensor, "E h w"]:
    """Where the directions of all steps so far, whose changes are added up here, change the image most."""
    thresholds = changes.new_tensor([concept.threshold for concept in concepts])
    return strongest_region(changes, thresholds, source.of_image(changes))


def outside_from_source(
    trajectory: Trajectory,
    step: int,
    latents: Float[Tensor, "C h w"],
    data_pred: Float[Tensor, "C h w"] | None,
    regions: Bool[Tensor, "E h w"],
    user_mask: Float[Tensor, "h w"] | None,
) -> tuple[Tensor, Tensor | None]:
    """The result of `step`, with the source's latents and data prediction outside the regions widened by one cell.

    That cell leaves room for an outline. Outside a user's mask everything is the source's.
    """
    editable = dilated(regions.any(dim=0), 1)
    if user_mask is not None:
        editable &= user_mask > 0
    source_latents, source_data_pred = start_of(trajectory, step + 1)
    if data_pred is not None and source_data_pred is not None:
        data_pred = torch.where(editable, data_pred, source_data_pred)
    return torch.where(editable, latents, source_latents), data_pred


class LEditsPP(EditingMethod):
    """Guide the unconditional prediction by every concept's masked direction."""

    needs: ClassVar = frozenset({"noise maps"})
    paper: ClassVar = "LEDITS++: Limitless Image Editing using Text-to-Image Models, arXiv 2311.16711"

    method: Literal["ledits_pp"] = "ledits_pp"
    """LEDITS++: several concepts at once, each in a mask of its own."""
    mask: Literal["intersect", "attention", "noise", "steady"] = "intersect"
    """What bounds a concept: its cross-attention (M1), the largest entries of its noise direction (M2), or both. Not in
    the paper: steady, where the directions of all steps so far together change the image most, without specks."""
    intersect_from_timestep: int = Field(default=800, ge=0)
    """At timesteps above this one an intersected mask is the attention mask alone, as in the Stable Diffusion pipeline
    of the maintained implementation: so early, directions are too diffuse to say where. A timestep, 0 to 999."""
    keep_background: bool = False
    """Take the latents outside all masks from the source at every step. Not in the paper, where masks bound the
    guidance alone: what is guided in one place moves the prediction in others, so a background drifts. This is the
    blending of Blended Latent Diffusion (Avrahami et al., arXiv 2206.02779) and of Prompt-to-Prompt, under this
    method's own masks."""

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        if self.mask in ("intersect", "attention") and not offers.watches:
            yield (
                f"mask: {self.mask} reads where the prompt's tokens are attended to, and this model has no such maps. "
                "Set editing.mask: noise or steady"
            )

    @override
    def inverts_under(self, request: EditRequest) -> InversionPrompts:
        """The prediction that concepts are added to is the empty or negative prompt's, unguided."""
        return InversionPrompts(request.negative_prompt, request.negative_prompt)

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        """No concept at all is allowed: the image comes back unedited."""
        if request.target_prompt and not request.concepts:
            yield Problem(
                "no concepts",
                "ledits_pp edits by concepts, and this edit has a target_prompt but no concepts. Name what to change "
                "under concepts, or use editing.method cfg",
            )
        for number, concept in enumerate(request.concepts):
            if concept.warmup_steps >= inversion.num_steps:
                yield Problem(
                    f"warmup_steps beyond the {inversion.num_steps} steps",
                    f"concept {number} ('{concept.prompt}') has warmup_steps {concept.warmup_steps}, but only "
                    f"{inversion.num_steps} steps are walked: it would never act. Lower warmup_steps or raise "
                    "inversion.num_steps",
                )

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        num_steps = trajectory.num_steps
        size = (trajectory.latents.shape[-2], trajectory.latents.shape[-1])
        concepts = request.concepts
        mattering = [number for number, concept in enumerate(concepts) if can_matter(concept)]
        base, *prompts = yield EncodeText((request.negative_prompt, *(concept.prompt for concept in concepts)))

        # Until the first concept acts the walk only replays what the inversion stored, provided that the inversion
        # predicted as this walk does: from the same prompt. Those steps are not computed.
        first_step = min((concepts[number].warmup_steps for number in mattering), default=num_steps)
        if (trajectory.source.prompt, trajectory.source.negative_prompt) != self.inverts_under(request):
            first_step = 0
        latents, previous = start_of(trajectory, first_step)
        times_in_mask = torch.zeros((len(concepts), *size))
        times_active = torch.zeros((len(concepts), 1, 1))
        changes = torch.zeros((len(concepts), *size))  # that the directions of all steps so far would make
        for step in range(first_step, num_steps):
            level = trajectory.levels[step]
            active = [number for number in mattering if is_active(concepts[number], step)]
            rows = 1 + len(active)
            denoised: Denoised = yield Denoise(
                latents.expand(rows, -1, -1, -1),
                [level] * rows,
                [base, *(prompts[number] for number in active)],
                watch=[(), *(prompts[number].positions for number in active)]
                if active and self.mask in ("intersect", "attention")
                else None,
            )
            prediction = denoised.predictions[0]
            masks = torch.zeros((len(concepts), *size), dtype=torch.bool)
            if active:
                acting = [concepts[number] for number in active]
                scales = latents.new_tensor([signed_scale(concept) for concept in acting])
                directions = edit_directions(prediction, denoised.predictions[1:], scales, user_mask)
                if self.mask == "steady":
                    changes[active] += change_of_data(directions.data.float())
                    masks[active] = steady_masks(acting, changes[active], trajectory.source)
                else:
                    masks[active] = self._masks(
                        acting, directions.contrast, denoised.attention, level, trajectory.source
                    )
                weights = latents.new_tensor([concept.weight for concept in acting])
                prediction = multi_edit_guidance(prediction, directions, masks[active], weights)
                times_in_mask += masks
                times_active[active] += 1
            latents, previous = take_step(trajectory, step, latents, prediction, previous)
            if self.keep_background:
                touched = where_acted(times_in_mask, times_active)
                latents, previous = outside_from_source(trajectory, step, latents, previous, touched, user_mask)
            if tell := observer():
                attention = None
                if active and denoised.attention is not None:
                    attention = torch.zeros((len(concepts), *denoised.attention.shape[1:]), dtype=latents.dtype)
                    attention[active] = denoised.attention[1:]
                tell(StepRecord(step=step, latents=latents, masks=masks, attention=attention))
        masks = where_acted(times_in_mask, times_active)
        return EditedLatents(latents=latents, masks=masks)

    def _masks(
        self, concepts: list[Concept], directions: Tensor, attention: Tensor | None, level: Level, source: Source
    ) -> Tensor:  # (E, h, w) bool
        thresholds = directions.new_tensor([concept.threshold for concept in concepts])
        if attention is None:
            return noise_mask(directions, thresholds, source.of_image)
        size = (directions.shape[-2], directions.shape[-1])
        where_attended = attention_mask(attention[1:].to(directions), thresholds, size, source.of_image)
        if self.mask == "attention" or level.timestep > self.intersect_from_timestep:
            return where_attended
        return where_attended & noise_mask(directions, thresholds, source.of_image)
