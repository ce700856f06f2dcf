"""Prompt-to-Prompt (Hertz et al., arXiv 2208.01626): keep the source's attention maps, change the words.

Early in the walk the target's cross-attention takes over the source's maps, token by token as the prompts align, and
its self-attention the source's at coarse resolution; with blend words, everything outside of where these attend stays
the source (LocalBlend).

Cost: the rows of `two_branch`; the source's rows end with the last window unless there are blend words. Masks: one,
with blend words; else the user's or none. Memory: no attention map is made, but with blend words those of the 77
columns of cross-attention at a quarter of the latents' side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d
from typing_extensions import override

from pipeline.diffusion.masks import OfImage, everything
from pipeline.editing.alignment import (
    equalizer_weights,
    refinement_mapper,
    replacement_mapper,
    token_weights,
    word_schedule,
)
from pipeline.editing.base import EditingMethod
from pipeline.editing.problems import (
    Problem,
    guidance_problems,
    negative_prompt_problems,
    overlap_problems,
    pair_of_words_problems,
    pairs_without_words_problems,
    target_problems,
    window_problems,
    word_count_problems,
    word_problems,
)
from pipeline.editing.two_branch import BranchEdit, Branches, BranchRows, two_branch
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import Conditioning, Steps
from pipeline.engine.controls import Control, Layers, Mix, Part, Route, Seen, Watch
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, Trajectory, Window

COARSE = Layers(min_factor=2)  # where self-attention is replaced: in maps at most half as fine as the latents


class PromptToPrompt(EditingMethod):
    """Edit by the difference between the source prompt and the target prompt."""

    takes: ClassVar = frozenset({"source branch", "unconditional prompt"})
    paper: ClassVar = "Prompt-to-Prompt Image Editing with Cross-Attention Control, arXiv 2208.01626"

    method: Literal["prompt_to_prompt"] = "prompt_to_prompt"
    """Prompt-to-Prompt: the target's attention maps are overwritten by the source's."""
    guidance_scale: float = Field(default=7.5, allow_inf_nan=False)
    """Classifier-free guidance of both prompts; 1: none."""
    kind: Literal["refine", "replace", "reweight"] = "refine"
    """How target tokens find their source tokens. refine: any two prompts, by alignment; replace: word by word, for
    prompts of as many words; reweight: the prompts' tokens as they stand, for an equalizer alone."""
    cross_replace_steps: Window = (0.0, 0.4)
    """When cross-attention maps are overwritten: from and to, as shares of the steps. An edit may say more by word."""
    self_replace_steps: Window = (0.0, 0.6)
    """When self-attention maps are overwritten: from and to, as shares of the steps."""
    start_blend: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps before LocalBlend begins; read with blend_words."""
    blend_threshold: float = Field(default=0.3, ge=0, le=1)
    """Share of its maximum from which on the attention of blend_words is inside; higher: smaller regions."""
    subtract_threshold: float = Field(default=0.3, ge=0, le=1)
    """Share of its maximum from which on the attention of subtract_words is left out; higher: smaller regions."""
    aligned_tail: bool = False
    """With kind replace: keep words behind a change of token count together; the published code does not."""

    @property
    @override
    def guides(self) -> bool:
        return self.guidance_scale != 1.0

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        if not offers.openings.layers:
            yield (
                f"{self.method} replaces cross-attention maps, and this model has no cross-attention. Use "
                "editing.method ledits_pp with mask: noise, or cfg"
            )

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        yield from target_problems(self.method, request)
        yield from negative_prompt_problems(request, inversion)
        has_source = bool(request.source_prompt) or caption_follows
        if not has_source and self.kind != "refine":
            yield Problem(
                f"kind: {self.kind} without a source_prompt",
                f"kind: {self.kind} needs a source_prompt, and this edit has none. Add source_prompt",
            )
        if self.kind == "replace" and request.source_prompt and request.target_prompt:
            yield from word_count_problems(request.source_prompt, request.target_prompt)
        yield from self._blend_problems(request, inversion, caption_follows=caption_follows)
        yield from word_problems(request.equalizer, "equalizer word", request.target_prompt, "target")
        yield from overlap_problems(request.equalizer, "equalizer word", request.target_prompt)
        windows = request.cross_replace_steps
        yield from word_problems(windows, "cross_replace_steps word", request.target_prompt, "target")
        yield from overlap_problems(windows, "cross_replace_steps word", request.target_prompt)
        for word, window in windows.items():
            for text in window_problems(f"cross_replace_steps of '{word}'", window, inversion):
                yield Problem(f"cross_replace_steps of '{word}' never act", text)

    def _blend_problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool
    ) -> Iterator[Problem]:
        for what, words in (("blend", request.blend_words), ("subtract", request.subtract_words)):
            yield from pair_of_words_problems(words, f"{what} word", request, caption_follows=caption_follows)
        yield from pairs_without_words_problems(request)
        if request.blend_words is not None and int(self.start_blend * inversion.schedule_steps) >= inversion.num_steps:
            yield Problem(
                "start_blend beyond the steps that are walked",
                f"start_blend {self.start_blend:g} of {inversion.schedule_steps} steps leaves none of the "
                f"{inversion.num_steps} that are walked: the blend_words would never act. Lower editing.start_blend",
            )

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        yield from guidance_problems(self.guidance_scale, inversion)
        yield from window_problems("cross_replace_steps", self.cross_replace_steps, inversion)
        yield from window_problems("self_replace_steps", self.self_replace_steps, inversion)

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        branches = yield from Branches.encode(trajectory, request)
        edit = self.begin(trajectory, branches, request)
        return (yield from two_branch(trajectory, branches, edit, user_mask))

    def begin(self, trajectory: Trajectory, branches: Branches, request: EditRequest) -> BranchEdit:
        """Everything that can be known before the first step.

        Raises:
            PrepareError: a word is not in its prompt, or the prompts cannot be aligned.
        """
        return PromptToPromptEdit(self, trajectory, branches, request)


class PromptToPromptEdit(BranchEdit):
    """One edit of one image."""

    def __init__(
        self, settings: PromptToPrompt, trajectory: Trajectory, branches: Branches, request: EditRequest
    ) -> None:
        super().__init__(trajectory, settings.guidance_scale)
        self.settings = settings
        source, target, total = branches.source, branches.target, trajectory.total_steps
        # Windows are shares of the whole schedule, counted from the first step that is walked.
        self.schedule = word_schedule(target, total, settings.cross_replace_steps, request.cross_replace_steps)
        self.self_steps = range(*(int(total * share) for share in settings.self_replace_steps))
        self.mapper, self.keep = mapper_of(settings.kind, source, target, aligned_tail=settings.aligned_tail)
        self.factors = equalizer_weights(target, request.equalizer)
        self.blend = self._selectors(branches, request, "blend")
        self.subtract = self._selectors(branches, request, "subtract")
        self.first_blend_step = int(settings.start_blend * total)
        self.fields: Tensor | None = None  # (2 or 4, h', w') sums over steps: source and target, blend and subtract
        self.last_mask: Tensor | None = None

    def _selectors(self, branches: Branches, request: EditRequest, which: str) -> Tensor | None:
        words = request.blend_words if which == "blend" else request.subtract_words
        if words is None:
            return None
        return torch.stack(
            [
                token_weights(branches.source, words.source, f"{which} word"),
                token_weights(branches.target, words.target, f"{which} word"),
            ]
        )

    @property
    def selectors(self) -> Tensor | None:
        """(2 or 4, L) tokens whose maps are collected: source and target of blend, then of subtract words."""
        if self.blend is None:
            return None
        return self.blend if self.subtract is None else torch.cat([self.blend, self.subtract])

    @override
    def reads_attention(self, step: int) -> bool:
        return bool(self.schedule[step].any()) or step in self.self_steps or self.blend is not None

    @override
    def reads_latents(self, step: int) -> bool:
        return self.blend is not None and step + 1 > self.first_blend_step

    @override
    def control(self, step: int, rows: BranchRows) -> Control | None:
        assert rows.source is not None  # it reads attention at this step
        return attention_replacement(
            rows.source,
            rows.target,
            mapper=self.mapper,
            keep=self.keep,
            factors=self.factors,
            active=self.schedule[step],
            replaces_self=step in self.self_steps,
            selectors=self.selectors,
        )

    @override
    def after_step(
        self, step: int, source: Tensor | None, target: Tensor, seen: Seen | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """LocalBlend."""
        if self.blend is None:
            return source, target, None
        assert seen is not None
        assert seen.watched is not None
        fields = seen.watched.sum(dim=0)  # every sum is of one row, or of both
        self.fields = fields if self.fields is None else self.fields + fields
        if step + 1 <= self.first_blend_step:
            return source, target, torch.ones(target.shape[-2:], dtype=torch.bool)
        assert source is not None
        self.last_mask = self._mask((target.shape[-2], target.shape[-1]))
        return source, torch.where(self.last_mask, target, source), self.last_mask

    def _mask(self, size: tuple[int, int]) -> Tensor:
        assert self.fields is not None
        of_image = self.trajectory.source.of_image
        inside = local_blend_mask(self.fields[:2], self.settings.blend_threshold, size, of_image, dilate=True)
        mask = inside[0] | inside[1]
        if self.subtract is not None:
            taken = local_blend_mask(self.fields[2:], self.settings.subtract_threshold, size, of_image, dilate=False)
            mask = mask & ~(taken[0] | taken[1])
        return mask

    @override
    def mask(self) -> Tensor | None:
        return self.last_mask


def mapper_of(
    kind: Literal["refine", "replace", "reweight"],
    source: Conditioning,
    target: Conditioning,
    *,
    aligned_tail: bool = False,
) -> tuple[Tensor, Tensor]:
    """Source tokens in target tokens' maps, (L, L), and (L,): 0 where a target token keeps its own map.

    Raises:
        PrepareError: `replace` with prompts of different numbers of words.
    """
    length = target.length
    if kind == "replace":
        return replacement_mapper(source, target, aligned_tail=aligned_tail), torch.ones(length)
    if kind == "reweight":
        return torch.eye(length), torch.ones(length)
    index, keep = refinement_mapper(source, target)
    mapper = torch.zeros((length, length))
    mapper[index, torch.arange(length)] = keep
    return mapper, keep


def local_blend_mask(
    fields: Tensor, threshold: float, size: tuple[int, int], of_image: OfImage = everything, *, dilate: bool
) -> Tensor:
    """(B, h, w) bool: where fields (B, h', w') exceed a share of the image's maximum; nowhere if that is zero."""
    highest = of_image(fields).amax(dim=(1, 2), keepdim=True)  # dilation leaves it as it is
    if dilate:
        fields = max_pool2d(fields[:, None], 3, stride=1, padding=1)[:, 0]
    fields = interpolate(fields[:, None], size=size, mode="nearest")[:, 0]
    return (fields / highest > threshold) & (highest > 0)


