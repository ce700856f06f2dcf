"""Commits: the manifest is last, a rerun trusts nothing else, and nothing is ever half there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.errors import SinkError
from pipeline.recipe import Recipe, SinkConfig, recipe_from
from pipeline.records import Rejected
from pipeline.writing import commit as commit_module
from pipeline.writing.commit import Committed, FinishedUnit, commit, committed_units
from pipeline.writing.files import put
from pipeline.writing.finish import finish_unit
from pipeline.writing.manifest import Manifest, manifest_path
from pipeline.writing.rows import OutputRow, encode_outcome
from pipeline.writing.summary import summarise
from tests.writing.making import MEASURED, MODEL, NOW, make_edited, make_rejected, make_unit, unclaimed

RecipeFor = Callable[..., Recipe]


def encoded(recipe: Recipe, *outcomes: Any) -> list[OutputRow | Rejected]:
    return [encode_outcome(outcome, recipe, MODEL, 8) for outcome in outcomes]


def finished(recipe: Recipe, chunk: int = 0, is_last: bool = True) -> FinishedUnit:
    at = 10 * chunk
    outcomes = [make_edited(at, "a"), make_rejected(at, "b"), make_edited(at + 1, "a"), make_edited(at + 1, "b")]
    unit = make_unit(at, at + 1, chunk=chunk, is_last=is_last)
    return finish_unit(unit, encoded(recipe, *outcomes), recipe, **NOW).with_measured(MEASURED)


@pytest.fixture(params=["local", "memory"])
def recipe(request: pytest.FixtureRequest, recipe_for: RecipeFor, tmp_path: Path) -> Iterator[Recipe]:
    """A recipe whose sink is a local folder, and one whose sink is an object store of whole puts."""
    if request.param == "local":
        yield recipe_for()
        return
    url = f"memory://{tmp_path.name}/out"
    yield recipe_for(folder=url)
    memory = fsspec.filesystem("memory")
    if memory.exists(f"/{tmp_path.name}"):
        memory.rm(f"/{tmp_path.name}", recursive=True)


def test_what_was_committed_is_found_again_with_its_counts(recipe: Recipe) -> None:
    for chunk in (0, 1):
        commit(finished(recipe, chunk, is_last=chunk == 1), recipe.sink, unclaimed)
    manifests = list(committed_units(recipe.sink))
    assert [manifest.chunk for manifest in manifests] == [0, 1]
    assert [manifest.is_last for manifest in manifests] == [False, True]
    counts = manifests[0].counts
    assert (counts.images, counts.asked, counts.ok, counts.failed) == (2, 4, 3, 1)
    assert counts.failed_by_stage == {"decode": 1}
    assert [file.path for file in manifests[0].files] == [
        "_parts/data/faces-0001-3fa2b1c4/00000-00000001.parquet",
        "_parts/quarantine/faces-0001-3fa2b1c4/00000-00000001.parquet",
    ]


def test_files_that_are_never_merged_stand_where_readers_look_from_the_beginning(recipe_for: RecipeFor) -> None:
    recipe = recipe_for(shard_size=0)
    commit(finished(recipe), recipe.sink, unclaimed)
    (manifest,) = committed_units(recipe.sink)
    assert [file.path for file in manifest.files] == [
        "data/part-faces-0001-3fa2b1c4-00000-00000001.parquet",
        "quarantine/part-faces-0001-3fa2b1c4-00000-00000001.parquet",
    ]


def test_the_manifest_is_written_after_every_file(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def remember(fs: Any, path: str, data: bytes) -> None:
        written.append(path)
        put(fs, path, data)

    monkeypatch.setattr(commit_module, "put", remember)
    commit(finished(recipe), recipe.sink, unclaimed)
    folders = [path.rpartition("/out/")[2].rpartition("/faces-")[0] for path in written]
    assert folders == ["_parts/data", "_parts/quarantine", "_units"]


def test_a_manifest_that_cannot_be_written_leaves_no_committed_unit(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_the_manifest(fs: Any, path: str, data: bytes) -> None:
        if "/_units/" in path:
            raise SinkError("no space")
        put(fs, path, data)

    monkeypatch.setattr(commit_module, "put", fail_at_the_manifest)
    with pytest.raises(SinkError):
        commit(finished(recipe), recipe.sink, unclaimed)
    monkeypatch.undo()
    assert list(committed_units(recipe.sink)) == []
    commit(finished(recipe), recipe.sink, unclaimed)
    assert len(list(committed_units(recipe.sink))) == 1


def test_committing_twice_changes_nothing(recipe: Recipe) -> None:
    fs, root = fsspec.core.url_to_fs(recipe.sink.folder)
    commit(finished(recipe), recipe.sink, unclaimed)
    before = {path: fs.cat_file(path) for path in fs.find(root)}
    commit(finished(recipe), recipe.sink, unclaimed)
    assert {path: fs.cat_file(path) for path in fs.find(root)} == before


@pytest.mark.parametrize("damage", ["shorter", "gone", "manifest"])
def test_a_unit_whose_files_are_not_as_listed_does_not_count(recipe: Recipe, damage: str) -> None:
    fs, root = fsspec.core.url_to_fs(recipe.sink.folder)
    manifest = commit(finished(recipe), recipe.sink, unclaimed)
    target = f"{root}/{manifest_path(manifest.unit, 1) if damage == 'manifest' else manifest.files[0].path}"
    if damage == "gone":
        fs.rm(target)
    else:
        fs.pipe_file(target, fs.cat_file(target)[:-1] if damage == "shorter" else b"{")
    assert list(committed_units(recipe.sink)) == []


def test_a_put_that_fails_leaves_neither_the_file_nor_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SinkError, match="No space left"):
        put(fsspec.filesystem("file"), str(tmp_path / "data" / "part.parquet"), b"x")
    assert list((tmp_path / "data").iterdir()) == []


def test_files_and_manifest_do_not_depend_on_the_order_in_which_rows_finish(recipe: Recipe) -> None:
    outcomes = encoded(
        recipe,
        *(make_edited(index, edit) for index in range(5) for edit in ("a", "b", "own-2", "own-1")),
        *(make_rejected(index, "c") for index in range(5)),
    )
    unit = make_unit(*range(5))
    forward = finish_unit(unit, outcomes, recipe, **NOW)
    assert finish_unit(unit, outcomes[::-1], recipe, **NOW) == forward


def test_rows_stand_in_the_order_of_the_shard_then_of_the_edits_names(recipe_for: RecipeFor) -> None:
    import io

    import pyarrow.parquet as pq

    recipe = recipe_for()  # its edits are "b", then "a"
    outcomes = encoded(recipe, *(make_edited(index, edit) for index in (1, 0) for edit in ("own", "a", "b")))
    (_, data), *_ = finish_unit(make_unit(0, 1), outcomes, recipe, **NOW).files
    table = pq.read_table(io.BytesIO(data), columns=["index", "edit"])
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        (index, edit) for index in (0, 1) for edit in ("a", "b", "own")
    ]


def test_a_unit_without_rows_is_committed_by_its_manifest_alone(recipe: Recipe) -> None:
    manifest = commit(finish_unit(make_unit(), [], recipe, **NOW), recipe.sink, unclaimed)
    assert manifest.files == ()
    assert [found.unit for found in committed_units(recipe.sink)] == [manifest.unit]


@pytest.mark.parametrize("lost", ["a row twice", "a row lost"])
def test_a_result_that_is_lost_or_doubled_is_never_committed(recipe_for: RecipeFor, lost: str) -> None:
    recipe = recipe_for()
    outcomes = [make_edited(0), make_edited(0)] if lost == "a row twice" else [make_edited(0)]
    unit = make_unit(0) if lost == "a row twice" else make_unit(0, 1)
    with pytest.raises(AssertionError, match="faces-0001"):
        finish_unit(unit, encoded(recipe, *outcomes), recipe, **NOW)


def test_a_shard_is_whole_once_its_last_unit_and_all_before_it_are_committed(recipe_for: RecipeFor) -> None:
    committed = Committed()
    recipe = recipe_for()
    slug = "faces-0001-3fa2b1c4"
    for chunk in (2, 0):
        committed.add(finished(recipe, chunk, is_last=chunk == 2).manifest)
    assert committed.has(f"{slug}-00000")
    assert not committed.has(f"{slug}-00001")
    assert not committed.has_whole_shard(slug)
    committed.add(finished(recipe, 1, is_last=False).manifest)
    assert committed.has_whole_shard(slug)
    assert not committed.has_whole_shard("other")
    assert committed.of_shard(slug).has_whole_shard(slug)
    assert not committed.of_shard("other").has(f"{slug}-00000")


def test_a_manifest_survives_its_own_json(recipe_for: RecipeFor) -> None:
    manifest = finished(recipe_for()).manifest
    assert Manifest.model_validate_json(manifest.to_bytes()) == manifest


def test_no_sink_is_reached_without_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sink = SinkConfig(folder=str(tmp_path / "file" / "out"))
    with pytest.raises(SinkError, match="cannot be"):
        commit(finished(recipe_from({"source": {"shards": "x"}, "sink": {"folder": sink.folder}})), sink, unclaimed)


def test_as_many_failures_as_the_budget_allows_are_within_it(recipe_for: RecipeFor) -> None:
    manifest = finished(recipe_for()).manifest  # one of four results has failed
    within, over = (summarise([manifest], [], units_now=1, max_failed_fraction=most) for most in (0.25, 0.24))
    assert (within.outcome, within.exit_code) == ("complete with failures", 0)
    assert (over.outcome, over.exit_code) == ("over the error budget", 1)


def test_the_rate_of_a_summary_counts_workers_that_share_the_time(recipe_for: RecipeFor) -> None:
    manifest = finished(recipe_for()).manifest
    two = manifest.model_copy(update={"measured": manifest.measured.model_copy(update={"workers": 2})})
    alone, shared = (summarise([one], [], units_now=1, max_failed_fraction=0.5) for one in (manifest, two))
    assert (alone.images_per_second, alone.seconds) == (round(2 / 1.5, 4), 1.5)
    assert (shared.images_per_second, shared.seconds, shared.worker_seconds) == (round(2 / 0.75, 4), 0.75, 1.5)
    assert (alone.planned, alone.done, alone.failed, alone.exit_code) == (4, 3, 1, 0)
