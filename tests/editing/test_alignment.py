"""Which tokens of two prompts belong together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.editing.alignment import (
    equalizer_weights,
    refinement_mapper,
    replacement_mapper,
    word_positions,
    word_schedule,
)
from pipeline.engine.calls import Conditioning, Span
from pipeline.errors import PrepareError

LENGTH = 77
IDS: dict[str, int] = {}


def prompt(text: str, **pieces: int) -> Conditioning:
    """A prompt of one token per word, more for words named in `pieces`; equal pieces of equal words have equal ids."""
    words = [at for at, word in enumerate(text.split()) for _ in range(pieces.get(word, 1))]
    parts = [f"{word}/{part}" for word in text.split() for part in range(pieces.get(word, 1))][: LENGTH - 2]
    own = [IDS.setdefault(part, 2 + len(IDS)) for part in parts]
    span = Span(0, (0, *own, 1), range(1, 1 + len(own)), tuple(words[: LENGTH - 2]))
    return Conditioning(text, {"embedding": torch.zeros((LENGTH, 1))}, (span,))


def aligned(source: str, target: str, tokens: int) -> list[int | None]:
    index, keep = refinement_mapper(prompt(source), prompt(target))
    return [int(index[at]) if keep[at] else None for at in range(tokens)]


def test_refinement_aligns_what_was_only_added_to() -> None:
    found = aligned("a cat on the beach", "a black cat with sunglasses on the beach", 10)
    assert found == [0, 1, None, 2, None, None, 3, 4, 5, 6]


def test_refinement_leaves_a_swapped_word_alone_and_aligns_the_end() -> None:
    assert aligned("a photo of a cat", "a photo of a dog", 7) == [0, 1, 2, 3, 4, None, 6]


def test_positions_behind_the_targets_end_keep_their_place() -> None:
    index, keep = refinement_mapper(prompt("a cat"), prompt("a black cat"))
    assert index[5:].tolist() == list(range(5, LENGTH))
    assert keep[5:].all()


words = st.sampled_from(["a", "cat", "dog", "on", "the", "red", "beach"])
sentences = st.lists(words, min_size=1, max_size=8).map(" ".join)


@given(sentences, sentences)
def test_refinement_keeps_order_and_pairs_equal_tokens_only(source: str, target: str) -> None:
    old, new = prompt(source), prompt(target)
    index, keep = refinement_mapper(old, new)
    (old_ids,), (new_ids,) = ([span.token_ids for span in one.spans] for one in (old, new))
    kept = [at for at in range(len(new_ids)) if keep[at]]
    pairs = [int(index[at]) for at in kept]
    assert pairs == sorted(set(pairs))
    assert [old_ids[at] for at in pairs] == [new_ids[at] for at in kept]


def test_each_tokenizers_span_is_aligned_with_the_same_one_of_the_other_prompt() -> None:
    """Two tokenizers whose keys follow each other, the second without a start token, as Stable Diffusion 3 has them."""
    start = 10

    def twice(text: str) -> Conditioning:
        (first,) = prompt(text).spans
        own = first.token_ids[1:]
        second = Span(start, own, range(len(own) - 1), first.words)
        return Conditioning(text, {"embedding": torch.zeros((2 * start, 1))}, (first, second))

    old, new = twice("a red cat"), twice("a big red dog")
    index, keep = refinement_mapper(old, new)
    assert [int(index[at]) for at in (1, 3, 10, 12)] == [1, 2, 10, 11]
    assert keep[[1, 3, 10, 12]].all()
    assert not keep[[2, 4, 11, 13]].any()
    assert word_positions(new, "red", "word") == [3, 12]
    swapped = replacement_mapper(twice("a red cat"), twice("a red dog"))
    assert torch.equal(swapped, torch.eye(2 * start))
    longer = replacement_mapper(twice("cat"), twice("dog"))
    assert not longer[:start, start:].any()


@given(sentences)
def test_a_prompt_aligns_with_itself_token_by_token(text: str) -> None:
    index, keep = refinement_mapper(prompt(text), prompt(text))
    assert torch.equal(index, torch.arange(LENGTH))
    assert keep.all()
    assert torch.equal(replacement_mapper(prompt(text), prompt(text)), torch.eye(LENGTH))


def test_a_word_that_becomes_three_tokens_shares_out_its_map() -> None:
    mapper = replacement_mapper(prompt("a photo of a cat here"), prompt("a photo of a zebracar here", zebracar=3))
    assert mapper[5, 5:8].tolist() == pytest.approx([1 / 3] * 3)
    assert torch.equal(mapper[:, 8:], torch.eye(LENGTH)[:, 8:])  # identity on the target's position, as published
    torch.testing.assert_close(mapper[:, 5:8].sum(dim=0), torch.full((3,), 1 / 3))


def test_three_tokens_that_become_one_word_add_up_and_leave_the_last_columns_empty() -> None:
    mapper = replacement_mapper(prompt("a photo of a zebracar here", zebracar=3), prompt("a photo of a cat here"))
    assert mapper[5:8, 5].tolist() == [1.0] * 3
    assert torch.equal(mapper[6, 6:9], torch.tensor([1.0, 0.0, 0.0]))
    assert not mapper[:, 75:].any()
    assert mapper[:, 74].sum() == 1


def test_an_aligned_tail_follows_the_change_of_length() -> None:
    source, target = prompt("a photo of a cat here"), prompt("a photo of a zebracar here", zebracar=3)
    mapper = replacement_mapper(source, target, aligned_tail=True)
    assert mapper[6, 8] == 1
    assert mapper[8, 8] == 0


def test_swapped_words_of_equal_length_are_paired_token_by_token() -> None:
    mapper = replacement_mapper(prompt("a tabbycat runs", tabbycat=2), prompt("a zebradog runs", zebradog=2))
    assert torch.equal(mapper, torch.eye(LENGTH))


def test_replacing_prompts_of_different_word_counts_is_refused_with_both_prompts() -> None:
    with pytest.raises(PrepareError, match=r"'a cat' has 2 words and the target prompt 'a black cat' has 3.*refine"):
        replacement_mapper(prompt("a cat"), prompt("a black cat"))


def test_a_word_is_found_wherever_it_stands_without_case_and_punctuation() -> None:
    text = prompt('A mirror, a Cat and (the  "cat")')
    assert word_positions(text, "cat", "blend word") == [4, 7]
    assert word_positions(text, "Mirror", "blend word") == [2]
    assert word_positions(text, "a cat", "blend word") == [3, 4]
    assert word_positions(prompt("a zebracar here", zebracar=3), "zebracar", "blend word") == [2, 3, 4]


@pytest.mark.parametrize("word", ["dog", "ca", "cat a"])
def test_a_word_that_is_missing_is_named_with_its_prompt(word: str) -> None:
    with pytest.raises(PrepareError, match=f"the blend word '{word}' is not a word of the prompt 'a cat'"):
        word_positions(prompt("a cat"), word, "blend word")


def test_a_word_beyond_what_the_encoder_reads_is_refused() -> None:
    long = prompt(" ".join(["very"] * 75 + ["cat"]))
    with pytest.raises(PrepareError, match="'cat' stands beyond what the text encoder reads"):
        word_positions(long, "cat", "equalizer word")


@pytest.mark.parametrize(
    ("window", "steps", "active"),
    [((0.0, 0.4), 50, 20), ((0.0, 0.8), 50, 40), ((0.0, 0.8), 10, 8), ((0.0, 1.0), 7, 8), ((0.5, 0.8), 20, 6)],
)
def test_a_window_covers_the_published_number_of_steps(window: tuple[float, float], steps: int, active: int) -> None:
    schedule = word_schedule(prompt("a cat"), steps, window, {})
    assert schedule.shape == (steps + 1, LENGTH)
    assert set(schedule.unique().tolist()) <= {0.0, 1.0}
    assert schedule.sum(dim=0).tolist() == [float(active)] * LENGTH


def test_a_word_with_a_window_of_its_own_has_that_one_instead() -> None:
    schedule = word_schedule(prompt("a black cat"), 10, (0.0, 0.8), {"cat": (0.5, 0.7)})
    assert schedule[:, 3].nonzero().flatten().tolist() == [5, 6]
    assert schedule[:, 2].sum() == 8
    with pytest.raises(PrepareError, match="the cross_replace_steps word 'dog'"):
        word_schedule(prompt("a black cat"), 10, (0.0, 0.8), {"dog": (0.5, 0.7)})


def test_an_equalizer_has_its_factors_at_the_words_tokens() -> None:
    weights = equalizer_weights(prompt("a zebracar here", zebracar=2), {"zebracar": -2.5})
    assert weights[:5].tolist() == [1.0, 1.0, -2.5, -2.5, 1.0]
    assert weights[5:].eq(1).all()
    with pytest.raises(PrepareError, match="the equalizer word 'cat' is not a word of the prompt 'a dog'"):
        equalizer_weights(prompt("a dog"), {"cat": 2.0})
