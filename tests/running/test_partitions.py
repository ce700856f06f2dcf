"""Several commands share one run: each edits its partition, one set of results comes out, and one of them finishes."""

from __future__ import annotations

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import partitions
from benchmarks.partitions import data_of, is_whole, run_in_parts
from pipeline.cli import app
from pipeline.common.partition import Partition
from pipeline.errors import EncodeError, HeldError, SinkError
from pipeline.looking.planning import plan
from pipeline.recipe import Recipe, recipe_from
from pipeline.running import driver, worker
from pipeline.writing import restoring
from pipeline.writing.commit import committed_units
from pipeline.writing.lock import DriverLock
from pipeline.writing.run_record import read_run_record
from tests.places import Place, only_on_s3
from tests.runs import recipe_data, write_shards

pytestmark = pytest.mark.timeout(300)
EVEN, ODD = Partition(0, 2), Partition(1, 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("parts") / "in", shards=partitions.SHARDS, rows=partitions.ROWS)


@pytest.fixture(scope="module")
def calm(source: Path) -> dict[str, bytes]:
    """What one command writes."""
    out = source.parent / "calm"
    driver.run(recipe_from(recipe_data(source, out, engine="local")), progress="off")
    return data_of(out)


@pytest.fixture
def recipe(source: Path, tmp_path: Path) -> Recipe:
    return recipe_from(recipe_data(source, tmp_path / "out", engine="local"))


@pytest.mark.parametrize("count", [2, 4])
def test_partitions_at_once_that_are_killed_at_random_give_the_set_and_the_bytes_of_one_command(
    source: Path, calm: dict[str, bytes], tmp_path: Path, count: int
) -> None:
    found = run_in_parts(recipe_data(source, tmp_path / "out", engine="local"), count, seed=count, deadly=0.2)
    assert (found["failed"], found["killed"] >= count) == (0, True)
    assert is_whole(tmp_path / "out", calm)


def test_a_partition_edits_its_shards_alone_and_the_last_one_finishes(
    recipe: Recipe, calm: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = driver.run(recipe, progress="lines", partition=EVEN)
    assert (first.outcome, first.exit_code, first.complete) == ("partition complete", 0, False)
    assert "partition 0 of 2 done; 4 shards of others left" in capsys.readouterr().err
    assert {one.shard for one in committed_units(recipe.sink)} == {f"s{number}.tar" for number in (0, 2, 4, 6)}
    assert not (out / "summary.json").exists()
    last = driver.run(recipe, progress="off", partition=ODD)
    assert (last.complete, last.units, last.units_now) == (True, 16, 8)
    assert is_whole(out, calm)


def test_a_run_goes_on_with_other_partitions_or_none(recipe: Recipe, calm: dict[str, bytes], tmp_path: Path) -> None:
    done = [driver.run(recipe, progress="off", partition=part) for part in (EVEN, Partition(1, 4), Partition(0, 3))]
    assert [one.units_now for one in done] == [8, 4, 2]  # of shards 0, 3, 6 one is left
    assert driver.run(recipe, progress="off").units_now == 2
    assert is_whole(tmp_path / "out", calm)


def test_failed_units_are_tried_again_by_partitions(recipe: Recipe, calm: dict[str, bytes], tmp_path: Path) -> None:
    restored = restoring.restored

    def hindered(decoded: Any) -> Any:
        if decoded.prepared.sample.key in ("im00", "im05"):
            raise EncodeError("out of memory")
        return restored(decoded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restoring, "restored", hindered)
        assert driver.run(recipe, progress="off").failed == 6
    for part, units in ((EVEN, 2), (ODD, 1)):  # im03 of shard 0 is no image
        assert driver.run(recipe, progress="off", partition=part, retry_failed=True).units_now == units
    assert sorted(data_of(tmp_path / "out").values()) == sorted(calm.values())


def test_partitions_that_begin_a_run_together_agree_on_what_decides_bits(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = itertools.count(3)  # as machines with more or less memory would choose
    monkeypatch.setattr(worker, "call_size_for", lambda *_: (next(sizes), {}))
    monkeypatch.setattr(driver, "WAIT_S", 0.05)
    with ThreadPoolExecutor(3) as pool:
        parts = [Partition(index, 3) for index in range(3)]
        list(pool.map(lambda part: driver.run(recipe, progress="off", partition=part), parts))
    record = read_run_record(recipe.sink)
    assert record is not None
    assert {manifest.call_size for manifest in committed_units(recipe.sink)} == {record.call_size}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["complete"]


def test_overlapping_drivers_are_refused_and_a_partition_with_nothing_left_ends_well(recipe: Recipe) -> None:
    with DriverLock(recipe.sink, pytest.fail, partition=EVEN):
        for part in (Partition(), EVEN, Partition(2, 4), Partition(0, 3)):
            with pytest.raises(HeldError, match=r"partition 0/2 of .* is being written by another driver"):
                driver.run(recipe, progress="off", partition=part)
        assert driver.run(recipe, progress="off", partition=ODD).outcome == "partition complete"
    with DriverLock(recipe.sink, pytest.fail):
        assert driver.run(recipe, progress="off", partition=ODD).outcome == "partition complete"
        with pytest.raises(HeldError):
            driver.run(recipe, progress="off", partition=EVEN)


def test_a_plan_of_a_partition_counts_its_shards(recipe: Recipe) -> None:
    whole, part = plan(recipe, probe=False), plan(recipe, probe=False, partition=Partition(2, 3))
    assert (whole.shards, whole.images) == (8, 32)
    assert (part.shards, part.images) == (2, 8)
    assert plan(recipe, probe=False, partition=Partition(8, 9)).images == 0


@pytest.mark.parametrize("text", ["2/2", "0", "-1/2", "0/0", "a/b", "1/2/3"])
def test_what_is_no_partition_is_refused_with_the_way_out(text: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["edit", str(tmp_path / "none.yaml"), f"--partition={text}"])
    assert done.exit_code == 2
    assert "give I/N" in " ".join(done.output.split())


@only_on_s3
def test_of_two_commands_at_once_on_a_store_without_conditional_puts_one_is_refused(place: Place) -> None:
    write_shards(place.root / "in", shards=2, rows=4)
    recipe, barrier, outcomes = place.recipe("in", "out"), threading.Barrier(2), []

    def edit() -> None:
        barrier.wait()
        try:
            outcomes.append(driver.run(recipe, progress="off").outcome)
        except SinkError as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=edit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["HeldError", "complete with failures"]
