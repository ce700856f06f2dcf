"""`--retry-failed`: what failed is tried again, what was good keeps its bytes, and a kill leaves one commit whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.errors import EncodeError
from pipeline.looking.verify import Inspection, verify
from pipeline.recipe import Recipe
from pipeline.running import driver
from pipeline.writing import cleaning, commit, folding, restoring
from pipeline.writing.lock import DriverLock
from pipeline.writing.run_record import read_run_record
from tests.places import Place
from tests.runs import asked, contents, results, write_shards

pytestmark = pytest.mark.timeout(120)
UNMERGED = {"shard_size": 0}  # for merged files see writing/test_merging.py


@pytest.fixture(scope="module")
def calm(place: Place) -> Recipe:
    """A run over two shards, whose row im03 is no image, in which nothing else failed."""
    write_shards(place.root / "in", shards=2, rows=5)
    recipe = place.recipe("in", "calm", sink=UNMERGED)
    driver.run(recipe, progress="off")
    return recipe


@pytest.fixture(scope="module")
def failed_once(place: Place, calm: Recipe) -> Path:
    """What a run over the same source wrote, in which im00 could not be encoded; what hindered it is over."""
    restored = restoring.restored

    def hindered(decoded: Any) -> Any:
        if decoded.prepared.sample.key == "im00":
            raise EncodeError("out of memory")
        return restored(decoded)

    recipe = place.recipe("in", "failed", sink=UNMERGED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restoring, "restored", hindered)
        assert driver.run(recipe, progress="off").failed == 4
    return place.folder(recipe)


@pytest.fixture
def failed(place: Place, failed_once: Path) -> Recipe:
    """A copy of that run, to go on with."""
    recipe = place.recipe("in", place.new(), sink=UNMERGED)
    shutil.copytree(failed_once, place.folder(recipe))
    place.settle()
    return recipe


def rows(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Every row of data/, once."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted((out / "data").glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            assert (row["id"], row["edit"]) not in found
            found[row["id"], row["edit"]] = row
    return found


def fold(recipe: Recipe) -> None:
    with DriverLock(recipe.sink, lambda _: None) as driver:
        folding.fold_finished_shards(recipe.sink, driver.claim)


def inspected(recipe: Recipe) -> Inspection:
    record = read_run_record(recipe.sink)
    assert record is not None
    return verify(recipe.sink, record)


def test_what_failed_is_made_and_the_rest_of_its_unit_keeps_its_bytes(
    place: Place, failed: Recipe, calm: Recipe
) -> None:
    out = place.folder(failed)
    before = rows(out)
    others = {name: data for name, data in contents(out).items() if "s0-" not in name}
    summary = driver.run(failed, progress="off", retry_failed=True)
    assert (summary.done, summary.failed, summary.complete, summary.exit_code) == (18, 2, True, 0)
    after = rows(out)
    assert {key: after[key] for key in before} == before
    assert after == rows(place.folder(calm))
    assert results(out) == asked(shards=2, rows=5)
    assert {name: data for name, data in contents(out).items() if "s0-" not in name} == others
    assert inspected(failed).clean


def test_without_the_flag_failed_rows_are_left_alone(place: Place, failed: Recipe) -> None:
    out = place.folder(failed)
    before = contents(out)
    assert driver.run(failed, progress="off").units_now == 0
    assert contents(out) == before


def test_what_fails_again_leaves_the_same_bytes(place: Place, calm: Recipe) -> None:
    out = place.folder(calm)
    before = contents(out)
    assert driver.run(calm, progress="off", retry_failed=True).failed == 2
    assert contents(out) == before


class KilledError(Exception):
    """Stands for SIGKILL: nothing that the code does about it would have happened."""


@pytest.mark.parametrize("steps", range(8))
def test_a_kill_at_any_step_leaves_the_old_commit_or_the_new_one(
    steps: int, place: Place, failed: Recipe, calm: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place.folder(failed)
    before = rows(out)
    left = steps

    def counted(function: Any) -> Any:
        def step(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError
            return function(*args, **options)

        return step

    with monkeypatch.context() as patch:
        for module, name in ((commit, "put"), (cleaning, "put"), (cleaning, "remove"), (folding, "put")):
            patch.setattr(module, name, counted(getattr(module, name)))
        with pytest.raises(KilledError):
            driver.run(failed, progress="off", retry_failed=True)
    found = inspected(failed)
    assert set(found.by_kind) <= {"stray file"}, found.findings
    assert (found.done, found.failed) in {(16, 4), (18, 2)}
    # The plain command cleans up, the next retry ends it.
    driver.run(failed, progress="off")
    assert rows(out).items() >= before.items()
    assert inspected(failed).clean
    assert results(out) == asked(shards=2, rows=5)
    driver.run(failed, progress="off", retry_failed=True)
    assert rows(out) == rows(place.folder(calm))


def test_a_unit_of_a_folded_shard_is_replaced(
    place: Place, failed: Recipe, calm: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "FOLD_FROM", 1)
    fold(failed)
    driver.run(failed, progress="off", retry_failed=True)
    assert rows(place.folder(failed)) == rows(place.folder(calm))
    assert results(place.folder(failed)) == asked(shards=2, rows=5)
    assert inspected(failed).clean
