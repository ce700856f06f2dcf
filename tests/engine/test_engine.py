"""The engine: packing, invariance, isolation of failures, counts."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.ledits_pp import LEditsPP
from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.calls import Denoise, Denoised, EncodeText, Fork, NetworkAnswer, NetworkCall, Steps
from pipeline.engine.engine import GIVEN_CALLS, Engine
from pipeline.errors import EditError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.models.analytic import AnalyticBackbone
from pipeline.records import Concept, EditRequest
from tests.methods import (
    BACKBONES,
    analytic,
    invert_and_edit,
    levels,
    network_calls,
    source,
    sunglasses_and_hat,
    tiny_sd,
)

CALL_SIZE = 8
ROOT = Path(__file__).parents[2]


def neighbours(backbone: Any) -> list[Steps[Any]]:
    """Other images, other recipes: another editor, other inversions, step counts and numbers of concepts."""
    many = EditRequest(concepts=tuple(Concept(prompt=f"word{n}", guidance_scale=2.0) for n in range(10)))
    cfg = EditRequest(target_prompt="a dog", negative_prompt="snow")
    return [
        invert_and_edit(source(backbone, 7), many),
        invert_and_edit(source(backbone, 8), cfg, DDIMInversion(num_steps=3), ClassifierFreeGuidance()),
        invert_and_edit(source(backbone, 9), EditRequest(), editor=Reconstruct()),
    ]


def bits(result: tuple[Any, Any]) -> bytes:
    trajectory, edited = result
    return trajectory.noise_maps.numpy().tobytes() + edited.latents.numpy().tobytes() + edited.masks.numpy().tobytes()


@pytest.mark.parametrize("name", BACKBONES)
def test_an_image_is_edited_to_the_same_bits_alone_beside_neighbours_and_in_another_order(name: str) -> None:
    backbone = BACKBONES[name]()

    def ours() -> Steps[Any]:
        return invert_and_edit(source(backbone, 1), sunglasses_and_hat())

    alone = bits(Engine(backbone, call_size=CALL_SIZE).run_one(ours()))
    for place, in_flight in ((0, 16), (3, 16), (1, 2)):
        generators = neighbours(backbone)
        generators.insert(place, ours())
        engine = Engine(backbone, call_size=CALL_SIZE, images_in_flight=in_flight)
        results = {finished.index: finished for finished in engine.run(generators)}
        assert len(results) == 4
        assert not [finished.error for finished in results.values() if finished.error]
        assert bits(results[place].value) == alone


def test_a_second_worker_gives_the_same_bits() -> None:
    script = (
        "import hashlib, torch; torch.set_num_threads(1);"
        "from tests.engine.test_engine import *;"
        "b = tiny_sd(); e = Engine(b, call_size=CALL_SIZE);"
        "print(hashlib.sha256(bits(e.run_one(invert_and_edit(source(b, 1), sunglasses_and_hat())))).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.strip()
        for _ in range(2)
    }
    assert len(digests) == 1
    assert all(len(digest) == 64 for digest in digests)


def test_two_threads_share_one_engine_and_get_the_bits_of_one() -> None:
    backbone = tiny_sd()
    alone = [
        bits(Engine(backbone, call_size=CALL_SIZE).run_one(invert_and_edit(source(backbone, n), sunglasses_and_hat())))
        for n in range(4)
    ]
    engine, found = Engine(backbone, call_size=CALL_SIZE), {}

    def unit(numbers: Sequence[int]) -> None:
        for finished in engine.run(invert_and_edit(source(backbone, n), sunglasses_and_hat()) for n in numbers):
            found[numbers[finished.index]] = bits(finished.value)

    threads = [threading.Thread(target=unit, args=(numbers,)) for numbers in ((0, 1), (2, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [found[n] for n in range(4)] == alone


def test_watching_attention_changes_no_prediction_and_leaves_nothing_behind() -> None:
    backbone = tiny_sd()
    latents, prompt = source(backbone, 1).latents, backbone.encode_text("a cat with sunglasses")
    rows = (latents.expand(4, -1, -1, -1), levels(backbone, [501] * 4), [prompt] * 4)
    before = backbone.denoise(NetworkCall(*rows))
    weights = torch.zeros((4, 1, 77))
    weights[:, 0, 3] = 1.0
    watched = backbone.denoise(NetworkCall(*rows, weights))
    after = backbone.denoise(NetworkCall(*rows))
    attention = watched.attention
    assert before.attention is None
    assert attention is not None
    assert attention.shape == (4, 1, 3, 3)
    assert 0 < float(attention.min()) <= float(attention.max()) < 1
    assert torch.equal(watched.predictions.noise, before.predictions.noise)
    assert torch.equal(after.predictions.noise, before.predictions.noise)


def test_attention_over_all_tokens_sums_to_one() -> None:
    backbone = tiny_sd()
    latents, prompt = source(backbone, 1).latents, backbone.encode_text("a cat")
    call = NetworkCall(latents[None], levels(backbone, [501]), [prompt], torch.ones((1, 1, 77)))
    attention = backbone.denoise(call).attention
    assert attention is not None
    torch.testing.assert_close(attention, torch.ones_like(attention), atol=1e-5, rtol=0)


def asks_for(rows: int) -> Steps[int]:
    backbone = analytic()
    latents = source(backbone, 1).latents
    (prompt,) = yield EncodeText(("hat",))
    denoised = yield Denoise(
        latents.expand(rows, -1, -1, -1), levels(backbone, range(401, 401 + rows)), [prompt] * rows
    )
    return int(denoised.predictions.noise.shape[0])


def test_calls_are_full_while_there_are_rows_and_only_the_last_is_padded() -> None:
    engine = Engine(analytic(), call_size=4, images_in_flight=16)
    calls = network_calls(engine)
    assert sorted(finished.value for finished in engine.run(asks_for(rows) for rows in (3, 5, 1, 4, 1))) == [
        1,
        1,
        3,
        4,
        5,
    ]
    assert (engine.stats.network_rows, len(calls), engine.stats.padded_rows) == (14, 4, 2)


def test_a_call_with_more_rows_than_a_unet_call_is_split() -> None:
    engine = Engine(analytic(), call_size=4)
    calls = network_calls(engine)
    assert engine.run_one(asks_for(11)) == 11
    assert len(calls) == 3


def test_without_padding_no_row_is_computed_that_nobody_asked_for() -> None:
    engine = Engine(analytic(), call_size=16, pad=False)
    assert engine.run_one(asks_for(3)) == 3
    assert (engine.stats.network_rows, engine.stats.padded_rows) == (3, 0)


def asks_of(
    latents: Tensor, words: Sequence[str], watch: Sequence[Sequence[int]] | None = None, timestep: int = 401
) -> Steps[Denoised]:
    prompts = yield EncodeText(tuple(words))
    rows = latents.expand(len(words), -1, -1, -1)
    return (yield Denoise(rows, levels(analytic(), [timestep] * len(words)), prompts, watch))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_row_that_several_ask_for_is_computed_once_and_has_the_bits_of_each_alone(name: str) -> None:
    backbone = BACKBONES[name]()
    latents = source(backbone, 1).latents
    asked: list[tuple[Sequence[str], Sequence[Sequence[int]] | None]] = [
        (("", "hat", "dog"), ((), (1,), (1,))),
        (("", "hat", "snow"), ((), (1,), (1,))),
        (("", "hat"), None),  # the same predictions, but nothing watched: another row where the first watches
        (("hat", "hat"), ((1,), (1,))),
    ]

    def all_asked() -> list[Steps[Denoised]]:
        return [asks_of(latents, words, watch) for words, watch in asked]

    together = Engine(backbone, call_size=CALL_SIZE)
    calls = network_calls(together)
    found = {finished.index: finished.value for finished in together.run(all_asked())}
    assert (together.stats.network_rows, together.stats.shared_rows) == (10, 5)
    assert len(calls) == 1
    for place, generator in enumerate(all_asked()):
        alone: Denoised = Engine(backbone, call_size=CALL_SIZE).run_one(generator)
        assert torch.equal(found[place].predictions.noise, alone.predictions.noise)
        if alone.attention is None:
            assert found[place].attention is None
        else:
            assert torch.equal(found[place].attention, alone.attention)


def test_rows_that_differ_in_anything_are_not_shared() -> None:
    latents, other = source(analytic(), 1).latents, source(analytic(), 1).latents
    engine = Engine(analytic(), call_size=CALL_SIZE)
    engine.run_one(asks_of(latents, ["hat", "dog"]))
    list(engine.run([asks_of(latents, ["hat"]), asks_of(other, ["hat"])]))  # equal numbers, but not told to be
    list(engine.run([asks_of(latents, ["hat"]), asks_of(latents, ["hat"], timestep=402)]))
    list(engine.run([asks_of(latents, ["hat"]), asks_of(latents.transpose(-1, -2), ["hat"])]))
    assert (engine.stats.network_rows, engine.stats.shared_rows) == (8, 0)


def test_four_edits_of_one_image_share_the_first_step_that_they_act_in() -> None:
    backbone, engine = tiny_sd(), Engine(tiny_sd(), call_size=CALL_SIZE)
    requests = [
        EditRequest(concepts=(Concept(prompt="hat", guidance_scale=scale, warmup_steps=1), Concept(prompt="dog")))
        for scale in (2.0, 3.0, 4.0, 5.0)
    ]

    def four() -> Steps[list[Any]]:
        trajectory = yield from DDPMInversion(num_steps=4).invert(source(backbone, 1))
        edits = yield Fork(tuple(LEditsPP().edit(trajectory, request) for request in requests))
        return [trajectory, *edits]

    trajectory, *edits = engine.run_one(four())
    assert engine.stats.network_rows == 4 + 4 * (2 + 3 * 3)
    assert engine.stats.shared_rows == 3 * 2
    for request, edited in zip(requests, edits, strict=True):
        alone = Engine(backbone, call_size=CALL_SIZE).run_one(LEditsPP().edit(trajectory, request))
        assert torch.equal(edited.latents, alone.latents)
        assert torch.equal(edited.masks, alone.masks)


def test_a_prompt_is_encoded_once_per_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = AnalyticBackbone()
    encode, encoded = backbone.encode_text, []
    monkeypatch.setattr(backbone, "encode_text", lambda prompt: encoded.append(prompt) or encode(prompt))
    assert len(list(Engine(backbone).run(asks_for(1) for _ in range(5)))) == 5
    assert len(encoded) == 1


def test_the_prompt_that_was_not_used_for_longest_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = AnalyticBackbone()
    encode, encoded = backbone.encode_text, []
    monkeypatch.setattr(backbone, "encode_text", lambda prompt: encoded.append(prompt) or encode(prompt))
    monkeypatch.setattr("pipeline.engine.texts.CACHED_PROMPTS", 2)

    def words(*prompts: str) -> Steps[None]:
        for prompt in prompts:
            yield EncodeText((prompt,))  # and forget it

    Engine(backbone).run_one(words("hat", "dog", "hat", "snow", "hat", "dog"))
    assert encoded == ["hat", "dog", "snow", "dog"]


def test_a_prompt_that_somebody_holds_is_never_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods tell prompts by identity."""
    monkeypatch.setattr("pipeline.engine.texts.CACHED_PROMPTS", 1)

    def holding() -> Steps[tuple[bool, bool]]:
        (hat,) = yield EncodeText(("hat",))
        yield EncodeText(("dog", "snow", "sea"))
        (again,) = yield EncodeText(("hat",))
        return hat is again, hat.embedding is again.embedding

    assert Engine(analytic()).run_one(holding()) == (True, True)


