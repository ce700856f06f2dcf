"""Which tokens of two prompts belong together (Prompt-to-Prompt, arXiv 2208.01626). Pure; no model involved.

Positions count the L keys of cross-attention from 0. Where several tokenizers' tokens are keys, each of their spans is
aligned with the same span of the other prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.editing.problems import missing_word, places_of, raise_first, word_beyond, word_count_problems
from pipeline.engine.calls import Conditioning, Span
from pipeline.errors import PrepareError
from pipeline.records import Window


def word_positions(prompt: Conditioning, word: str, what: str) -> list[int]:
    """Token positions of a word, all its occurrences; several words in a row may be given as one.

    Case is ignored, and so is punctuation at a word's ends. `what` says for the error what the word is for.

    Raises:
        PrepareError: the prompt does not have the word, or its tokens were cut off with the end of the prompt.
    """
    chosen = places_of(word, prompt.prompt)
    if not chosen:
        raise PrepareError(missing_word(word, what, prompt.prompt))
    positions = prompt.places_of(chosen)
    if chosen - {word for span in prompt.spans for word in span.words}:
        raise PrepareError(word_beyond(word, what, prompt.prompt))
    return positions


def token_weights(prompt: Conditioning, words: tuple[str, ...], what: str) -> Tensor:
    """(L,): 1 at the words' tokens, 0 elsewhere."""
    weights = torch.zeros(prompt.length)
    for word in words:
        weights[word_positions(prompt, word, what)] = 1.0
    return weights


def positions_or_words(
    prompt: Conditioning, positions: Sequence[int] | None, words: tuple[str, ...], setting: str
) -> Tensor:
    """(L,): 1 at the chosen tokens.

    Raises:
        PrepareError: a word is not in the prompt, or a position is not among its L.
    """
    if positions is None:
        return token_weights(prompt, words, "blend word")
    weights = torch.zeros(prompt.length)
    beyond = [position for position in positions if position >= len(weights)]
    if beyond:
        raise PrepareError(
            f"{setting} names position {beyond[0]}, and a prompt has positions 0 to {len(weights) - 1}. Take it out"
        )
    weights[list(positions)] = 1.0
    return weights


def replacement_mapper(source: Conditioning, target: Conditioning, *, aligned_tail: bool = False) -> Tensor:
    """(L, L): weight of each source token (row) in each target token's (column) attention map, for word swaps.

    A changed word's maps are shared out over its new tokens. Behind the last changed word the published method maps
    each target position to the same source position, also where token counts differ and the two stand apart;
    `aligned_tail` keeps them together instead.

    Raises:
        PrepareError: the prompts have different numbers of words.
    """
    source_words, target_words = source.prompt.split(), target.prompt.split()
    raise_first(word_count_problems(source.prompt, target.prompt))
    changed = [at for at, pair in enumerate(zip(source_words, target_words, strict=True)) if pair[0] != pair[1]]
    mapper = torch.zeros((source.length, target.length))
    for old, new, region in regions(source, target):
        mapper[region, region] = _replacement(old, new, changed, region, aligned_tail=aligned_tail)
    return mapper


def regions(source: Conditioning, target: Conditioning) -> Iterator[tuple[Span, Span, slice]]:
    """The spans of two prompts that belong together, and the keys up to the next one, padding included."""
    starts = [span.start for span in target.spans]
    for old, new, stop in zip(source.spans, target.spans, [*starts[1:], target.length], strict=True):
        yield old, new, slice(new.start, stop)


def _replacement(old: Span, new: Span, changed: list[int], region: slice, *, aligned_tail: bool) -> Tensor:
    """The mapper of one span, over its keys."""
    length = region.stop - region.start
    swaps = [(_tokens_of(old, word), _tokens_of(new, word)) for word in changed]
    swaps = [(before, after) for before, after in swaps if before and after]  # what was cut off cannot be swapped
    mapper = torch.zeros((length, length))
    i = j = 0
    while i < length and j < length:
        if swaps and i == swaps[0][0][0]:
            before, after = swaps.pop(0)
            if len(before) == len(after):
                mapper[before, after] = 1.0
            else:
                mapper[torch.tensor(before)[:, None], torch.tensor(after)] = 1.0 / len(after)
            i += len(before)
            j += len(after)
            continue
        mapper[i if swaps or aligned_tail else j, j] = 1.0
        i += 1
        j += 1
    return mapper


def _tokens_of(span: Span, word: int) -> list[int]:
    """Places of a word's tokens within its span."""
    return [place - span.start for place, of_word in zip(span.places, span.words, strict=True) if of_word == word]


class Refinement(NamedTuple):
    """For each target position, the source position that it belongs to."""

    source: Tensor  # (L,) long; 0 where there is none
    keep: Tensor  # (L,) 1 where there is one, else 0


def refinement_mapper(source: Conditioning, target: Conditioning) -> Refinement:
    """Align any two prompts by their token ids, start and end included (Needleman and Wunsch).

    Gaps cost nothing, equal tokens win 1, different ones lose 1, so that only equal tokens are ever aligned. Of equally
    good ways the one is taken that leaves target tokens alone first, then source tokens. Positions behind the target's
    end keep their place.
    """
    length = target.length
    index, keep = torch.arange(length), torch.ones(length)
    for old, new, region in regions(source, target):
        aligned = _aligned(old.token_ids, new.token_ids)
        end = region.start + len(new.token_ids)
        index[region.start : end], keep[region.start : end] = 0, 0.0
        for i, j in aligned:
            index[region.start + j], keep[region.start + j] = region.start + i, 1.0
    return Refinement(index, keep)


def _aligned(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Places of tokens that belong together."""
    score = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
    for i in range(1, len(old) + 1):
        for j in range(1, len(new) + 1):
            diagonal = score[i - 1][j - 1] + (1 if old[i - 1] == new[j - 1] else -1)
            score[i][j] = max(score[i][j - 1], score[i - 1][j], diagonal)
    i, j = len(old), len(new)
    while i > 0 and j > 0:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            yield i, j


def word_schedule(target: Conditioning, num_steps: int, default: Window, windows: Mapping[str, Window]) -> Tensor:
    """(S + 1, L) of 0 and 1: at which steps each target token's map is overwritten.

    A window (a, b) covers steps int(a (S + 1)) to int(b (S + 1)), the last one not included: the published count.

    Raises:
        PrepareError: a word with a window of its own is not in the target prompt.
    """
    schedule = torch.zeros((num_steps + 1, target.length))

    def write(window: Window, positions: slice | list[int]) -> None:
        start, stop = (int(share * (num_steps + 1)) for share in window)
        schedule[:, positions] = 0.0
        schedule[start:stop, positions] = 1.0

    write(default, slice(None))
    for word, window in windows.items():
        write(window, word_positions(target, word, "cross_replace_steps word"))
    return schedule


def equalizer_weights(target: Conditioning, factors: Mapping[str, float]) -> Tensor:
    """(L,): each named target word's factor at its tokens, 1 elsewhere.

    Raises:
        PrepareError: a word is not in the target prompt.
    """
    weights = torch.ones(target.length)
    for word, factor in factors.items():
        weights[word_positions(target, word, "equalizer word")] = factor
    return weights
