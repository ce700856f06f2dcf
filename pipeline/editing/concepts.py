"""Concepts of sparse autoencoders, written into the network (arXiv 2504.15473).

Named features of what transformer blocks write are added to it, or taken from it: early to place objects, in the middle
to change a style. Without interventions this is plain sampling, whose blocks may be recorded.

Cost: two network rows per step (one at guidance 1), and one more after `direct`. A region or a subtraction that is
predicted takes one row more when its window begins; codes that are taken away one more at each of its steps. Masks: the
union of all regions; none where an intervention acts everywhere. Memory: the library's autoencoders, once a worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Level, Prediction
from pipeline.diffusion.sparse_autoencoder import codes_of_map
from pipeline.editing.base import EditingMethod
from pipeline.editing.observing import StepRecord, observer
from pipeline.editing.problems import Problem, negative_prompt_problems, raise_first
from pipeline.editing.recording import MOST_WORDS, TIMESTEPS, kept, recorded_at, words_of
from pipeline.editing.steering import Places, Term, Wish, control_of, predicted_place, resized, terms_of
from pipeline.editing.walk import no_masks, source_residuals, start_of, take_step
from pipeline.engine.backbone import Offers
from pipeline.engine.blocks import blocks_of
from pipeline.engine.calls import Denoise, Denoised, Steps
from pipeline.engine.controls import Transformer
from pipeline.engine.prompts import GuidedPrompt
from pipeline.errors import EditError
from pipeline.interventions import (
    BlockAutoencoder,
    ConceptFeatures,
    GuidanceBranch,
    Intervention,
    Library,
    Target,
)
from pipeline.inversion.base import Inversion
from pipeline.recordings import Attended, Recorded, Recording, RecordingKey
from pipeline.records import EditedLatents, EditRequest, Trajectory

GUIDANCE_SCALE = 7.5


class Concepts(EditingMethod):
    """Sample, and write concepts into what the network's blocks write."""

    takes: ClassVar = frozenset({"source branch"})
    paper: ClassVar = (
        "Emergence and Evolution of Interpretable Concepts in Diffusion Models, arXiv 2504.15473 (sparse autoencoders)"
    )
    keeps_to_masks: ClassVar = False

    method: Literal["concepts"] = "concepts"
    """Writes concepts of sparse autoencoders into the network; records what its blocks write."""
    autoencoders: str = ""
    """Folder or URL of autoencoders and their dictionary, as `shardedit sae train` and `label` write it."""
    guidance_scale: float | None = Field(default=None, allow_inf_nan=False)
    """Classifier-free guidance. None: 7.5 under a target prompt; without one that of the inversion, so that an image
    without interventions returns."""
    reach: float = Field(default=0.25, ge=0, le=1)
    """How far from a step, as a share of 1000 timesteps, an autoencoder may have been trained that serves it."""
    record: Recording | None = None
    """What is recorded of every image, for training: see `shardedit sae collect`."""

    @property
    @override
    def guides(self) -> bool:
        return self.guidance_scale != 1.0

    @property
    @override
    def library(self) -> str:
        return self.autoencoders

    @property
    @override
    def records(self) -> tuple[RecordingKey, ...]:
        return () if self.record is None else tuple(self.record.all_keys())

    @property
    @override
    def records_attention(self) -> bool:
        return self.record is not None and self.record.attention

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        known = blocks_of(offers.openings)
        if not known and (self.autoencoders or self.record is not None):
            yield "concepts reads and writes the network's transformer blocks, and this model has none. Use another"
        if self.records_attention and not offers.watches:
            yield (
                "record.attention is read from maps of a quarter of the latents' side, which this model lacks. Leave "
                "it out"
            )
        for block in self.record.blocks if self.record is not None and known else ():
            if block not in known:
                yield f"record.blocks names '{block}', which the model does not have. It has: {', '.join(known)}"

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        """No intervention is allowed: the image is sampled, or comes back."""
        if request.interventions and not self.autoencoders:
            yield Problem(
                "interventions without editing.autoencoders",
                "the edit has interventions, and there is no folder of autoencoders. Set editing.autoencoders",
            )
        for number, one in enumerate(request.interventions):
            if not any(one.in_window(step, inversion.num_steps) for step in range(inversion.num_steps)):
                yield Problem(
                    "a window without a step",
                    f"intervention {number} has the window {list(one.window)}, in which none of the "
                    f"{inversion.num_steps} steps begins. Widen it, or raise inversion.num_steps",
                )
            if one.branch != "cond" and self.guidance_scale in (0.0, 1.0):
                yield Problem(
                    "the unconditional branch without guidance",
                    f"intervention {number} writes to the branch '{one.branch}', and at guidance_scale "
                    f"{self.guidance_scale:g} there is one row alone. Set another guidance_scale, or branch: cond",
                )
        yield from negative_prompt_problems(request, inversion)

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        if self.record is None:
            return
        if len(self.record.times) > inversion.num_steps:
            yield (
                f"record.times has {len(self.record.times)} times, and inversion.num_steps is {inversion.num_steps}: "
                "two would be one step. Raise num_steps"
            )
        if self.guidance_scale in (0.0, 1.0) and len(self.record.branches) > 1:
            yield (
                f"record.branches has both branches, and at guidance_scale {self.guidance_scale:g} there is one. Set "
                "another, or record one"
            )

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        if user_mask is not None:
            raise_first(self.mask_problems())
        walk = yield from _Walk.begin(self, trajectory, request)
        return (yield from walk.down())


