"""What h-Edit cannot serve, as settings and words tell: see `problems.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.editing.problems import (
    Problem,
    missing_word,
    overlap_problems,
    pairs_without_words_problems,
    places_of,
    window_problems,
    word_count_problems,
    word_problems,
)
from pipeline.inversion.base import Inversion
from pipeline.records import EditRequest

if TYPE_CHECKING:
    from pipeline.editing.h_edit import HEdit


def of_experts(settings: HEdit, request: EditRequest) -> Iterator[Problem]:
    """An edit needs something to go towards."""
    if not (request.target_prompt or request.experts or request.rewards):
        yield Problem(
            "neither text nor reward",
            "h_edit goes towards texts and rewards, and this edit has none. Add target_prompt, experts or rewards",
        )
    if not settings.texts_of(request):
        for reward in request.rewards:
            if reward.step == "direction":
                yield Problem(
                    f"reward {reward.method} with step: direction, without a text",
                    f"reward {reward.method} has step: direction, multiples of the text direction's size, and this "
                    "edit has no text that acts. Set the reward's step: loss, or add target_prompt",
                )


def of_rewards(settings: HEdit, request: EditRequest) -> Iterator[Problem]:
    """Rewards whose network or picture the recipe does not name."""
    for reward in request.rewards:
        if reward.learned and reward.learned not in settings.weights:
            yield Problem(
                f"reward {reward.method} without weights",
                f"reward {reward.method} is a network, and no weights are named for it. Name their folder in "
                f"editing.weights.{reward.learned}, or use a reward without weights",
            )
        if reward.names_reference and (name := getattr(reward, "reference", "")) not in settings.references:
            known = ", ".join(sorted(settings.references)) or "none"
            yield Problem(
                f"reward {reward.method} with an unknown reference",
                f"reward {reward.method} compares with the picture '{name}', and editing.references names: {known}. "
                "Name its file there",
            )
        start, stop = reward.steps
        if stop <= start:
            yield Problem(
                f"reward {reward.method} that never acts",
                f"reward {reward.method} acts from step share {start:g} to {stop:g}, which is never. Write the smaller "
                "share first",
            )
        if reward.reads_mask and settings.user_mask == "bounds":
            yield Problem(
                f"reward {reward.method} under a mask that bounds the edit",
                f"reward {reward.method} pulls outside the row's mask, where editing.user_mask: bounds lets nothing "
                "change. Set editing.user_mask: rewards",
            )


def of_words(
    settings: HEdit, request: EditRequest, inversion: Inversion, *, caption_follows: bool
) -> Iterator[Problem]:
    """Words and windows of attention control."""
    targets = [text.prompt for text in settings.texts_of(request)]
    has_words = bool(request.blend_words or request.subtract_words or request.equalizer or request.cross_replace_steps)
    if settings.control == "none" or not targets:
        if has_words:
            yield Problem(
                "words without attention control",
                "blend_words, subtract_words, equalizer and cross_replace_steps act on the attention of texts, which "
                "this edit does not control. Set editing.control: prompt_to_prompt and give a text, or leave them out",
            )
        return
    yield from _of_kind(settings, request, targets, caption_follows=caption_follows)
    yield from _of_blend(settings, request, inversion, targets, caption_follows=caption_follows)
    named = (("equalizer word", request.equalizer), ("cross_replace_steps word", request.cross_replace_steps))
    for what, words in named:
        yield from words_in_some(list(words), what, targets)
        for target in targets:
            yield from overlap_problems([word for word in words if places_of(word, target)], what, target)
    for word, window in request.cross_replace_steps.items():
        for text in window_problems(f"cross_replace_steps of '{word}'", window, inversion, of_walked=True):
            yield Problem(f"cross_replace_steps of '{word}' never act", text)


def _of_kind(settings: HEdit, request: EditRequest, targets: list[str], *, caption_follows: bool) -> Iterator[Problem]:
    if settings.kind != "refine" and not (request.source_prompt or caption_follows):
        yield Problem(
            f"kind: {settings.kind} without a source_prompt",
            f"kind: {settings.kind} needs a source_prompt, and this edit has none. Add source_prompt",
        )
    if settings.kind == "replace" and request.source_prompt:
        for target in targets:
            yield from word_count_problems(request.source_prompt, target)


def _of_blend(
    settings: HEdit, request: EditRequest, inversion: Inversion, targets: list[str], *, caption_follows: bool
) -> Iterator[Problem]:
    for what, words in (("blend", request.blend_words), ("subtract", request.subtract_words)):
        if words is None:
            continue
        if not caption_follows:
            yield from word_problems(words.source, f"{what} word", request.source_prompt, "source")
        yield from words_in_some(list(words.target), f"{what} word", targets)
    yield from pairs_without_words_problems(request)
    if request.blend_words is None:
        return
    if settings.mask != "none":
        yield Problem(
            f"blend_words with mask: {settings.mask}",
            f"blend_words and editing.mask: {settings.mask} both say where the image may change. Leave one out",
        )
    if int(settings.start_blend * inversion.num_steps) >= inversion.num_steps:
        yield Problem(
            "start_blend beyond the steps that are walked",
            f"start_blend {settings.start_blend:g} leaves none of the {inversion.num_steps} steps: the blend_words "
            "would never act. Lower editing.start_blend",
        )


def words_in_some(words: list[str], what: str, targets: list[str]) -> Iterator[Problem]:
    """Words that none of the target prompts has."""
    for word in words:
        if not any(places_of(word, target) for target in targets):
            yield Problem(
                f"{what} '{word}' is not in the target prompt", missing_word(word, what, "' or '".join(targets)), word
            )
