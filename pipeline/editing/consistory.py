"""ConsiStory (Tewel et al., arXiv 2402.03286): one subject, the same in many scenes, without training.

A set has anchors and scenes. In the decoder's self-attention every image reads, beside itself, the subject's places of
the anchors; queries of plain sampling, mixed in at first, keep the layouts various; a second pass blends places of the
subject with those of the anchors that they correspond to. Anchors are generated, or the row's own image along its
trajectory. Scenes are the edits of one image: those of equal `subject` share the anchors' rows.

Cost: for A anchors and K = scenes_per_call scenes 2 (A + K) network rows a step, twice as many in the first tenth of
the steps, and all of it twice: 224 (A + K) rows for K scenes at 50 steps. The anchors are computed anew for every K
scenes: a cache of what they show is gigabytes. Exactness: none of the image's is kept; an anchor that is an image stays
what it is. Memory: two latents per image. Masks: the subject's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot
from typing_extensions import override

from pipeline.diffusion.levels import Level
from pipeline.editing.alignment import word_positions
from pipeline.editing.base import EditingMethod
from pipeline.editing.consistory_group import SUMS, Group, SetImage
from pipeline.editing.problems import Problem, missing_word, places_of, raise_first, target_problems
from pipeline.editing.sharing import strengths
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import EncodeText, Fork, Steps
from pipeline.engine.controls import FreeU, Layers, Where, resolved
from pipeline.errors import PrepareError
from pipeline.inversion import INVERSIONS
from pipeline.inversion.base import Inversion
from pipeline.records import DrawNoise, EditedLatents, EditRequest, Trajectory, Window
from pipeline.subjects import Subject

Draws = Callable[[str], DrawNoise]
Index = Annotated[int, Field(ge=0)]
Factor = Literal[1, 2, 4, 8]
Strength = Annotated[float, Field(ge=0, le=1)]
NEARLY = 1e-9  # what a share of a number of steps may lack of a whole one by rounding
NO_SUBJECT = Problem(
    "no subject", "consistory keeps a subject the same, and this edit names none. Add subject with words that name it"
)


class ConsiStory(EditingMethod):
    """Scenes of one subject, which looks like its anchors in all of them."""

    needs: ClassVar = frozenset({"DDIM steps"})
    paper: ClassVar = "Training-Free Consistent Text-to-Image Generation, arXiv 2402.03286"
    keeps_to_masks: ClassVar = False
    shows_input: ClassVar = False

    method: Literal["consistory"] = "consistory"
    """ConsiStory: one subject in many scenes."""
    guidance_scale: float = Field(default=5.0, allow_inf_nan=False)
    """Classifier-free guidance of the prompts; 1: none."""
    scenes_per_call: int = Field(default=2, ge=1, le=64)
    """K: scenes that share the anchors' rows. 4 (anchors + K) rows must fit into a network call (run.call_size). It is
    part of what bits depend on."""
    mask: Literal["subject", "background"] = "subject"
    """Where the subject is: where its words are attended to, or where subject.background's are not."""
    mask_layers: tuple[Index, ...] | None = None
    """Transformer blocks whose cross-attention tells, by their number in order of execution, all of one size of map.
    None: those at a quarter of the latents' side, but for the middle one's."""
    mask_threshold: Literal["attention", "logarithm"] = "attention"
    """Of what the two groups are parted, where words are attended to and where not; logarithm: for a small model, whose
    attention is nearly all on the padding behind the prompt."""
    mask_steps: int = Field(default=20, ge=1)
    """The latest steps whose attention is averaged."""
    mask_dropout: float = Field(default=0.5, ge=0, le=1)
    """Share of the subject's places that others may not read, drawn anew at each step; less is more alike, with less
    varied poses."""
    dropout_steps: int | None = Field(default=None, ge=0)
    """Steps from the start in which there is dropout; none: all."""
    share: Literal["up", "all", "none"] = "up"
    """Self-attention layers in which images read the anchors: the decoder's, all, or none."""
    anchor_weight: float = Field(default=1.0, gt=0, le=64)
    """How many times an anchor's place counts beside an image's own. Above 1 few anchors outweigh what the image would
    be by itself, as many would, and cost no row. 1 is the paper's."""
    outline_factor: Factor | None = None
    """In shared layers whose maps are so much coarser than the latents or more, one place around an anchor's subject is
    read, too. A subject's places alone show where it is, never where it ends. None is the paper's: nowhere."""
    first_shared_step: int = Field(default=1, ge=1)
    """First step in which they do, from 0: before it there are no masks."""
    query_strength: tuple[Strength, Strength] | None = (0.9, 0.81836735)
    """Share of plain sampling's queries, at the first and at the last step of their window; none: no mixing, and no
    rows for it."""
    query_steps: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps, from the first one on, up to which queries are mixed, that step included."""
    injection_strength: float = Field(default=0.8, ge=0, le=1)
    """Share that a place takes of its match in an anchor; 0: no second pass."""
    injection_steps: Window = (0.1, 1 / 3)
    """Steps in which places do, as shares of their number, both ends included."""
    injection_factor: Factor = 2
    """Latents' side over that of the maps in which they do: 2 is 64 x 64 of Stable Diffusion XL at 1024 pixels."""
    feature_timestep: int = Field(default=261, ge=0, le=999)
    """Timestep whose features tell which places correspond; the step nearest to it."""
    feature_factor: Literal[1, 2, 4] = 2
    """Latents' side over that of these features: those of the decoder block that puts them out."""
    free_u: tuple[float, float, float, float] | None = (0.6, 0.4, 1.1, 1.2)
    """s1, s2, b1, b2 of FreeU, with which the published code samples; none: without."""

    @property
    @override
    def guides(self) -> bool:
        return self.guidance_scale != 1.0

    @property
    def shares(self) -> bool:
        """Whether images read each other at all."""
        return self.share != "none"

    @property
    def injects(self) -> bool:
        """Whether there is a second pass."""
        return self.injection_strength > 0

    @property
    def decoder_factors(self) -> FreeU | None:
        """Of FreeU."""
        return None if self.free_u is None else FreeU(*self.free_u)

    @property
    def feature_block(self) -> Where:
        """What puts out the features of correspondence."""
        return "decoder", self.feature_factor

    @property
    def mixing_layers(self) -> Layers:
        """Where queries are mixed: where images read each other."""
        return Layers(place="up" if self.share == "up" else None)

    @property
    def injection_layers(self) -> Layers:
        """Where features are injected: encoder and decoder."""
        return Layers(min_factor=self.injection_factor, max_factor=self.injection_factor)

    def shared_layers(self, factor: int) -> Layers:
        """Where images read each other, among the layers of one size of map."""
        return Layers(place="up" if self.share == "up" else None, min_factor=factor, max_factor=factor)

    def outlines(self, factor: int) -> bool:
        """Whether what lies around a subject is read, in layers of one size of map."""
        return self.outline_factor is not None and factor >= self.outline_factor

    def query_strengths(self, num_steps: int) -> Mapping[int, float]:
        """Share of plain sampling's queries, by step. Where nobody reads anybody the two are the same."""
        if self.query_strength is None or not self.shares:
            return {}
        count = math.floor(self.query_steps * num_steps + NEARLY) + 1
        found = dict(enumerate(strengths(self.query_strength, count)))
        steps = range(self.first_shared_step, num_steps)
        return {step: share for step, share in found.items() if step in steps and share > 0}

    def injection_range(self, num_steps: int) -> range:
        """Steps in which features are injected."""
        first, last = (math.floor(share * num_steps + NEARLY) for share in self.injection_steps)
        return range(first, min(last + 1, num_steps))

    def feature_step(self, levels: Sequence[Level]) -> int:
        """Step whose features tell correspondence; of two as near the noisier one."""
        return min(range(len(levels)), key=lambda step: abs(levels[step].timestep - self.feature_timestep))

    def dropout_at(self, step: int) -> float:
        """Share of the subject's places that others may not read in a step."""
        return self.mask_dropout if self.dropout_steps is None or step < self.dropout_steps else 0.0

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        openings = offers.openings
        blocks = len(openings.layers)
        beyond = [layer for layer in self.mask_layers or () if layer >= blocks]
        if blocks and beyond:
            yield (
                f"mask_layers names layer {beyond[0]}, and the model's {blocks} count from 0 to {blocks - 1}. Lower it"
            )
        elif len({layer.factor for layer in openings.layers if layer.index in (self.mask_layers or ())}) > 1:
            yield "mask_layers names layers whose maps differ in size. Name layers of one size"
        if self.mask_layers is None and not offers.watches:
            yield (
                "consistory finds the subject where words are attended to at a quarter of the latents' side, and this "
                "model has no cross-attention there. Set editing.mask_layers to layers that it has"
            )
        if self.shares and not any(resolved(self.shared_layers(factor), openings) for factor in (1, 2, 4, 8)):
            yield "consistory shares keys of self-attention layers, and this model has none. Use another editing.method"
        if self.injects and openings.recordable(self.feature_block) is None:
            yield (
                f"consistory finds correspondences by features at 1/{self.feature_factor} of the latents' side, which "
                "this model's decoder does not put out. Set editing.feature_factor, or editing.injection_strength: 0"
            )

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        if self.shares and self.first_shared_step >= inversion.num_steps:
            yield (
                f"first_shared_step {self.first_shared_step} leaves none of the {inversion.num_steps} steps, which "
                f"count from 0 to {inversion.num_steps - 1}. Lower it, or set editing.share: none"
            )
        if skipped := inversion.schedule_steps - inversion.num_steps:
            yield (
                f"the inversion leaves out {skipped} steps at the noisy end, and scenes begin with noise alone. Set "
                "inversion.skip_steps: 0"
            )

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        yield from target_problems(self.method, request)
        subject = request.subject
        if subject is None:
            yield NO_SUBJECT
            return
        has_image = "path" in inversion.provides
        if not has_image and not subject.anchor_prompts:
            yield Problem(
                "a set without anchors",
                "the set has no anchors: subject.anchor_prompts is empty, and inversion.method "
                f"'{inversion.method}' shows no image. Give anchor_prompts, or an image and inversion.method ddim",
            )
        anchors = has_image + len(subject.anchor_prompts)
        if subject.anchor is not None and subject.anchor >= anchors:
            yield Problem(
                "an anchor that there is not",
                f"subject.anchor is {subject.anchor}, and the set's {anchors} anchors count from 0",
            )
        if self.mask == "background" and not subject.background:
            yield Problem(
                "mask: background without subject.background",
                "mask: background finds the subject where subject.background is not attended to, and it names no "
                "words. Add subject.background, or set editing.mask: subject",
            )
            return
        prompts = [request.source_prompt] if has_image and not caption_follows else []
        prompts += [*subject.anchor_prompts, *([request.target_prompt] if request.target_prompt else [])]
        for prompt in dict.fromkeys(prompts):
            yield from self._word_problems(subject, prompt)

    def words_of(self, subject: Subject) -> tuple[str, ...]:
        """Words whose attention tells where the subject is."""
        return subject.words if self.mask == "subject" else subject.background

    def _word_problems(self, subject: Subject, prompt: str) -> Iterator[Problem]:
        words = self.words_of(subject)
        if not any(places_of(word, prompt) for word in words):
            what = f"{self.mask} word"
            named = "' or '".join(words)
            yield Problem(f"a prompt without {what} '{named}'", missing_word(named, what, prompt), named)

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        (found,) = yield from self.edit_all(trajectory, [request], user_mask)
        if isinstance(found, Exception):
            raise found
        return found

    @override
    def edit_all(
        self, trajectory: Trajectory, requests: Sequence[EditRequest], user_mask: Tensor | None = None
    ) -> Steps[list[EditedLatents | Exception]]:
        if user_mask is not None:
            raise_first(self.mask_problems())
        sets: dict[tuple[object, ...], list[int]] = {}
        for at, request in enumerate(requests):
            subject = request.subject
            if subject is None:
                raise PrepareError(NO_SUBJECT.text)
            key = (subject.words, subject.background, subject.anchor_prompts, request.negative_prompt)
            sets.setdefault(key, []).append(at)
        made = yield Fork(tuple(self._one_set(trajectory, [requests[at] for at in places]) for places in sets.values()))
        results: dict[int, EditedLatents | Exception] = {}
        for places, found in zip(sets.values(), made, strict=True):
            results |= zip(places, [found] * len(places) if isinstance(found, Exception) else found, strict=True)
        return [results[at] for at in range(len(requests))]

    def _one_set(
        self, trajectory: Trajectory, requests: Sequence[EditRequest]
    ) -> Steps[list[EditedLatents | Exception]]:
        """Scenes and anchors of one set: the anchors with every K scenes."""
        draws = trajectory.source.draws
        assert draws is not None  # of every source that a run makes
        anchors = yield from self._anchors(trajectory, requests[0], draws)
        results: dict[int, EditedLatents | Exception] = {}
        scenes: list[tuple[int, SetImage]] = []
        for at, request in enumerate(requests):
            assert request.subject is not None
            if request.subject.anchor is not None:
                continue
            purpose = f"scene {request.subject.picture} {request.target_prompt}"
            try:
                image = yield from self._image(request.target_prompt, request, partial(draws, purpose))
            except PrepareError as error:  # a word beyond what the text encoder reads: the others go on
                results[at] = error
            else:
                scenes.append((at, image))
        asked = [(at, request.subject.anchor) for at, request in enumerate(requests) if request.subject]
        of_anchors = {at: anchor for at, anchor in asked if anchor is not None}
        count = self.scenes_per_call
        chunks = [scenes[start : start + count] for start in range(0, len(scenes), count)]
        if of_anchors and not chunks:
            chunks = [[]]
        made = yield Fork(tuple(self._group(trajectory, anchors, [image for _, image in chunk]) for chunk in chunks))
        for number, (chunk, found) in enumerate(zip(chunks, made, strict=True)):
            # Where in the group what was asked for stands; the anchors are the same in every one.
            places = {at: len(anchors) + place for place, (at, _) in enumerate(chunk)} | ({} if number else of_anchors)
            results |= {at: found if isinstance(found, Exception) else found[place] for at, place in places.items()}
        return [results[at] for at in range(len(requests))]

    def _group(
        self, trajectory: Trajectory, anchors: Sequence[SetImage], scenes: Sequence[SetImage]
    ) -> Steps[list[EditedLatents]]:
        """The anchors and K scenes; places that nobody asked for are filled with copies."""
        draws = trajectory.source.draws
        assert draws is not None
        filled = [*scenes, *[(*scenes, *anchors)[0]] * (self.scenes_per_call - len(scenes))]
        return (yield from Group(self, trajectory, (*anchors, *filled), len(anchors), draws).run())

    def _anchors(self, trajectory: Trajectory, request: EditRequest, draws: Draws) -> Steps[list[SetImage]]:
        """The row's own image where its inversion shows it, then those that are generated."""
        assert request.subject is not None
        found = []
        if "path" in INVERSIONS[trajectory.method].provides:
            noise = partial(draws, "image")  # of which nothing is drawn: it is where its trajectory is
            found.append((yield from self._image(trajectory.source_prompt, request, noise, trajectory.latents)))
        for number, prompt in enumerate(request.subject.anchor_prompts):
            found.append((yield from self._image(prompt, request, partial(draws, f"anchor {number} {prompt}"))))
        return found

    def _image(
        self, prompt: str, request: EditRequest, noise: Callable[[], DrawNoise], pinned: Tensor | None = None
    ) -> Steps[SetImage]:
        """One image of a set.

        Raises:
            PrepareError: its prompt has no word of the subject, or more tokens of them than are watched.
        """
        assert request.subject is not None
        raise_first(self._word_problems(request.subject, prompt))
        cond, uncond = yield EncodeText((prompt, request.negative_prompt))
        there = [word for word in self.words_of(request.subject) if places_of(word, prompt)]
        tokens = sorted({at for word in there for at in word_positions(cond, word, f"{self.mask} word")})
        if len(tokens) > SUMS:
            raise PrepareError(
                f"the {self.mask} words are {len(tokens)} tokens of the prompt '{prompt}', and {SUMS} are watched at "
                "most. Name fewer words"
            )
        return SetImage(
            prompt=cond,
            uncond=uncond,
            weights=one_hot(torch.tensor(tokens), cond.length).float(),
            noise=noise,
            pinned=pinned,
        )