def test_images_in_flight_bound_how_many_are_drawn_from_the_source() -> None:
    alive, most = 0, 0

    def counted() -> Steps[int]:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        value = yield from asks_for(1)
        alive -= 1
        return value

    engine = Engine(analytic(), call_size=8, images_in_flight=3)
    assert sum(finished.value for finished in engine.run(counted() for _ in range(20))) == 20
    assert most == 3


def test_a_session_that_comes_later_gets_its_share_of_the_places() -> None:
    begun = 0

    def many() -> Iterator[Steps[int]]:
        nonlocal begun
        for _ in range(40):
            begun += 1
            yield asks_for(1)

    engine = Engine(analytic(), call_size=4, images_in_flight=4)
    first = engine.run(many())
    next(first)
    assert [finished.value for finished in engine.run(asks_for(1) for _ in range(3))] == [1] * 3
    assert begun <= 20  # of 40: the later session does not wait for the end of the first
    assert sum(finished.value for finished in first) == 39


def test_with_one_place_two_sessions_take_turns() -> None:
    begun: list[str] = []

    def noting(name: str, images: int) -> Iterator[Steps[int]]:
        for _ in range(images):
            begun.append(name)
            yield asks_for(1)

    engine = Engine(analytic(), images_in_flight=1)
    first, second = engine.run(noting("a", 6)), engine.run(noting("b", 3))
    next(first)
    assert sum(finished.value for finished in second) == 3
    assert "".join(begun) == "aaabababa"  # the second came when the first had begun two
    assert sum(finished.value for finished in first) == 5


