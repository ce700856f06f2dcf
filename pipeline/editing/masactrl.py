"""MasaCtrl (Cao et al., arXiv 2304.08465): keep the source's content, take pose and layout from the target prompt.

From a step and a decoder layer on, the target's self-attention keeps its own queries but reads the keys and values of
the source: textures come from there, places from the prompt. With masks, foreground reads foreground alone and
background reads background.

Cost: the rows of `two_branch`. Both halves of guidance read the source's, so that is 4 rows per controlled step, 3
where the source prompt is empty or its own unconditional prompt. Masks: one with `mask: auto` or `given`; else
the user's or none. Memory: nothing is kept. Masked layers compute an (N, N) mask of the map's N places, automatic masks
the 77 columns of cross-attention at a quarter of the latents' side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate
from typing_extensions import override

from pipeline.diffusion.masks import OfImage
from pipeline.editing.alignment import positions_or_words
from pipeline.editing.base import EditingMethod
from pipeline.editing.problems import (
    Problem,
    guidance_problems,
    negative_prompt_problems,
    pair_of_words_problems,
    start_problems,
    target_problems,
)
from pipeline.editing.two_branch import BranchEdit, Branches, BranchRows, two_branch
from pipeline.editing.walk import inside_of
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import Steps
from pipeline.engine.controls import (
    BACKGROUND,
    FOREGROUND,
    GROUPED,
    Control,
    GivenClasses,
    Layers,
    Part,
    Plan,
    Read,
    Reads,
    Route,
    Seen,
    Watch,
    WatchedClasses,
    resolved,
    watched_grid,
)
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, Trajectory, WordPair

FINEST_FACTOR = 2  # by default the decoder's layers of maps up to this much coarser than the latents are controlled

Keys = Literal["source", "union", "own"]
"""Whose keys and values a row reads: the source's, the source's and its own side by side, or its own."""
Index = Annotated[int, Field(ge=0)]


class MutualSelfAttention(EditingMethod):
    """What the editors of this kind share: when and where the target reads the source."""

    guidance_scale: float = Field(default=7.5, allow_inf_nan=False)
    """Classifier-free guidance of the prompts; 1: none."""
    start_step: int = Field(default=4, ge=0)
    """First controlled step, from 0; earlier ones lay the target's layout."""
    start_layer: int | None = Field(default=None, ge=0)
    """First controlled layer, from 0, by transformer block in order of execution. None: the decoder's layers of maps up
    to half as fine as the latents; in Stable Diffusion 1.x that is 10."""
    step_idx: tuple[Index, ...] | None = None
    """The controlled steps, one by one; start_step is then not read. None: start_step counts."""
    layer_idx: tuple[Index, ...] | None = None
    """The controlled layers, one by one; start_layer is then not read. None: start_layer counts."""

    takes: ClassVar = frozenset({"source branch", "unconditional prompt"})

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
        yield from guidance_problems(self.guidance_scale, inversion)
        num_steps = inversion.num_steps
        if self.step_idx is None:
            yield from start_problems(self.start_step, num_steps)
        beyond = [step for step in self.step_idx or () if step >= num_steps]
        if beyond:
            yield (
                f"step_idx names step {beyond[0]}, and the trajectory's {num_steps} steps count from 0 to "
                f"{num_steps - 1}. Take it out of editing.step_idx"
            )

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        blocks = len(offers.openings.layers)
        name = "start_layer" if self.layer_idx is None else "layer_idx"
        beyond = [layer for layer in self.layer_idx or (self.start_layer or 0,) if layer >= blocks]
        if blocks and beyond:
            yield f"{name} names layer {beyond[0]}, and the model's {blocks} count from 0 to {blocks - 1}. Lower {name}"
        elif not resolved(self.layers, offers.openings):
            yield (
                f"{self.method} reads the source's keys in self-attention layers, and this model has none that its "
                "settings name. Use editing.method ledits_pp with mask: noise, or cfg"
            )

    def controls_step(self, step: int) -> bool:
        """Whether the target reads the source at a step."""
        return step >= self.start_step if self.step_idx is None else step in self.step_idx

    @property
    def layers(self) -> Layers:
        """Where the target reads the source."""
        if self.layer_idx is not None:
            return Layers(indices=frozenset(self.layer_idx))
        if self.start_layer is not None:
            return Layers(min_index=self.start_layer)
        return Layers(place="up", max_factor=FINEST_FACTOR)


