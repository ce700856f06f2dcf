"""Prompts in batches of one size, as on a GPU: encoded once, with bits that depend on that size alone."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine import texts
from pipeline.engine.calls import Conditioning, EncodeText, Steps
from pipeline.engine.engine import Engine
from pipeline.models.analytic import AnalyticBackbone
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig
from tests.golden.replay import TINY_SD, TINY_SDXL

SIZE = 4


class Encoder(AnalyticBackbone):
    """Notes its batches, and what is read with a picture; fails where it is told to."""

    def __init__(self, *, most: int = 100, reads_pictures: bool = False) -> None:
        super().__init__()
        self.batches: list[list[str]] = []
        self.read: list[tuple[str, int]] = []
        self.most = most
        self.offers = dataclasses.replace(self.offers, reads_pictures=reads_pictures)

    def encode_text_of(self, prompt: str, picture: np.ndarray) -> Conditioning:
        self.read.append((prompt, int(picture[0, 0, 0])))
        if prompt == "no prompt":
            raise ValueError(prompt)
        return super().encode_text(prompt)

    def encode_texts(self, prompts: Sequence[str]) -> list[Conditioning]:
        self.batches.append(list(prompts))
        if len(prompts) > self.most:
            raise torch.OutOfMemoryError("pretended")
        if "no prompt" in prompts:
            raise ValueError("no prompt")
        return super().encode_texts(prompts)


@pytest.fixture
def in_fours(monkeypatch: pytest.MonkeyPatch) -> None:
    make = texts.Texts.__init__

    def made(self: texts.Texts, *given: Any, **named: Any) -> None:
        make(self, *given, **named)
        self.per_call = SIZE

    monkeypatch.setattr(texts.Texts, "__init__", made)


def asks(*prompts: str, picture: np.ndarray | None = None) -> Steps[list[Conditioning]]:
    return (yield EncodeText(prompts, picture))


def plain_picture(shade: int) -> np.ndarray:
    return np.full((2, 3, 3), shade, dtype=np.uint8)


def answers(engine: Engine, *asked: tuple[str, ...]) -> list[Any]:
    found = {done.index: done.error or done.value for done in engine.run(asks(*prompts) for prompts in asked)}
    return [found[number] for number in range(len(asked))]


def test_prompts_of_many_images_share_calls_of_one_size_and_are_encoded_once(in_fours: None) -> None:
    encoder = Encoder()
    engine = Engine(encoder)
    found = answers(engine, ("", "a"), ("", "b"), ("c", "", "d"), ("a", "a"), ())
    assert encoder.batches == [
        ["", "a", "b", "c"],
        ["d"] * SIZE,
    ]  # a full one goes at once, a short one when nothing comes
    assert [[one.prompt for one in answer] for answer in found] == [
        ["", "a"],
        ["", "b"],
        ["c", "", "d"],
        ["a", "a"],
        [],
    ]
    assert found[0][0] is found[1][0] is found[2][1]  # methods tell prompts by identity
    assert answers(engine, ("d", "b"))[0][1] is found[1][1]
    assert len(encoder.batches) == 2


def test_without_padding_no_prompt_is_encoded_for_nobody(in_fours: None) -> None:
    encoder = Encoder()
    answers(Engine(encoder, pad=False), ("a",), ("b",))
    assert encoder.batches == [["a", "b"]]


def test_a_prompt_that_breaks_a_batch_fails_alone(in_fours: None) -> None:
    encoder = Encoder()
    good, bad, both = answers(Engine(encoder), ("a", "b"), ("no prompt",), ("c", "no prompt"))
    assert [one.prompt for one in good] == ["a", "b"]
    assert (str(bad), str(both)) == ("no prompt", "no prompt")
    assert {len(batch) for batch in encoder.batches} == {SIZE}  # alone or not: of one size


def test_out_of_memory_halves_the_batch_and_loses_no_prompt(in_fours: None) -> None:
    encoder = Encoder(most=2)
    found = answers(Engine(encoder), ("a", "b"), ("c",))
    assert [[one.prompt for one in answer] for answer in found] == [["a", "b"], ["c"]]
    assert [len(batch) for batch in encoder.batches] == [4, 2, 2]
    (error,) = answers(Engine(Encoder(most=0)), ("a",))
    assert isinstance(error, torch.OutOfMemoryError)


def test_prompts_of_whoever_has_left_are_not_encoded(in_fours: None) -> None:
    waiting = texts.Texts(Encoder(), pad=True)
    for owner, prompts in ((1, ("a", "b")), (2, ("b",))):
        assert waiting.push(owner, prompts) is None
    waiting.drop(lambda owner: owner == 1)
    assert [owner for owner, _, _ in waiting.encode()] == [2]
    assert len(waiting) == 0


def test_a_prompt_that_is_read_with_a_picture_goes_alone_and_once_for_each(in_fours: None) -> None:
    encoder = Encoder(reads_pictures=True)
    asked = [
        asks("a", "", picture=plain_picture(1)),
        asks("a", picture=plain_picture(2)),
        asks("a", "b"),
        asks("", "a", picture=plain_picture(1)),  # an equal picture, of another row
        asks("no prompt", picture=plain_picture(1)),
    ]
    found = {done.index: done.error or done.value for done in Engine(encoder).run(asked)}
    assert encoder.read == [("a", 1), ("", 1), ("a", 2), ("no prompt", 1)]
    assert encoder.batches == [["a", "b", "a", "a"]]
    assert found[0][0] is found[3][1]
    assert found[0][1] is found[3][0]
    assert len({id(one) for one in (found[0][0], found[1][0], found[2][0])}) == 3
    assert str(found[4]) == "no prompt"


def test_a_picture_that_no_encoder_reads_is_left_out(in_fours: None) -> None:
    encoder = Encoder()
    asked = [asks("a", picture=plain_picture(shade)) for shade in (1, 2)]
    found = [done.value[0] for done in Engine(encoder).run(asked)]
    assert found[0] is found[1]
    assert (encoder.read, encoder.batches) == ([], [["a"] * SIZE])


def test_texts_of_pictures_that_are_done_take_no_memory(in_fours: None) -> None:
    engine = Engine(encoder := Encoder(reads_pictures=True))
    for shade in (1, 2, 1):
        engine.run_one(asks("a", picture=plain_picture(shade)))
    gc.collect()
    assert encoder.read == [("a", 1), ("a", 2), ("a", 1)]


@pytest.mark.parametrize("checkpoint", [TINY_SD, TINY_SDXL], ids=["sd", "sdxl"])
def test_an_encoder_gives_a_prompt_the_same_bits_beside_any_others(checkpoint: Any) -> None:
    model = load_backbone(ModelConfig(name=str(checkpoint)), device="cpu")
    one, two = (model.encode_texts(prompts)[0] for prompts in (("a hat", "", "b", "c"), ("a hat",) * 4))
    alone = model.encode_text("a hat")
    assert one.parts.keys() == alone.parts.keys()
    for name, part in one.parts.items():
        assert torch.equal(part, two.parts[name])
        torch.testing.assert_close(part, alone.parts[name])
        assert part.untyped_storage().nbytes() == part.nbytes  # it holds no other prompt's memory
    assert one.spans == alone.spans
