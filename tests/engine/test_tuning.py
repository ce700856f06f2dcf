"""How the fastest way to run a network is found: by a clock that the model itself moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.engine import tuning
from pipeline.engine.calls import NetworkAnswer, NetworkCall
from pipeline.engine.sizing import trial_call
from pipeline.engine.tuning import ROUNDS, UNTUNED, Tuning, Ways, tune
from pipeline.errors import ModelError
from pipeline.models.analytic import AnalyticBackbone
from pipeline.recipe import Recipe, recipe_from
from pipeline.running.worker import CPU_CALL_SIZE, fit
from pipeline.writing.run_record import run_record
from tests.methods import levels, source

ROWS = 4
WAYS: Ways = {
    "attention": ("flash", "cudnn"),
    "layout": ("channels_last",),
    "execution": ("compiled", "graphs"),
}
CHANNELS_LAST = Tuning(layout="channels_last")


def recipe_for(**sections: Mapping[str, Any]) -> Recipe:
    sections = {"model": {"name": "analytic"}, **sections}
    return recipe_from({"source": {"shards": "-"}, "edits": {"e": {}}, "sink": {"folder": "-"}, **sections})


class Tunable(AnalyticBackbone):
    """A call takes the time that a table says of the way in which it runs."""

    ways = WAYS

    def __init__(self, seconds: Callable[[Tuning], float]) -> None:
        super().__init__()
        self.now, self.seconds = 0.0, seconds
        self.rows: list[tuple[str, int]] = []
        self.wrong: Callable[[Tuning, Tensor], Tensor] = lambda _, noise: noise

    def tune(self, tuning: Tuning) -> None:
        self.tuning = tuning

    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        self.now += self.seconds(self.tuning)
        self.rows.append((str(self.tuning), len(call.levels)))
        answer = super().denoise(call)
        return answer.each(lambda one: self.wrong(self.tuning, one))


def halved(tuning: Tuning) -> float:
    """Seconds of a call that every choice makes half as long, but for one attention."""
    gains = [tuning.attention == "cudnn", tuning.layout == "channels_last", tuning.execution == "graphs"]
    return 0.5 ** sum(gains) * (2.0 if tuning.attention == "flash" else 1.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tunable], Tunable]:
    def of(model: Tunable) -> Tunable:
        monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: model.now))
        return model

    return of


def call_of(model: Tunable) -> NetworkCall:
    latents = torch.stack([source(model, number).latents for number in range(ROWS)])
    return NetworkCall(latents, levels(model, [401] * ROWS), [model.encode_text("hat")] * ROWS)


def test_each_choice_is_made_from_the_best_so_far(clock: Callable[[Tunable], Tunable]) -> None:
    model = clock(Tunable(halved))
    found = tune(model, call_of(model), WAYS)
    assert found.tuning == model.tuning == Tuning(attention="cudnn", layout="channels_last", execution="graphs")
    assert found.rows_per_second == {
        "as loaded": 4.0,
        "flash": 2.0,
        "cudnn": 8.0,
        "cudnn, channels_last": 16.0,
        "cudnn, channels_last, compiled": 16.0,
        "cudnn, channels_last, graphs": 32.0,
    }
    assert model.rows.count(("as loaded", ROWS)) == 2 + ROUNDS


def test_what_gains_too_little_is_not_taken(clock: Callable[[Tunable], Tunable]) -> None:
    model = clock(Tunable(lambda way: 1.0 if way == UNTUNED else 1 / 1.01))
    assert tune(model, call_of(model), WAYS).tuning == UNTUNED == model.tuning


def off(noise: Tensor) -> Tensor:
    return noise * 1.01


def no_number(noise: Tensor) -> Tensor:
    return noise * float("nan")


def by_neighbours(noise: Tensor) -> Tensor:
    return noise + noise[-1, 0, 0, 0] * 1e-4


def raises(noise: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this device")


@pytest.mark.parametrize("wrong", [off, no_number, by_neighbours, raises])
def test_a_way_that_answers_otherwise_is_not_taken_and_named(
    wrong: Callable[[Tensor], Tensor], clock: Callable[[Tunable], Tunable], caplog: pytest.LogCaptureFixture
) -> None:
    model = clock(Tunable(halved))
    model.wrong = lambda way, one: wrong(one) if way.layout == "channels_last" else one
    found = tune(model, call_of(model), WAYS)
    assert found.tuning == model.tuning == Tuning(attention="cudnn", execution="graphs")
    assert "cudnn, channels_last" not in found.rows_per_second
    reasons = {
        off: "its predictions are off by 0.01 of their size",
        no_number: "its predictions are off by nan of their size",
        by_neighbours: "a row's bits depend on the rows beside it",
        raises: "RuntimeError: no kernel image is available",
    }
    assert caplog.messages == [f"the network is not run cudnn, channels_last here: {reasons[wrong]}"]


def test_a_run_is_tuned_at_its_call_size_and_compiled_last(clock: Callable[[Tunable], Tunable]) -> None:
    model = clock(Tunable(halved))
    fitted = fit(recipe_for(run={"call_size": 6}), model)
    assert (fitted.call_size, fitted.tuned.tuning) == (6, model.tuning)
    assert model.tuning.execution == "graphs"
    assert {rows for _, rows in model.rows} == {6}
    assert "compiled" not in "".join(way for way, _ in model.rows[: -3 * (2 + ROUNDS)])
    assert len(fitted.tuned.rows_per_second) == 6


def test_a_call_that_does_not_fit_into_memory_leaves_the_network_as_it_is_loaded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def too_much(way: Tuning) -> float:
        raise torch.OutOfMemoryError("pretended")

    model = Tunable(too_much)
    fitted = fit(recipe_for(run={"call_size": 64}), model)
    assert (fitted.call_size, fitted.tuned.tuning, model.tuning) == (64, UNTUNED, UNTUNED)
    assert caplog.messages == ["calls of 64 rows do not fit into memory, so the network runs as it is loaded"]


def test_a_trial_has_what_the_network_takes_beside_latents_and_sides_that_fit_it() -> None:
    model = AnalyticBackbone()
    model.offers = dataclasses.replace(model.offers, inputs=frozenset({"inpaint"}))
    call = trial_call(model, 5 * model.multiple + 1, 3)
    side = 5 * model.multiple // model.latent_scale
    assert call.latents.shape == (3, model.latent_channels, side, side)
    assert call.beside["inpaint"].shape == (3, 1 + model.latent_channels, side, side)
    assert not call.latents[0].equal(call.latents[1])


def test_compile_false_runs_the_network_as_it_is_loaded() -> None:
    model = Tunable(halved)
    recipe = recipe_for(model={"name": "analytic", "compile": False})
    assert fit(recipe, model).tuned.tuning == UNTUNED
    assert not model.rows


def test_a_later_driver_runs_the_network_as_the_first_one_did() -> None:
    model, recipe = Tunable(halved), recipe_for()
    before = run_record(recipe, [], model.record, 6, 1, tuning.Tuned(tuning=CHANNELS_LAST, rows_per_second={"x": 1.0}))
    fitted = fit(recipe, model, type(before).model_validate_json(before.to_bytes()))
    assert model.tuning == CHANNELS_LAST
    assert not model.rows  # nothing is tried
    assert (fitted.call_size, fitted.tuned) == (6, before.tuned)
    with pytest.raises(ModelError, match=r"cannot be run channels_last\. Set another sink\.folder"):
        fit(recipe, AnalyticBackbone(), before)


def test_on_a_cpu_there_is_one_way() -> None:
    fitted = fit(recipe_for(), AnalyticBackbone())
    assert fitted == tuning.Fit(call_size=CPU_CALL_SIZE, tuned=tuning.NOT_TUNED)
    assert str(dataclasses.replace(UNTUNED, projections="joined", execution="graphs")) == "joined, graphs"