class MasaCtrl(MutualSelfAttention):
    """Change what the image's subject does, not what it looks like."""

    paper: ClassVar = "MasaCtrl: Tuning-Free Mutual Self-Attention Control, arXiv 2304.08465"

    method: Literal["masactrl"] = "masactrl"
    """MasaCtrl: the target's self-attention reads the source's keys and values."""
    keys: Literal["source", "union"] = "source"
    """Whose keys and values the target reads: the source's, or the source's beside its own (union)."""
    mask: Literal["none", "given", "auto"] = "none"
    """Separate lookups of foreground and background. auto: foreground is where blend_words attend; given: the row's own
    mask, for both branches; none: no separation."""
    thres: float = Field(default=0.1, ge=0, le=1)
    """Share of an attention map's range from which on it is foreground; read with mask auto."""
    ref_token_idx: tuple[Index, ...] | None = None
    """With mask auto, instead of blend_words: positions of the foreground's tokens in the source prompt; the start
    token is 0."""
    cur_token_idx: tuple[Index, ...] | None = None
    """With mask auto, instead of blend_words: positions of the foreground's tokens in the target prompt; the start
    token is 0."""

    @model_validator(mode="after")
    def _masks_have_one_source(self) -> MasaCtrl:
        if self.mask != "none" and self.keys == "union":
            raise ValueError(
                "masks say which of the source's places are read, and with keys: union the target reads its own, too. "
                "Set mask: none or keys: source"
            )
        return self

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        yield from super().problems(request, inversion, caption_follows=caption_follows)
        if self.mask != "auto":
            return
        words = request.blend_words or WordPair()
        if not ((self.ref_token_idx or words.source) and (self.cur_token_idx or words.target)):
            yield Problem(
                "mask: auto without blend_words",
                "mask: auto finds the foreground where words attend, and this edit names none. Add blend_words with a "
                "word of the source_prompt and one of the target_prompt, or set editing.mask: none",
            )
        read = WordPair(  # positions of tokens take the words' place
            source=() if self.ref_token_idx else words.source, target=() if self.cur_token_idx else words.target
        )
        yield from pair_of_words_problems(read, "blend word", request, caption_follows=caption_follows)

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        if self.mask == "auto" and not offers.watches:
            yield (
                "mask: auto reads where words are attended to at a quarter of the latents' side, and this model has no "
                "cross-attention there. Set editing.mask: none or given"
            )

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        """With `mask: given` the user's mask tells foreground from background, and confines nothing."""
        branches = yield from Branches.encode(trajectory, request)
        edit = MasaCtrlEdit(self, trajectory, branches, request, user_mask)
        confines = None if self.mask == "given" else user_mask
        return (yield from two_branch(trajectory, branches, edit, confines))


class MutualEdit(BranchEdit):
    """One edit of one image; `cond` and `uncond` say whose keys each half of guidance reads."""

    def __init__(
        self,
        settings: MutualSelfAttention,
        trajectory: Trajectory,
        *,
        cond: Keys,
        uncond: Keys,
        masks: Masks | None = None,
        source_guidance: float | None = None,
    ) -> None:
        super().__init__(trajectory, settings.guidance_scale, source_guidance)
        self.settings, self.cond, self.uncond, self.masks = settings, cond, uncond, masks
        self.reads_both_halves = uncond != "own"
        self.plan = plan_of(settings.layers, union="union" in (cond, uncond), masks=masks)
        self.watched = (0, 0)  # rows of source and target at the last controlled step

    @override
    def reads_attention(self, step: int) -> bool:
        return self.settings.controls_step(step) and (self.cond, self.uncond) != ("own", "own")

    @override
    def control(self, step: int, rows: BranchRows) -> Control | None:
        assert rows.source is not None  # it reads attention at this step
        readers = [Reader(rows.target, rows.source, self.cond)]
        if rows.target_uncond is not None and rows.source_uncond is not None:
            readers.append(Reader(rows.target_uncond, rows.source_uncond, self.uncond))
        self.watched = rows.source, rows.target
        height, width = self.trajectory.latents.shape[-2:]
        return mutual_attention(
            [reader for reader in readers if reader.keys != "own"],
            self.settings.layers,
            self.plan,
            masks=self.masks,
            watched=self.watched,
            size=(height, width),
        )


