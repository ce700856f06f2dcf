"""Storage that fails: what is committed stays valid, the rerun completes, and the bytes are those of a calm run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline import cluster
from pipeline.errors import ShardeditError, SinkError
from pipeline.evaluation.report import write_report
from pipeline.evaluation.results import RunFolder
from pipeline.reading import storage
from pipeline.recipe import recipe_from
from pipeline.writing import files as files_module
from pipeline.writing.commit import committed_units
from tests.faulty import faulty_proxy
from tests.places import Place, only_on_s3
from tests.runs import asked, contents, recipe_data, results, rows, write_shards

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
    cluster.run(recipe, progress="off")
    return contents(place.folder(recipe))


@pytest.fixture(scope="module")
def calm_unmerged(place: Place, source: None) -> dict[str, Any]:
    recipe = place.recipe("in", "calm-unmerged", sink=UNMERGED)
    cluster.run(recipe, progress="off")
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
        with faulty_proxy(place.endpoint, full=is_full) as (endpoint, counts):
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
        cluster.run(cramped.recipe("in", out.name, sink=UNMERGED), progress="off")
    committed = len(list(committed_units(recipe.sink)))  # those whose files are there
    assert 1 <= committed <= 3
    assert len(list(out.glob("_units/*/*.json"))) == committed, "a manifest came before its files"
    assert contents(out).items() <= calm_unmerged.items(), "a file is there and not whole"
    assert cluster.run(recipe, progress="off").complete
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
        cluster.run(cramped.recipe("in", out.name, sink=MERGED), progress="off")
    assert len(list(committed_units(recipe.sink))) == 4
    assert cluster.run(recipe, progress="off").units_now == 0
    assert contents(out) == calm
    assert results(out) == asked(shards=2, rows=4)


@only_on_s3
def test_refused_requests_and_cut_bodies_change_no_byte_and_leave_the_rows_of_local_files(
    place: Place, calm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.02)
    data = recipe_data(place.root / "in", tmp_path / "out", sink=MERGED, engine="local")
    cluster.run(recipe_from(data), progress="off")
    with faulty_proxy(place.endpoint, refuse=0.2, cut=0.5) as (endpoint, counts):
        recipe = place.through(endpoint, **UNAIDED).recipe("in", "run", sink=MERGED)
        for _ in range(10):  # a body that is cut five times in a row ends a run; the same command goes on
            with contextlib.suppress(ShardeditError):
                if cluster.run(recipe, progress="off").complete:
                    break
        assert counts["refused"] > 10
        assert counts["cut"] > 5
    out = place.folder(recipe)
    assert contents(out) == calm
    assert rows(out) == rows(tmp_path / "out")
    assert results(out) == asked(shards=2, rows=4)


@only_on_s3
@pytest.mark.usefixtures("calm")
def test_a_report_is_written_from_a_store_that_refuses_requests_and_cuts_bodies(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(storage, "ATTEMPTS", 12)  # with such a share of faults five would now and then not do
    recipe = place.recipe("in", "reported")
    cluster.run(recipe, progress="off")
    report = place.folder(recipe) / "report.html"
    wanted = report.read_bytes()
    report.unlink()
    with faulty_proxy(place.endpoint, refuse=0.2, cut=0.3) as (endpoint, counts):
        write_report(place.through(endpoint).sink("reported"))
        assert min(counts["refused"], counts["cut"]) > 1
    assert report.read_bytes() == wanted


def test_a_store_that_answers_no_more_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_shards(tmp_path / "in", shards=2, rows=4)
    recipe = recipe_from(recipe_data(source, tmp_path / "out", engine="local"))
    cluster.run(recipe, progress="off")
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
        cluster.run(stranger.recipe("in", "denied"), progress="off")
    assert "wrong-secret" not in str(caught.value)
    assert not (place.root / "denied").exists()
