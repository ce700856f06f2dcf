"""`--retry-failed`: what failed is tried again, what was good keeps its bytes, and a kill leaves one commit whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import cluster, flow
from pipeline.errors import EncodeError, RunAborted
from pipeline.recipe import Recipe, recipe_from
from pipeline.runs import find_run
from pipeline.verify import verify
from pipeline.writing import commit, folding, lock, replace
from tests.runs import asked, contents, recipe_data, results, write_shards

pytestmark = pytest.mark.timeout(120)


def recipe_for(folder: Path, out: str) -> Recipe:
    return recipe_from(recipe_data(folder / "in", folder / out, engine="local"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of two shards, whose row im03 is no image, and `calm`, a run over it in which nothing else failed."""
    folder = tmp_path_factory.mktemp("retry")
    write_shards(folder / "in", shards=2, rows=5)
    cluster.run(recipe_for(folder, "calm"), progress="off")
    return folder


@pytest.fixture
def failed(folder: Path, tmp_path: Path) -> Recipe:
    """A run over the same source in which im00 could not be encoded; what hindered it is over."""
    restored = flow.restored

    def hindered(decoded: Any) -> Any:
        if decoded.prepared.sample.key == "im00":
            raise EncodeError("out of memory")
        return restored(decoded)

    recipe = recipe_from(recipe_data(folder / "in", tmp_path / "out", engine="local"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "restored", hindered)
        assert cluster.run(recipe, progress="off").failed == 4
    return recipe


def rows(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Every row of data/, once."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted((out / "data").glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            assert (row["id"], row["edit"]) not in found
            found[row["id"], row["edit"]] = row
    return found


def test_what_failed_is_made_and_the_rest_of_its_unit_keeps_its_bytes(failed: Recipe, folder: Path) -> None:
    out = Path(failed.sink.folder)
    before = rows(out)
    others = {name: data for name, data in contents(out).items() if "s0-" not in name}
    summary = cluster.run(failed, progress="off", retry_failed=True)
    assert (summary.done, summary.failed, summary.complete, summary.exit_code) == (18, 2, True, 3)
    after = rows(out)
    assert {key: after[key] for key in before} == before
    assert after == rows(folder / "calm")
    assert results(out) == asked(shards=2, rows=5)
    assert {name: data for name, data in contents(out).items() if "s0-" not in name} == others
    assert verify(failed.sink, find_run(str(out)).record).clean


def test_without_the_flag_failed_rows_are_left_alone(failed: Recipe) -> None:
    out = Path(failed.sink.folder)
    before = contents(out)
    assert cluster.run(failed, progress="off").units_now == 0
    assert contents(out) == before


def test_what_fails_again_leaves_every_file_as_it_was(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "calm" / "data").iterdir()}
    calm = contents(folder / "calm")
    assert cluster.run(recipe_for(folder, "calm"), progress="off", retry_failed=True).failed == 2
    assert contents(folder / "calm") == calm
    assert {path: path.stat().st_mtime_ns for path in (folder / "calm" / "data").iterdir()} == before


class KilledError(Exception):
    """Stands for SIGKILL: nothing that the code does about it would have happened."""


@pytest.mark.parametrize("steps", range(6))
def test_a_kill_at_any_step_leaves_the_old_commit_or_the_new_one(
    steps: int, failed: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(failed.sink.folder)
    before = rows(out)
    left = steps

    def counted(function: Any) -> Any:
        def step(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError
            return function(*args)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(commit, "put", counted(commit.put))
        patch.setattr(replace, "put", counted(replace.put))
        patch.setattr(replace, "remove", counted(replace.remove))
        with pytest.raises(KilledError):
            cluster.run(failed, progress="off", retry_failed=True)
    record = find_run(str(out)).record
    found = verify(failed.sink, record)
    assert set(found.by_kind) <= {"stray file"}, found.findings
    assert (found.done, found.failed) in {(16, 4), (18, 2)}
    # The plain command settles it, one way or the other; the next retry ends it.
    cluster.run(failed, progress="off")
    assert rows(out).items() >= before.items()
    assert verify(failed.sink, record).clean
    assert results(out) == asked(shards=2, rows=5)
    cluster.run(failed, progress="off", retry_failed=True)
    assert rows(out) == rows(folder / "calm")


def test_a_driver_that_lost_the_folder_stops_before_the_manifest_and_the_other_one_settles_what_it_left(
    failed: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(failed.sink.folder)
    before = rows(out)
    put = replace.put

    def paused_put(fs: Any, path: str, data: bytes) -> None:
        put(fs, path, data)
        if "/data/" in path:  # meanwhile another driver takes over, settles as it starts, and is still at work
            monkeypatch.setattr(replace, "put", put)
            replace.settle_replacements(failed.sink)
            lock.create(fs, lock.lock_path(str(out), 2), b"{}")
            Path(lock.lock_path(str(out), 1)).unlink()

    monkeypatch.setattr(replace, "put", paused_put)
    with pytest.raises(RunAborted, match="was taken over by another driver"):
        cluster.run(failed, progress="off", retry_failed=True)
    assert rows(out) == before
    assert verify(failed.sink, find_run(str(out)).record).clean
    Path(lock.lock_path(str(out), 2)).unlink()
    cluster.run(failed, progress="off", retry_failed=True)
    assert rows(out) == rows(folder / "calm")


def test_a_unit_of_a_folded_shard_is_replaced(failed: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "FOLD_FROM", 1)
    folding.fold_finished_shards(failed.sink)
    cluster.run(failed, progress="off", retry_failed=True)
    assert rows(Path(failed.sink.folder)) == rows(folder / "calm")
    assert verify(failed.sink, find_run(failed.sink.folder).record).clean