class MasaCtrlEdit(MutualEdit):
    """One edit of one image."""

    def __init__(
        self,
        settings: MasaCtrl,
        trajectory: Trajectory,
        branches: Branches,
        request: EditRequest,
        user_mask: Tensor | None,
    ) -> None:
        masks: Masks | None = None
        self.last_mask: Tensor | None = None
        if settings.mask == "given":
            size = trajectory.latents.shape[-2:]
            self.last_mask = None if user_mask is None else inside_of(user_mask)
            foreground = torch.ones(size, dtype=torch.bool) if self.last_mask is None else self.last_mask
            masks = GivenMasks(foreground, foreground)
        if settings.mask == "auto":
            words = request.blend_words
            masks = AutoMasks(
                torch.stack(
                    [
                        positions_or_words(
                            branches.source, settings.ref_token_idx, words.source if words else (), "ref_token_idx"
                        ),
                        positions_or_words(
                            branches.target, settings.cur_token_idx, words.target if words else (), "cur_token_idx"
                        ),
                    ]
                ),
                settings.thres,
                trajectory.source.of_image,
            )
        super().__init__(settings, trajectory, cond=settings.keys, uncond=settings.keys, masks=masks)

    @override
    def after_step(
        self, step: int, source: Tensor | None, target: Tensor, seen: Seen | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Where either branch has the foreground, the image may change."""
        if isinstance(self.masks, AutoMasks) and seen is not None and seen.watched is not None:
            found = foreground(seen.watched[list(self.watched), 0], self.masks)
            both = interpolate(found[None].float(), size=target.shape[-2:], mode="nearest")[0]
            self.last_mask = both.any(dim=0)
        return source, target, self.last_mask

    @override
    def mask(self) -> Tensor | None:
        return self.last_mask


@dataclass(frozen=True, slots=True, eq=False)
class GivenMasks:
    """Foreground of both branches, (h, w) bool each at the latents' size."""

    source: Tensor
    target: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AutoMasks:
    """Foreground of both branches where tokens attend."""

    weights: Tensor  # (2, L): 1 at the tokens of the source and of the target
    threshold: float
    of_image: OfImage

    def image(self, size: tuple[int, int]) -> Tensor:
        """(h/4, w/4) bool: which places of the watched maps of latents (h, w) show the image."""
        grid = watched_grid(*size)
        inside = torch.zeros(math.prod(grid), dtype=torch.bool)
        inside[self.of_image(torch.arange(len(inside)).view(grid)).flatten()] = True
        return inside.view(grid)


Masks = GivenMasks | AutoMasks


def foreground(fields: Tensor, masks: AutoMasks) -> Tensor:
    """(2, h', w') bool of source and target: where fields (2, h', w') reach a share of the image's range."""
    image = masks.of_image(fields)
    low, high = image.amin(dim=(1, 2), keepdim=True), image.amax(dim=(1, 2), keepdim=True)
    return (fields - low) / (high - low).clamp_min(torch.finfo(fields.dtype).tiny) >= masks.threshold


class Reader(NamedTuple):
    """A row, and the row whose keys and values it reads."""

    row: int
    source: int
    keys: Keys


def mutual_attention(
    readers: Sequence[Reader],
    layers: Layers,
    plan: Plan,
    *,
    masks: Masks | None = None,
    watched: tuple[int, int] | None = None,
    size: tuple[int, int],
) -> Control:
    """Mutual self-attention within one step (arXiv 2304.08465, section 4.1; masks: section 4.2).

    Args:
        readers: who reads whom.
        layers: where.
        plan: of all steps.
        masks: foreground reads foreground, and background reads background.
        watched: rows of source and target whose cross-attention gives automatic masks.
        size: of the latents.
    """
    classes = _classes(masks, watched, size)
    parts: list[Part] = []
    for row, source, keys in readers:
        if keys == "union":
            parts.append(Read(row=row, sources=(source, row), layers=layers))
        elif masks is not None:
            parts.append(Read(row=row, sources=(source,), layers=layers, classes=classes))
        else:
            # The target attends with its own queries to the source's keys: no map is made.
            parts.append(Route(row=row, key=source, value=source, layers=layers))
    if isinstance(masks, AutoMasks) and watched is not None:
        parts += [Watch(row, weights[None]) for row, weights in zip(watched, masks.weights, strict=True)]
    return Control(tuple(parts), plan)


def _classes(
    masks: Masks | None, watched: tuple[int, int] | None, size: tuple[int, int]
) -> GivenClasses | WatchedClasses | None:
    if isinstance(masks, GivenMasks):
        target, source = (torch.where(mask, FOREGROUND, BACKGROUND) for mask in (masks.target, masks.source))
        return GivenClasses(own=target, theirs=source[None])
    if masks is None or watched is None:
        return None
    source_row, target_row = watched
    return WatchedClasses(own=target_row, theirs=source_row, threshold=masks.threshold, image=masks.image(size))


def plan_of(layers: Layers, *, union: bool, masks: Masks | None) -> Plan:
    """What all steps of an edit need room for: either half of guidance may read."""
    if masks is not None:
        told_by: Literal["given", "watched"] = "given" if isinstance(masks, GivenMasks) else "watched"
        return Plan(sums=1 if told_by == "watched" else 0, reads=(Reads(layers=layers, slots=2, classes=told_by),))
    return Plan(routes=True, reads=(Reads(layers=layers, slots=2, sources=2),)) if union else GROUPED