def test_rows_of_a_session_that_was_left_are_not_computed() -> None:
    """But for those of calls that the device has been given."""
    engine = Engine(analytic(), call_size=4)
    left = engine.run([asks_for(1), asks_for(20)])
    next(left)
    done = engine.stats.network_rows
    left.close()
    assert engine.run_one(asks_for(1)) == 1
    assert engine.stats.network_rows <= done + GIVEN_CALLS * 4 + 1 < 21


def failing(message: str) -> Steps[None]:
    yield from asks_for(1)
    raise EditError(message)


def test_a_method_that_raises_ends_alone() -> None:
    results = list(Engine(analytic()).run([asks_for(2), failing("no such word"), asks_for(3)]))
    errors = {finished.index: str(finished.error) for finished in results if finished.error}
    assert errors == {1: "no such word"}
    assert sorted(finished.value for finished in results if finished.error is None) == [2, 3]


def test_a_fork_returns_results_and_exceptions_in_the_places_of_its_children() -> None:
    def parent() -> Steps[list[Any]]:
        return (yield Fork((asks_for(2), failing("child"), asks_for(1))))

    engine = Engine(analytic())
    (finished,) = engine.run([parent()])
    first, error, last = finished.value
    assert (first, str(error), last) == (2, "child", 1)
    assert finished.network_rows == 4


