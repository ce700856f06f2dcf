"""Storage that fails: what is committed stays valid, the rerun completes, and the bytes are those of a calm run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from benchmarks.faults.campaign import Results, plan, sums
from benchmarks.faults.judge import judge, look
from benchmarks.faults.kinds import Kind, Played, drawn
from pipeline.errors import ShardeditError, SinkError
from pipeline.looking.report.page import write_report
from pipeline.looking.results import RunFolder
from pipeline.reading import storage
from pipeline.recipe import recipe_from
from pipeline.running import driver
from pipeline.writing import files as files_module
from pipeline.writing.commit import committed_units
from tests.faulty import dice, faulty_proxy, full_where
from tests.places import Place, only_on_s3
from tests.runs import asked, contents, recipe_data, results, rows_on_any_store, write_shards

pytestmark = pytest.mark.timeout(300)
# Without botocore's own attempts, which wait for seconds and would keep most faults from our own.
UNAIDED = {"config_kwargs": {"retries": {"max_attempts": 0}}}


UNMERGED = {"shard_size": 0}
MERGED = {"shard_size": 60_000}  # two units each


@pytest.fixture(scope="module")
def source(place: Place) -> None:
    write_shards(place.root / "in", shards=2, rows=4)


@pytest.fixture(scope="module")
def calm(place: Place, source: None) -> dict[str, Any]:
    recipe = place.recipe("in", "calm", sink=MERGED)
    driver.run(recipe, progress="off")
    return contents(place.folder(recipe))


@pytest.fixture(scope="module")
def calm_unmerged(place: Place, source: None) -> dict[str, Any]:
    recipe = place.recipe("in", "calm-unmerged", sink=UNMERGED)
    driver.run(recipe, progress="off")
    return contents(place.folder(recipe))


@contextlib.contextmanager
def full_after(room: int, place: Place, at: str) -> Iterator[Place]:
    """The place, with room for so many files whose path holds `at`.

    A file is put to S3 from memory, so that no disk of this machine can be full: there the store says that it is.
    """
    fitted: list[str] = []

    def is_full(path: str) -> bool:
        if at in path and path not in fitted:
            if len(fitted) == room:
                return True
            fitted.append(path)
        return False

    if place.kind == "s3":
        with faulty_proxy(place.endpoint, full_where(is_full)) as (endpoint, counts):
            yield place.through(endpoint)
        assert counts["full"]
        return
    made: Callable[..., Any] = files_module._made_locally

    def full(path: Path, *args: Any) -> Any:
        if is_full(str(path)):
            raise OSError(28, "No space left on device")
        return made(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module, "_made_locally", full)
        yield place


@pytest.mark.parametrize("at", ["/data/", "/_units/", "/_attempts/"])
def test_a_full_store_ends_the_run_and_the_rerun_with_room_completes_it(
    place: Place, calm_unmerged: dict[str, Any], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.02)
    recipe = place.recipe("in", place.new(), sink=UNMERGED)
    out = place.folder(recipe)
    with full_after(2, place, at) as cramped, pytest.raises(SinkError, match="No space left"):
        driver.run(cramped.recipe("in", out.name, sink=UNMERGED), progress="off")
    committed = len(list(committed_units(recipe.sink)))  # those whose files are there
    assert 1 <= committed <= 3
    assert len(list(out.glob("_units/*/*.json"))) == committed, "a manifest came before its files"
    assert contents(out).items() <= calm_unmerged.items(), "a file is there and not whole"
    assert driver.run(recipe, progress="off").complete
    assert contents(out) == calm_unmerged
    assert results(out) == asked(shards=2, rows=4)


@pytest.mark.parametrize("at", ["/data/train-", "/_output/"])
def test_a_store_that_is_full_while_units_are_merged_loses_none_and_the_rerun_merges_them(
    place: Place, calm: dict[str, Any], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.02)
    recipe = place.recipe("in", place.new(), sink=MERGED)
    out = place.folder(recipe)
    with full_after(1, place, at) as cramped, pytest.raises(SinkError, match="No space left"):
        driver.run(cramped.recipe("in", out.name, sink=MERGED), progress="off")
    assert len(list(committed_units(recipe.sink))) == 4
    assert driver.run(recipe, progress="off").units_now == 0
    assert contents(out) == calm
    assert results(out) == asked(shards=2, rows=4)


@pytest.mark.slow  # up to ten runs; a report through the same faults is fast
@only_on_s3
def test_refused_requests_and_cut_bodies_change_no_byte_and_leave_the_rows_of_local_files(
    place: Place, calm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.02)
    data = recipe_data(place.root / "in", tmp_path / "out", sink=MERGED, engine="local")
    driver.run(recipe_from(data), progress="off")
    with faulty_proxy(place.endpoint, dice(refuse=0.2, cut=0.5)) as (endpoint, counts):
        recipe = place.through(endpoint, **UNAIDED).recipe("in", "run", sink=MERGED)
        for _ in range(10):  # a body that is cut five times in a row ends a run; the same command goes on
            with contextlib.suppress(ShardeditError):
                if driver.run(recipe, progress="off").complete:
                    break
        assert counts["refused"] > 10
        assert counts["cut"] > 5
    out = place.folder(recipe)
    assert contents(out) == calm
    assert rows_on_any_store(out) == rows_on_any_store(tmp_path / "out")
    assert results(out) == asked(shards=2, rows=4)


@only_on_s3
@pytest.mark.usefixtures("calm")
def test_a_report_is_written_from_a_store_that_refuses_requests_and_cuts_bodies(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(storage, "ATTEMPTS", 12)  # with such a share of faults five would now and then not do
    recipe = place.recipe("in", "reported")
    driver.run(recipe, progress="off")
    report = place.folder(recipe) / "report.html"
    wanted = report.read_bytes()
    report.unlink()
    with faulty_proxy(place.endpoint, dice(refuse=0.2, cut=0.3)) as (endpoint, counts):
        write_report(place.through(endpoint).sink("reported"))
        assert min(counts["refused"], counts["cut"]) > 1
    assert report.read_bytes() == wanted


def test_a_store_that_answers_no_more_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_shards(tmp_path / "in", shards=2, rows=4)
    recipe = recipe_from(recipe_data(source, tmp_path / "out", engine="local"))
    driver.run(recipe, progress="off")
    opened: list[str] = []

    def broken(self: Any, path: str, *_: Any, **__: Any) -> Any:
        opened.append(path)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
    folder = RunFolder(recipe.sink)
    monkeypatch.setattr(LocalFileSystem, "open", broken)
    with pytest.raises(SinkError, match=r"train-.*\.parquet cannot be read: OSError: .*Input/output error"):
        folder.figures(folder.spans("data")[:1])
    assert len(opened) == storage.ATTEMPTS


@only_on_s3
@pytest.mark.usefixtures("calm")
def test_a_wrong_secret_is_a_short_error_and_nothing_is_written(place: Place) -> None:
    stranger = replace(place, storage_options={**place.storage_options, "secret": "wrong-secret"})
    with pytest.raises(ShardeditError, match=r"(?i)denied|refused|forbidden|signature") as caught:
        driver.run(stranger.recipe("in", "denied"), progress="off")
    assert "wrong-secret" not in str(caught.value)
    assert not (place.root / "denied").exists()


# The campaign (benchmarks/faults) --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a merged file of each kind."""
    folder = tmp_path_factory.mktemp("judged")
    source = write_shards(folder / "in", shards=1, rows=4)
    driver.run(recipe_from(recipe_data(source, folder / "out", sink=MERGED, engine="local")), progress="off")
    return folder / "out"


