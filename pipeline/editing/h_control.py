"""Prompt-to-Prompt's attention in h-Edit (arXiv 2503.02187): any number of target rows that read one source row.

The windows are shares of the steps that are walked, unlike Prompt-to-Prompt's own, and the maps of local blending are
summed once per step, in the last of its inner steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from pipeline.editing.alignment import equalizer_weights, token_weights, word_schedule
from pipeline.editing.problems import places_of
from pipeline.editing.prompt_to_prompt import folded, local_blend_mask, mapper_of, replacing_parts
from pipeline.engine.calls import Conditioning
from pipeline.engine.controls import Control, Layers, Part, Plan, Seen, Watch
from pipeline.records import EditRequest, Trajectory

T = TypeVar("T")

if TYPE_CHECKING:
    from pipeline.editing.h_edit import HEdit


class TargetAttention:
    """What is known before the first step: token maps, windows, words. It holds no state but the fields of the blend.

    Args:
        settings: of the editor.
        trajectory: that is walked.
        source: the source prompt.
        targets: K prompts, whose rows read the source's.
        request: for its words; each counts in every target prompt that has it.

    Raises:
        PrepareError: a word is in none of its prompts, or prompts cannot be aligned.
    """

    def __init__(
        self,
        settings: HEdit,
        trajectory: Trajectory,
        source: Conditioning,
        targets: Sequence[Conditioning],
        request: EditRequest,
    ) -> None:
        self.settings, self.of_image = settings, trajectory.source.of_image
        steps = trajectory.num_steps
        self.mappers = [
            mapper_of(settings.kind, source, target, aligned_tail=settings.aligned_tail) for target in targets
        ]
        self.schedules = [
            word_schedule(target, steps, settings.cross_replace_steps, _of(target, request.cross_replace_steps))
            for target in targets
        ]
        self.self_steps = range(*(int(steps * share) for share in settings.self_replace_steps))
        self.factors = [equalizer_weights(target, _of(target, request.equalizer)) for target in targets]
        self.first_blend_step = int(settings.start_blend * steps)
        self.blend = self._selectors(source, targets, request, "blend")
        self.subtract = self._selectors(source, targets, request, "subtract")
        self.fields: Tensor | None = None  # (S, h', w') sums over steps

    def _selectors(
        self, source: Conditioning, targets: Sequence[Conditioning], request: EditRequest, which: str
    ) -> Tensor | None:
        """(1 + K, L): the tokens of the source and of every target."""
        words = request.blend_words if which == "blend" else request.subtract_words
        if words is None:
            return None
        of_targets = [
            token_weights(target, tuple(word for word in words.target if places_of(word, target.prompt)), which)
            for target in targets
        ]
        return torch.stack([token_weights(source, words.source, f"{which} word"), *of_targets]).double()

    @property
    def selectors(self) -> Tensor | None:
        """(S, L): those of the blend's words, then those of the words that are taken out; S is 1 + K or twice that."""
        if self.blend is None or self.subtract is None:
            return self.blend
        return torch.cat([self.blend, self.subtract])

    def reads(self, step: int) -> bool:
        """Whether the targets' rows, or a mask, read the source's row at a step."""
        mixes = any(bool(schedule[step].any()) for schedule in self.schedules)
        return mixes or step in self.self_steps or self.blend is not None

    def control(self, step: int, source: int, targets: Mapping[int, int]) -> Control:
        """What the rows of one call do to each other.

        Args:
            step: which one.
            source: place of the source's row.
            targets: place of each target's row, by its number.
        """
        count, selectors = len(self.mappers), self.selectors
        layers = Layers(min_factor=self.settings.self_replace_factor)
        at_source = None if selectors is None else selectors.clone()
        parts: list[Part] = []
        for number, row in targets.items():
            mapper, keep = self.mappers[number]
            active = self.schedules[number][step]
            take, own = folded(mapper, keep, self.factors[number], active)
            parts += replacing_parts(
                source,
                row,
                take,
                own,
                mixes=bool(active.any()),
                replaces_self=step in self.self_steps,
                layers=layers,
            )
            if selectors is not None and at_source is not None:
                # A target's map is made of the source's and its own; so is what is summed of it.
                places = torch.arange(1 + number, len(selectors), 1 + count)
                at_target = torch.zeros_like(selectors)
                at_target[places] = selectors[places] * own
                at_source[places] = selectors[places] @ take.T
                parts.append(Watch(row, at_target))
        if at_source is not None:
            parts.append(Watch(source, at_source))
        sums = max(4, 2 * (1 + count))
        return Control(tuple(parts), Plan(sums=sums, routes=True, mixes=count))

    def see(self, seen: Seen | None) -> None:
        """Add what was watched in the last call of a step."""
        if self.blend is None or seen is None or seen.watched is None or self.selectors is None:
            return
        fields = seen.watched.sum(dim=0)[: len(self.selectors)]
        self.fields = fields if self.fields is None else self.fields + fields

    def blend_mask(self, step: int, size: tuple[int, int]) -> Tensor | None:
        """(h, w) bool: what may differ from the source after a step; None: everything."""
        if self.blend is None or self.fields is None or step < self.first_blend_step:
            return None
        count = len(self.blend)
        inside = local_blend_mask(
            self.fields[:count], self.settings.blend_threshold, size, self.of_image, dilate=True
        ).any(dim=0)
        if self.subtract is None:
            return inside
        threshold = self.settings.subtract_threshold
        return inside & ~local_blend_mask(self.fields[count:], threshold, size, self.of_image, dilate=False).any(dim=0)


def _of(target: Conditioning, given: Mapping[str, T]) -> dict[str, T]:
    """What is said of words that a target prompt has."""
    return {word: value for word, value in given.items() if places_of(word, target.prompt)}