def attention_replacement(
    source: int,
    target: int,
    *,
    mapper: Tensor,
    keep: Tensor,
    factors: Tensor,
    active: Tensor,
    replaces_self: bool,
    selectors: Tensor | None,
) -> Control:
    """What Prompt-to-Prompt does to a target row within one step (arXiv 2208.01626, section 3).

    Args:
        source: the row that is read.
        target: the row that changes.
        mapper: (L, L), source tokens in target tokens' maps.
        keep: (L,), 0 where a target token keeps its own map.
        factors: (L,) of the equalizer.
        active: (L,), 1 where a token's map is overwritten at this step.
        replaces_self: whether self-attention is overwritten, too.
        selectors: (S, L) tokens whose maps are collected, of source and target in turn. The S fields are the sums of
            what both rows watch: the target's map is made of the source's and its own.
    """
    take, own = folded(mapper, keep, factors, active)
    parts = replacing_parts(source, target, take, own, mixes=bool(active.any()), replaces_self=replaces_self)
    if selectors is not None:
        of_source, of_target = selectors.double()[0::2], selectors.double()[1::2]
        watched_at_source = torch.stack([of_source, of_target @ take.T], dim=1).flatten(0, 1)
        watched_at_target = torch.stack([torch.zeros_like(of_target), of_target * own], dim=1).flatten(0, 1)
        parts += [Watch(source, watched_at_source), Watch(target, watched_at_target)]
    return Control(tuple(parts))


def folded(mapper: Tensor, keep: Tensor, factors: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """A target's map is `source's @ take + own * keep` with these (L, L) and (L,): see `attention_replacement`."""
    shares = factors.double() * active  # the float64 networks of golden replays see the folding's rounding
    return mapper * shares, (1 - keep) * shares + (1 - active)


def replacing_parts(
    source: int, target: int, take: Tensor, own: Tensor, *, mixes: bool, replaces_self: bool, layers: Layers = COARSE
) -> list[Part]:
    """How a target row's attention is overwritten; `layers`: in which of its self-attention."""
    parts: list[Part] = []
    if mixes:
        parts.append(Mix(row=target, source=source, take=take, keep=own))
    if replaces_self:
        # Self-attention maps are replaced by attending with the source's queries and keys: no map is made.
        parts.append(Route(row=target, query=source, key=source, layers=layers))
    return parts
