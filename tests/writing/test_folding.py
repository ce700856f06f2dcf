"""Finished shards are folded into one file, and whoever reads manifests sees every unit once, whatever was killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.errors import SinkError
from pipeline.recipe import Recipe
from pipeline.writing import folding
from pipeline.writing.baseline import Counted
from pipeline.writing.cleaning import OLD_S, begin
from pipeline.writing.commit import Committed, commit, committed_units
from pipeline.writing.finish import finish_unit
from pipeline.writing.folding import FOLD_FROM, fold_finished_shards
from pipeline.writing.manifest import data_path
from pipeline.writing.rows import encode_outcome
from pipeline.writing.summary import summarise
from tests.writing.making import MODEL, NOW, claim, make_edited, make_unit, unclaimed

UNITS = FOLD_FROM
SLUG = "faces-0001-3fa2b1c4"


@pytest.fixture(params=["local", "memory"])
def recipe(request: pytest.FixtureRequest, recipe_for: Callable[..., Recipe], tmp_path: Path) -> Iterator[Recipe]:
    if request.param == "local":
        yield recipe_for()
        return
    yield recipe_for(folder=f"memory://{tmp_path.name}/out")
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def do_unit(recipe: Recipe, chunk: int, count: int = UNITS, generation: int = 1) -> None:
    unit = make_unit(chunk, chunk=chunk, is_last=chunk == count - 1)
    now = NOW | {"generation": generation}
    finished = finish_unit(unit, [encode_outcome(make_edited(chunk), recipe, MODEL, 8)], recipe, **now)
    commit(finished, recipe.sink, unclaimed)


def fold(recipe: Recipe, generation: int = 1) -> int:
    return fold_finished_shards(recipe.sink, claim(recipe, generation))


def files(recipe: Recipe) -> list[str]:
    fs, root = fsspec.core.url_to_fs(recipe.sink.folder)
    found = (path.removeprefix(root) for path in fs.find(root))
    return sorted(path for path in found if not path.startswith(("/_parts/", "/_lock/")))


def test_folding_changes_nothing_that_readers_see_and_leaves_one_file(recipe: Recipe) -> None:
    for chunk in range(UNITS):
        do_unit(recipe, chunk)
    before = list(committed_units(recipe.sink))
    assert fold(recipe) == 1
    assert files(recipe) == [f"/_shards/{SLUG}-00000001.json"]
    assert list(committed_units(recipe.sink)) == before
    assert summarise(before, [], units_now=0, max_failed_fraction=0.5) == summarise(
        committed_units(recipe.sink), [], units_now=0, max_failed_fraction=0.5
    )
    assert fold(recipe) == 0


@pytest.mark.parametrize("missing", [0, UNITS - 1])
def test_a_shard_that_is_not_finished_is_not_folded(recipe: Recipe, missing: int) -> None:
    for chunk in range(UNITS + 1):
        if chunk != missing:
            do_unit(recipe, chunk, UNITS + 1)
    assert fold(recipe) == 0
    assert len(list(committed_units(recipe.sink))) == UNITS


def test_a_kill_while_manifests_are_removed_leaves_every_unit_counted_once(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chunk in range(UNITS):
        do_unit(recipe, chunk)
    before = list(committed_units(recipe.sink))
    removed: list[str] = []

    def killed(fs: Any, path: str) -> None:
        if len(removed) == 5:
            raise SinkError("killed")
        removed.append(path)
        fs.rm_file(path)

    monkeypatch.setattr(folding, "remove", killed)
    with pytest.raises(SinkError, match="killed"):
        fold(recipe)
    assert len(files(recipe)) == 1 + UNITS - 5
    assert list(committed_units(recipe.sink)) == before
    monkeypatch.undo()
    assert fold(recipe) == 1
    assert files(recipe) == [f"/_shards/{SLUG}-00000001.json"]
    assert list(committed_units(recipe.sink)) == before


def test_a_folded_unit_whose_file_is_gone_is_done_again_and_folded_again(recipe: Recipe) -> None:
    for chunk in range(UNITS):
        do_unit(recipe, chunk)
    before = list(committed_units(recipe.sink))
    fold(recipe)
    fs, root = fsspec.core.url_to_fs(recipe.sink.folder)
    fs.rm_file(f"{root}/{data_path(f'{SLUG}-00002', 1, recipe.sink)}")
    assert [unit.chunk for unit in committed_units(recipe.sink)] == [chunk for chunk in range(UNITS) if chunk != 2]
    do_unit(recipe, 2, generation=2)
    again = [unit for unit in committed_units(recipe.sink) if unit.chunk == 2]
    assert [unit.generation for unit in again] == [2]
    after = sorted([*before[:2], *again, *before[3:]], key=lambda unit: unit.chunk)
    assert list(committed_units(recipe.sink)) == after
    assert fold(recipe, 2) == 1
    assert files(recipe) == [f"/_shards/{SLUG}-00000002.json"]
    assert list(committed_units(recipe.sink)) == after


def test_a_damaged_folded_file_counts_for_nothing(recipe: Recipe) -> None:
    for chunk in range(UNITS):
        do_unit(recipe, chunk)
    fold(recipe)
    fs, root = fsspec.core.url_to_fs(recipe.sink.folder)
    path = f"{root}/_shards/{SLUG}-00000001.json"
    fs.pipe_file(path, fs.cat_file(path)[:-100])
    assert list(committed_units(recipe.sink)) == []


def test_temporary_files_go_after_a_day_and_not_before(recipe_for: Callable[..., Recipe], tmp_path: Path) -> None:
    import os

    data = tmp_path / "out" / "data"
    data.mkdir(parents=True)
    for name, age in ((".old.tmp", OLD_S + 60), (".young.tmp", OLD_S - 60), ("old.tmp", 10 * OLD_S)):
        (data / name).touch()
        os.utime(data / name, (time.time() - age,) * 2)
    recipe = recipe_for()
    begin(recipe.sink, claim(recipe), Counted(), Committed())
    assert sorted(path.name for path in data.iterdir()) == [".young.tmp", "old.tmp"]
