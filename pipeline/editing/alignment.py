"""Which tokens of two prompts belong together (Prompt-to-Prompt, arXiv 2208.01626). Pure; no model involved.

Positions count the keys of cross-attention from 0, the start token. L is their number, 77 in Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.editing.problems import missing_word, places_of, raise_first, word_beyond, word_count_problems
from pipeline.engine.calls import TextConditioning
from pipeline.errors import PrepareError
from pipeline.records import Window


def word_positions(prompt: TextConditioning, word: str, what: str) -> list[int]:
    """Token positions of a word, all its occurrences; several words in a row may be given as one.

    Case is ignored, and so is punctuation at a word's ends. `what` says for the error what the word is for.

    Raises:
        PrepareError: the prompt does not have the word, or its tokens were cut off with the end of the prompt.
    """
    chosen = places_of(word, prompt.prompt)
    if not chosen:
        raise PrepareError(missing_word(word, what, prompt.prompt))
    positions = [1 + token for token, of_word in enumerate(prompt.token_words) if of_word in chosen]
    if chosen - set(prompt.token_words):
        raise PrepareError(word_beyond(word, what, prompt.prompt))
    return positions


def token_weights(prompt: TextConditioning, words: tuple[str, ...], what: str) -> Tensor:
    """(L,): 1 at the words' tokens, 0 elsewhere."""
    weights = torch.zeros(prompt.embedding.shape[0])
    for word in words:
        weights[word_positions(prompt, word, what)] = 1.0
    return weights


def replacement_mapper(source: TextConditioning, target: TextConditioning, *, aligned_tail: bool = False) -> Tensor:
    """(L, L): weight of each source token (row) in each target token's (column) attention map, for word swaps.

    A changed word's maps are shared out over its new tokens. Behind the last changed word the published method maps
    each target position to the same source position, also where token counts differ and the two stand apart;
    `aligned_tail` keeps them together instead.

    Raises:
        PrepareError: the prompts have different numbers of words.
    """
    source_words, target_words = source.prompt.split(), target.prompt.split()
    raise_first(word_count_problems(source.prompt, target.prompt))
    length = source.embedding.shape[0]
    changed = [at for at, pair in enumerate(zip(source_words, target_words, strict=True)) if pair[0] != pair[1]]
    swaps = [(_tokens_of(source, word), _tokens_of(target, word)) for word in changed]
    swaps = [(old, new) for old, new in swaps if old and new]  # what was cut off cannot be swapped
    mapper = torch.zeros((length, length))
    i = j = 0
    while i < length and j < length:
        if swaps and i == swaps[0][0][0]:
            old, new = swaps.pop(0)
            if len(old) == len(new):
                mapper[old, new] = 1.0
            else:
                mapper[torch.tensor(old)[:, None], torch.tensor(new)] = 1.0 / len(new)
            i += len(old)
            j += len(new)
            continue
        mapper[i if swaps or aligned_tail else j, j] = 1.0
        i += 1
        j += 1
    return mapper


def _tokens_of(prompt: TextConditioning, word: int) -> list[int]:
    return [1 + token for token, of_word in enumerate(prompt.token_words) if of_word == word]


class Refinement(NamedTuple):
    """For each target position, the source position that it belongs to."""

    source: Tensor  # (L,) long; 0 where there is none
    keep: Tensor  # (L,) 1 where there is one, else 0


def refinement_mapper(source: TextConditioning, target: TextConditioning) -> Refinement:
    """Align any two prompts by their token ids, start and end included (Needleman and Wunsch).

    Gaps cost nothing, equal tokens win 1, different ones lose 1, so that only equal tokens are ever aligned. Of equally
    good ways the one is taken that leaves target tokens alone first, then source tokens. Positions behind the target's
    end keep their place.
    """
    old, new = source.token_ids, target.token_ids
    score = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
    for i in range(1, len(old) + 1):
        for j in range(1, len(new) + 1):
            diagonal = score[i - 1][j - 1] + (1 if old[i - 1] == new[j - 1] else -1)
            score[i][j] = max(score[i][j - 1], score[i - 1][j], diagonal)
    length = target.embedding.shape[0]
    index, keep = torch.arange(length), torch.ones(length)
    index[: len(new)], keep[: len(new)] = 0, 0.0
    i, j = len(old), len(new)
    while i > 0 and j > 0:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            index[j], keep[j] = i, 1.0
    return Refinement(index, keep)


def word_schedule(target: TextConditioning, num_steps: int, default: Window, windows: Mapping[str, Window]) -> Tensor:
    """(S + 1, L) of 0 and 1: at which steps each target token's map is overwritten.

    A window (a, b) covers steps int(a (S + 1)) to int(b (S + 1)), the last one not included: the published count.

    Raises:
        PrepareError: a word with a window of its own is not in the target prompt.
    """
    schedule = torch.zeros((num_steps + 1, target.embedding.shape[0]))

    def write(window: Window, positions: slice | list[int]) -> None:
        start, stop = (int(share * (num_steps + 1)) for share in window)
        schedule[:, positions] = 0.0
        schedule[start:stop, positions] = 1.0

    write(default, slice(None))
    for word, window in windows.items():
        write(window, word_positions(target, word, "cross_replace_steps word"))
    return schedule


def equalizer_weights(target: TextConditioning, factors: Mapping[str, float]) -> Tensor:
    """(L,): each named target word's factor at its tokens, 1 elsewhere.

    Raises:
        PrepareError: a word is not in the target prompt.
    """
    weights = torch.ones(target.embedding.shape[0])
    for word, factor in factors.items():
        weights[word_positions(target, word, "equalizer word")] = factor
    return weights
