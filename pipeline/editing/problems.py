"""What a method cannot serve, as settings and words tell: one list for the recipe, for `plan` and for each row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

from pipeline.errors import PrepareError
from pipeline.inversion.base import Inversion
from pipeline.records import EditRequest, Window, WordPair

PUNCTUATION = ".,;:!?\"'()"


class Problem(NamedTuple):
    """Why a request cannot be served."""

    reason: str  # in a few words without the row's prompts, so that rows can be counted by it
    text: str  # what is wrong, where, and the way out
    word: str = ""  # that a prompt lacks


def raise_first(problems: Iterable[Problem]) -> None:
    """Raise what is wrong, if anything is.

    Raises:
        PrepareError: the first of the problems.
    """
    for problem in problems:
        raise PrepareError(problem.text)


def guidance_problems(guidance_scale: float, inversion: Inversion) -> Iterator[str]:
    """Null-text embeddings are optimised for one guidance scale, and serve no other."""
    made_for = inversion.made_for_guidance
    if made_for is not None and made_for != guidance_scale:
        yield (
            f"guidance_scale is {guidance_scale:g}, but inversion.method '{inversion.method}' optimises for "
            f"edit_guidance_scale {made_for:g}. Set both to the same"
        )


def start_problems(start_step: int, num_steps: int) -> Iterator[str]:
    """A first step behind the last one leaves a method without effect."""
    if start_step >= num_steps:
        yield (
            f"start_step {start_step} leaves none of the {num_steps} steps, which count from 0 to {num_steps - 1}. "
            "Lower editing.start_step or raise inversion.num_steps"
        )


def window_problems(name: str, window: Window, inversion: Inversion, *, of_walked: bool = False) -> Iterator[str]:
    """Of a window of steps, shares of the whole schedule that are counted from the first step that is walked.

    `of_walked`: shares of the steps that are walked.
    """
    start, stop = window
    first = int(start * ((inversion.num_steps if of_walked else inversion.schedule_steps) + 1))
    if stop < start:
        yield f"{name} ends at {stop:g}, before it begins at {start:g}. Write the smaller share first"
    elif stop > start and first >= inversion.num_steps:
        yield (
            f"{name} begins at step {first}, but only {inversion.num_steps} of the schedule's "
            f"{inversion.schedule_steps} steps are walked: it would never act. Let it begin earlier, or "
            "skip fewer steps"
        )


def target_problems(method: str, request: EditRequest) -> Iterator[Problem]:
    """Of an editor that samples under a target prompt."""
    if not request.target_prompt:
        yield Problem(
            "no target_prompt",
            f"{method} samples under a target_prompt, and this edit has no target_prompt. Add target_prompt",
        )


def negative_prompt_problems(request: EditRequest, inversion: Inversion) -> Iterator[Problem]:
    """An inversion that brings unconditional embeddings leaves no place for a negative prompt."""
    if request.negative_prompt and inversion.uncond_for == "all":
        yield Problem(
            f"a negative_prompt after inversion {inversion.method}",
            no_place_for_negative_prompt(inversion.method),
        )


def no_place_for_negative_prompt(inversion: str) -> str:
    """What is said of a negative prompt after such an inversion."""
    return (
        f"the {inversion} inversion brings an unconditional embedding of its own, which the edit's negative_prompt "
        "would replace. Leave negative_prompt out, or use another inversion"
    )


def pair_of_words_problems(
    words: WordPair | None, what: str, request: EditRequest, *, caption_follows: bool
) -> Iterator[Problem]:
    """Words of either prompt that their prompt lacks."""
    if words is None:
        return
    if not caption_follows:
        yield from word_problems(words.source, what, request.source_prompt, "source")
    yield from word_problems(words.target, what, request.target_prompt, "target")


def pairs_without_words_problems(request: EditRequest) -> Iterator[Problem]:
    """Blend and subtract words that name none, or that take away from nothing."""
    for what, words in (("blend", request.blend_words), ("subtract", request.subtract_words)):
        if words is not None and not words.source and not words.target:
            yield Problem(
                f"{what}_words without a word",
                f"{what}_words names no word. Name words of the source or the target prompt",
            )
    if request.blend_words is None and request.subtract_words is not None:
        yield Problem(
            "subtract_words without blend_words",
            "subtract_words takes away from what blend_words name, and there are none. Add these",
        )


def word_problems(words: Iterable[str], what: str, prompt: str, which: str) -> Iterator[Problem]:
    """Words that a prompt lacks. `what` says what they are for, `which` whose prompt it is."""
    for word in words:
        if not places_of(word, prompt):
            yield Problem(f"{what} '{word}' is not in the {which} prompt", missing_word(word, what, prompt), word)


def overlap_problems(words: Iterable[str], what: str, prompt: str) -> Iterator[Problem]:
    """Two texts that name one word of a prompt: which of their values counts would depend on their order."""
    for one, other in combinations(sorted(words), 2):
        if places_of(one, prompt) & places_of(other, prompt):
            yield Problem(
                f"{what}s '{one}' and '{other}' name one word",
                f"the {what}s '{one}' and '{other}' name the same word of the prompt '{prompt}'. Name each word once",
            )


def missing_word(word: str, what: str, prompt: str) -> str:
    """What is said where a prompt lacks a word."""
    return f"the {what} '{word}' is not a word of the prompt '{prompt}'. Use a word as the prompt has it"


def word_beyond(word: str, what: str, prompt: str) -> str:
    """What is said where a prompt's end, and a word in it, is cut off."""
    return f"the {what} '{word}' stands beyond what the text encoder reads of the prompt '{prompt}'. Shorten the prompt"


def places_of(word: str, prompt: str) -> set[int]:
    """Which words of `prompt.split()` are meant: all occurrences; several words in a row may be given as one.

    Case is ignored, and so is punctuation at a word's ends.
    """
    wanted, words = ([_bare(part) for part in text.split()] for text in (word, prompt))
    starts = [at for at in range(len(words)) if words[at : at + len(wanted)] == wanted]
    return {at + offset for at in starts for offset in range(len(wanted))}


def _bare(word: str) -> str:
    return word.strip(PUNCTUATION).casefold() or word.casefold()


def word_count_problems(source: str, target: str) -> Iterator[Problem]:
    """Prompts whose words cannot be swapped one for one."""
    before, after = len(source.split()), len(target.split())
    if before != after:
        yield Problem(
            "kind: replace with prompts of unequal numbers of words",
            f"kind: replace swaps words one for one, but the source prompt '{source}' has {before} words and the "
            f"target prompt '{target}' has {after}. Use kind: refine, or prompts with as many words",
        )