def a_file_is_gone(run: Path) -> None:
    next(run.glob("data/*.parquet")).unlink()


def a_file_is_there_twice(run: Path) -> None:
    file = next(run.glob("data/*.parquet"))
    shutil.copy(file, file.with_name("train-00007-of-00008.parquet"))


def a_row_has_moved_to_quarantine(run: Path) -> None:
    """As a zombie would do it, but for the manifests."""
    data, quarantine = next(run.glob("data/*.parquet")), next(run.glob("quarantine/*.parquet"))
    good, bad = pq.read_table(data), pq.read_table(quarantine)
    moved = bad.slice(0, 1).to_pylist()[0] | good.select(["id", "edit", "method"]).slice(0, 1).to_pylist()[0]
    pq.write_table(good.slice(1), data)
    pq.write_table(pa.Table.from_pylist([*bad.to_pylist(), moved], bad.schema), quarantine)


def a_picture_has_changed(run: Path) -> None:
    data = next(run.glob("data/*.parquet"))
    table = pq.read_table(data)
    rows = [row | {"seed": row["seed"] + (at == 0)} for at, row in enumerate(table.to_pylist())]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), data)


def the_summary_is_another_runs(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"done": summary["done"] - 1}))


@pytest.mark.parametrize(
    ("spoil", "sees"),
    [
        (a_file_is_gone, "lost"),
        (a_file_is_there_twice, "doubled"),
        (a_row_has_moved_to_quarantine, "healthy_quarantined"),
        (a_picture_has_changed, "differing"),
        (the_summary_is_another_runs, "contradictions"),
    ],
)
@pytest.mark.parametrize("noise", [False, True])
def test_the_judge_of_the_campaign_sees_what_is_wrong(
    whole_run: Path, tmp_path: Path, spoil: Callable[[Path], None], sees: str, noise: bool
) -> None:
    calm = look(whole_run)
    assert judge(whole_run, calm, noise=noise).whole
    spoiled = shutil.copytree(whole_run, tmp_path / "out")
    spoil(spoiled)
    verdict = judge(spoiled, calm, noise=noise)
    assert getattr(verdict, sees), verdict
    assert not verdict.whole


def test_a_campaign_goes_on_where_a_part_of_it_ended(tmp_path: Path) -> None:
    kinds = [
        Kind(name, "files", lambda stage, what: Played(), drawn(count, lambda calm, rng, number: {"at": rng.random()}))
        for name, count in (("many", 30), ("few", 3))
    ]
    calm: Any = {"files": None}
    cases = plan(kinds, calm, 0, 1.0)
    assert [case.id for case in cases] == [case.id for case in plan(kinds, calm, 0, 1.0)]
    assert [case.id for case in cases] != [case.id for case in plan(kinds, calm, 1, 1.0)]
    assert len({case.id for case in cases}) == 33
    assert {case.kind.name for case in plan(kinds, calm, 0, 0.1)} == {"many", "few"}
    results = Results(tmp_path)
    results.add({"id": cases[0].id, "faults": 1, "complaints": []})
    assert Results(tmp_path).done == {cases[0].id}
    assert sums(Results(tmp_path).rows)["faults"] == 1


@pytest.mark.timeout(900)  # a busy machine makes it wait for many processes
def test_one_fault_of_each_kind_on_files_is_survived(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.faults", "--kind", "on files", "--count", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "build" / "faults.json").read_text())
    assert found["faults"] >= len(found["by_kind"]) > 10
    assert found["lost"] == found["doubled"] == found["contradictions"] == found["healthy_quarantined"] == 0
    assert found["bytes_equal"]