class Poisoned(AnalyticBackbone):
    """Fails wherever a row of a given timestep is in a call, or where a call is too large."""

    def __init__(self, bad_timestep: int = -1, largest: int = 10**6) -> None:
        super().__init__()
        self.bad_timestep, self.largest = bad_timestep, largest

    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        if len(call.levels) > self.largest:
            raise torch.OutOfMemoryError("pretended")
        if self.bad_timestep in [level.timestep for level in call.levels]:
            raise RuntimeError("pretended fault")
        return super().denoise(call)


def asks_at(timestep: int) -> Steps[Tensor]:
    (prompt,) = yield EncodeText(("hat",))
    denoised = yield Denoise(source(analytic(), 1).latents[None], levels(analytic(), [timestep]), [prompt])
    return denoised.predictions.noise


def test_a_row_that_breaks_a_call_fails_alone() -> None:
    results = list(Engine(Poisoned(bad_timestep=5), call_size=4).run(asks_at(t) for t in (4, 5, 6)))
    assert {finished.index: str(finished.error) for finished in results if finished.error} == {1: "pretended fault"}
    assert len(results) == 3


def test_a_shared_row_that_breaks_its_call_fails_all_who_asked_and_nobody_else() -> None:
    latents = source(analytic(), 1).latents

    def both() -> Steps[int]:
        (prompt,) = yield EncodeText(("hat",))
        return len(
            (yield Denoise(latents.expand(2, -1, -1, -1), levels(analytic(), [5, 6]), [prompt] * 2)).predictions.noise
        )

    def asked() -> list[Steps[Any]]:
        return [both(), asks_of(latents, ["hat"], timestep=5), asks_of(latents, ["hat"], timestep=6), both()]

    for size in (1, 4):  # in calls of one row, later rows of a call that failed are still in the queue
        results = list(Engine(Poisoned(bad_timestep=5), call_size=size).run(asked()))
        assert sorted(finished.index for finished in results) == [0, 1, 2, 3]
        errors = {finished.index: str(finished.error) for finished in results if finished.error}
        assert errors == dict.fromkeys((0, 1, 3), "pretended fault")


def test_out_of_memory_halves_the_call_until_it_fits_and_loses_no_row() -> None:
    engine = Engine(Poisoned(largest=2), call_size=8)
    assert engine.run_one(asks_for(7)) == 7
    assert engine.call_size == 2


def test_out_of_memory_at_one_row_fails_that_image() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Engine(Poisoned(largest=0), call_size=2).run_one(asks_for(3))


def test_a_source_that_raises_is_raised_where_it_was_given() -> None:
    def broken() -> Any:
        yield asks_for(1)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(Engine(analytic()).run(broken()))


def test_what_is_no_call_is_refused() -> None:
    def wrong() -> Steps[None]:
        yield "text"  # type: ignore[misc]

    with pytest.raises(TypeError, match="no model call"):
        Engine(analytic()).run_one(wrong())
