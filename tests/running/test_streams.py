"""Units in one process: one stream of rows, commits per unit; what the device's failure costs."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pipeline.engine.calls import NetworkAnswer, NetworkCall
from pipeline.engine.engine import Engine
from pipeline.errors import DeviceError
from pipeline.models.analytic import AnalyticBackbone
from pipeline.reading.decoder import DecodesHere
from pipeline.recipe import Recipe, recipe_from
from pipeline.running import driver, in_process, worker
from pipeline.samples import UnitInput
from pipeline.writing.commit import FinishedUnit
from tests.runs import EDITS, asked, contents, recipe_data, results, write_shards

SHARDS, ROWS, UNITS = 2, 8, 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("streams") / "in", shards=SHARDS, rows=ROWS)


def a_recipe(shards: Path, out: Path) -> Recipe:
    return recipe_from(recipe_data(shards, out, engine="local", call_size=8))


def test_the_tail_of_a_unit_and_the_head_of_the_next_share_calls(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[Engine] = []
    made = Engine.__init__

    def noted(self: Engine, *args: Any, **options: Any) -> None:
        engines.append(self)
        made(self, *args, **options)

    network, finish = AnalyticBackbone.denoise, worker.Worker.finish
    at_once, begun, ended = 1, list[str](), list[str]()

    def finished(self: worker.Worker, unit_input: UnitInput, *rest: Any) -> FinishedUnit:
        begun.append(unit_input.unit.id)
        try:
            return finish(self, unit_input, *rest)
        finally:
            ended.append(unit_input.unit.id)

    def slow(self: AnalyticBackbone, call: NetworkCall) -> NetworkAnswer:
        """As a model takes its time, in which the next unit is read and prepared: on a busy machine long."""
        until = time.monotonic() + 10
        while len(begun) - len(ended) < at_once and len(begun) % UNITS and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        return network(self, call)

    monkeypatch.setattr(Engine, "__init__", noted)
    monkeypatch.setattr(AnalyticBackbone, "denoise", slow)
    monkeypatch.setattr(worker.Worker, "finish", finished)
    monkeypatch.setattr(worker, "Decoder", lambda _: DecodesHere())  # no process whose turn may come late
    padded = {}
    for at_once in (1, 2):
        monkeypatch.setattr(in_process, "UNITS_AT_ONCE", at_once)
        driver.run(a_recipe(shards, tmp_path / f"{at_once}"), progress="off")
        padded[at_once] = engines[-1].stats.padded_rows
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert results(tmp_path / "2") == asked(shards=SHARDS, rows=ROWS)
    assert padded[2] < padded[1], padded  # how much less depends on the turns that threads get
    at_once = 1
    monkeypatch.setattr(in_process, "HELD_BYTES", 0)  # units so large that the next one is not read beside them
    driver.run(a_recipe(shards, tmp_path / "large"), progress="off")
    assert engines[-1].stats.padded_rows == padded[1]
    assert contents(tmp_path / "large") == contents(tmp_path / "2")


def test_units_are_committed_in_their_order_and_the_first_is_not_held_up(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    commit, finish = in_process.commit, AnalyticBackbone.denoise

    def noted(finished: Any, *rest: Any) -> Any:
        order.append(f"commit {finished.manifest.chunk}")
        return commit(finished, *rest)

    monkeypatch.setattr(in_process, "commit", noted)
    monkeypatch.setattr(AnalyticBackbone, "denoise", lambda self, call: order.append("call") or finish(self, call))
    driver.run(a_recipe(shards / "s0.tar", tmp_path), progress="off")
    commits = [what for what in order if what != "call"]
    assert commits == [f"commit {chunk}" for chunk in range(len(commits))]
    assert order.index("commit 0") < 0.6 * len(order)


def test_a_device_that_fails_ends_the_run_and_the_same_command_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.run(a_recipe(shards, tmp_path / "calm"), progress="off")
    network, calls = AnalyticBackbone.denoise, itertools.count(1)

    def fail(self: AnalyticBackbone, call: NetworkCall) -> NetworkAnswer:
        if next(calls) >= 20:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return network(self, call)

    with monkeypatch.context() as broken:
        broken.setattr(AnalyticBackbone, "denoise", fail)
        with pytest.raises(DeviceError, match="the same command goes on"):
            driver.run(a_recipe(shards, tmp_path / "out"), progress="off")
    assert not list((tmp_path / "out").glob("_attempts/*"))
    summary = driver.run(a_recipe(shards, tmp_path / "out"), progress="off")
    assert (summary.complete, summary.failed_by_class) == (True, {"DecodeError": 2})
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


def test_without_the_round_trip_pictures_are_the_same_and_one_decoding_per_image_is_saved(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, decoded = AnalyticBackbone.decode_latents, Counter[str]()
    rows = {}
    for name in ("with", "without"):
        monkeypatch.setattr(
            AnalyticBackbone,
            "decode_latents",
            lambda self, latents, name=name: decoded.update({name: 1}) or decode(self, latents),
        )
        data = recipe_data(shards, tmp_path / name, engine="local", sink={"round_trip": name == "with"})
        driver.run(recipe_from(data), progress="off")
        rows[name] = [
            row for file in (tmp_path / name / "data").glob("*.parquet") for row in pq.read_table(file).to_pylist()
        ]
    images = SHARDS * ROWS - 1  # one is no image
    assert decoded == {"with": images * (1 + len(EDITS)), "without": images * len(EDITS)}
    ours, others = ({(row["id"], row["edit"]): row for row in rows[name]} for name in ("with", "without"))
    assert ours.keys() == others.keys()
    for key, row in ours.items():
        changed = {name for name, value in row.items() if others[key][name] != value}
        assert changed <= {"reconstruction_psnr", "edit_change", "rest_change", "recipe_hash"}, changed
        assert others[key]["reconstruction_psnr"] is None