@dataclass(slots=True, eq=False)
class _Walk:
    """One edit of one image on its way down."""

    editor: Concepts
    trajectory: Trajectory
    interventions: tuple[Intervention, ...]  # that can change anything
    prompt: GuidedPrompt
    residuals: Tensor | None  # (N, C, h, w): what each step of the source misses its trajectory by
    wanted: dict[int, list[RecordingKey]]  # to be recorded, by step
    recorded: list[Recorded | Attended] = field(default_factory=list)
    places: dict[int, Places] = field(default_factory=dict)  # by number of the intervention, once its window began

    @classmethod
    def begin(cls, editor: Concepts, trajectory: Trajectory, request: EditRequest) -> Steps[_Walk]:
        scale = editor.guidance_scale
        if request.target_prompt:
            prompt, against = request.target_prompt, request.negative_prompt
            scale = GUIDANCE_SCALE if scale is None else scale
        else:  # as the inversion predicted
            source = trajectory.source
            prompt, against = source.prompt, request.negative_prompt or source.negative_prompt
            scale = trajectory.source_guidance if scale is None else scale
        guided = yield from GuidedPrompt.encode(prompt, scale, against)
        residuals = None
        if trajectory.pinned and trajectory.noise_maps is None:  # whose steps would not lead back by themselves
            as_inverted = yield from GuidedPrompt.encode(
                trajectory.source_prompt, trajectory.source_guidance, trajectory.source.negative_prompt
            )
            residuals = yield from source_residuals(trajectory, as_inverted, 0)
        return cls(
            editor=editor,
            trajectory=trajectory,
            interventions=tuple(one for one in request.interventions if one.can_matter),
            prompt=guided,
            residuals=residuals,
            wanted=recorded_at(editor.record, trajectory.levels),
        )

    def down(self) -> Steps[EditedLatents]:
        """From the first step to the image."""
        trajectory = self.trajectory
        latents, previous = start_of(trajectory, 0)
        for step in range(trajectory.num_steps):
            prediction = yield from self._predict(latents, step)
            latents, previous = take_step(trajectory, step, latents, prediction, previous)
            if self.residuals is not None:
                latents = latents + self.residuals[step]
            if tell := observer():
                source = trajectory.latents[step + 1] if trajectory.pinned else None
                tell(StepRecord(step=step, latents=latents, masks=no_masks(latents), source_latents=source))
        return EditedLatents(latents=latents, masks=self._masks(latents), recorded=tuple(self.recorded))

    def _predict(self, latents: Tensor, step: int) -> Steps[Prediction]:
        """The guided prediction of one step, with what is written into it."""
        level = self.trajectory.levels[step]
        terms = yield from self._terms(latents, step)
        wishes = [Wish(self._block(key.block), key.branch) for key in self.wanted.get(step, ())]
        rows = rows_of(self.prompt)
        names, weights = words_of(self.prompt.cond) if self._watches(step) else ((), None)
        control = control_of(terms, wishes, rows, weights if names else None, MOST_WORDS if names else 0)
        if control is None:
            return (yield from self.prompt.predict(latents, level))
        texts = [self.prompt.cond if branch == "cond" else self.prompt.uncond for branch in rows]
        denoised: Denoised = yield Denoise(
            latents.expand(len(rows), *latents.shape), [level] * len(rows), texts, control=control
        )
        if wishes:
            assert denoised.seen is not None, "what is wished for is recorded"
            self._keep(step, level, denoised.seen.recorded)
        if names:
            assert denoised.seen is not None, "what is wished for is recorded"
            assert denoised.seen.watched is not None, "and so is what is watched"
            maps = denoised.seen.watched[rows.index("cond"), : len(names)].float()
            self.recorded.append(Attended(words=names, maps=maps))
        predictions = denoised.predictions
        if len(rows) == 1:
            return predictions[0]
        uncond, cond = predictions[:1], predictions[1:]
        return self.prompt.guide(uncond, cond, [level])[0]

    def _watches(self, step: int) -> bool:
        """Whether attention is recorded at a step."""
        return step in self.wanted and self.editor.records_attention

    def _block(self, name: str) -> Transformer:
        blocks = self.trajectory.source.blocks
        if name not in blocks:
            raise EditError(f"the model has no block '{name}'. It has: {', '.join(blocks) or 'none'}")
        return blocks[name]

    def _library(self) -> Library:
        return self.trajectory.source.libraries[self.editor.autoencoders]

    def _terms(self, latents: Tensor, step: int) -> Steps[list[Term]]:
        """What all interventions of a step write."""
        acting = [
            (number, one)
            for number, one in enumerate(self.interventions)
            if one.in_window(step, self.trajectory.num_steps)
        ]
        if not acting:
            return []
        level, reach = self.trajectory.levels[step], self.editor.reach * TIMESTEPS
        try:
            targets = {number: self._library().targets(one, level.timestep, reach) for number, one in acting}
            looked_for = self._looked_for([(number, one) for number, one in acting if number not in self.places], level)
        except ValueError as error:
            raise EditError(str(error)) from None
        coded = {target.entry.block for number, one in acting if one.subtract == "active" for target in targets[number]}
        written = yield from self._written(latents, level, [*coded, *looked_for.blocks])
        for number, one in acting:
            if number not in self.places:
                self.places[number] = self._located(one, looked_for, written)
        found: list[Term] = []
        for number, one in acting:
            for target in targets[number]:
                found += self._terms_at(self.places[number], one, target, written, latents)
        return found

    def _terms_at(
        self, places: Places, one: Intervention, target: Target, written: dict[str, Tensor], latents: Tensor
    ) -> list[Term]:
        entry = target.entry
        block = self._block(entry.block)
        if entry.autoencoder.size != block.channels:
            raise EditError(
                f"the autoencoder of '{entry.block}' is for {entry.autoencoder.size} channels, and the model's block "
                f"has {block.channels}. Use autoencoders of this model"
            )
        if one.subtract == "active":
            codes = {entry.block: codes_of_map(entry.autoencoder, written[entry.block])}
            places = dataclasses.replace(places, codes=codes)
        grid = (-(-latents.shape[-2] // block.factor), -(-latents.shape[-1] // block.factor))
        return terms_of(target, places, block, grid)

    def _looked_for(self, starting: Sequence[tuple[int, Intervention]], level: Level) -> _LookedFor:
        """The concepts whose places are not known yet, and what tells them."""
        names: dict[str, None] = {}
        for _, one in starting:
            if one.region == "predicted":
                names |= dict.fromkeys(one.located_by)
            if one.subtract == "predicted":
                names |= dict.fromkeys(one.add)
        reach = self.editor.reach * TIMESTEPS
        return _LookedFor({name: self._library().located(name, level.timestep, reach) for name in names})

    def _located(self, one: Intervention, looked_for: _LookedFor, written: dict[str, Tensor]) -> Places:
        """Where an intervention will act, from now on."""
        predicted = added = None
        if one.region == "predicted":
            predicted = looked_for.union(one.located_by, written)
            if not predicted.any():
                raise EditError(
                    f"{' and '.join(one.located_by)} was predicted nowhere in this image, so that the intervention "
                    "would do nothing. Give region as a box, or begin its window later"
                )
        if one.subtract == "predicted":
            added = looked_for.union(one.add, written)
        return Places(one, self.trajectory.source.placement, predicted, added)

    def _written(self, latents: Tensor, level: Level, blocks: Sequence[str]) -> Steps[dict[str, Tensor]]:
        """What blocks write under the prompt as it is, (C, h', w') each: one row, where there are any."""
        names = list(dict.fromkeys(blocks))
        if not names:
            return {}
        control = control_of([], [Wish(self._block(name), "cond") for name in names], ["cond"])
        denoised: Denoised = yield Denoise(latents[None], [level], [self.prompt.cond], control=control)
        assert denoised.seen is not None, "what is wished for is recorded"
        return dict(zip(names, denoised.seen.recorded, strict=True))

    def _keep(self, step: int, level: Level, written: Sequence[Tensor]) -> None:
        """Keep what was recorded, at places that the image's own noise draws."""
        assert self.editor.record is not None, "somebody asked for it"
        for key, one in zip(self.wanted[step], written, strict=True):
            positions, source = self.editor.record.positions, self.trajectory.source
            self.recorded.append(kept(one, key, step, level, positions, source))

    def _masks(self, latents: Tensor) -> Tensor | None:
        """(1, h, w) bool: the union of all regions; None where one acts everywhere, or none does."""
        if not self.places or any(one.intervention.region is None for one in self.places.values()):
            return None
        size = (latents.shape[-2], latents.shape[-1])
        union = torch.zeros(size, dtype=torch.bool)
        for one in self.places.values():
            union |= one.region(size) > 0
            if one.added_predicted is not None:
                union |= resized(one.added_predicted, size) > 0
        return union[None]


@dataclass(frozen=True, slots=True)
class _LookedFor:
    """Concepts whose places are to be known, and what tells each of them."""

    told_by: dict[str, tuple[BlockAutoencoder, ConceptFeatures]]

    @property
    def blocks(self) -> list[str]:
        """That must be recorded."""
        return [entry.block for entry, _ in self.told_by.values()]

    def union(self, names: Sequence[str], written: Mapping[str, Tensor]) -> Tensor:
        """(h', w') bool, on the largest of the maps: where some concepts are."""
        found = [
            predicted_place(entry, one, written[entry.block]) for entry, one in (self.told_by[name] for name in names)
        ]
        height, width = (max(place.shape[axis] for place in found) for axis in (0, 1))
        return torch.stack([resized(place, (height, width)) > 0 for place in found]).any(dim=0)


def rows_of(prompt: GuidedPrompt) -> tuple[GuidanceBranch, ...]:
    """The rows of a guided prediction, as `GuidedPrompt` asks for them."""
    if prompt.guidance_scale == 1.0:
        return ("cond",)
    return ("uncond",) if prompt.guidance_scale == 0.0 else ("uncond", "cond")
