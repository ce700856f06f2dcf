"""A source is known again by what it holds: not by its times, its address, or the pattern that names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import SinkError
from pipeline.reading.listing import list_shards
from pipeline.recipe import Recipe, recipe_from
from pipeline.running.todo import find_todo
from pipeline.settings.sections import SourceConfig
from pipeline.writing.run_record import run_record, write_run_record
from tests.runs import png, recipe_data, write_shards
from tests.writing.making import MODEL


def etag_of(path: Path, check: str = "auto") -> str:
    return list_shards(SourceConfig(shards=(str(path),), check=check))[0].etag


def change_a_byte(path: Path, at: int) -> None:
    """Same size, same time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("check", ["auto", "content"])
def test_a_time_is_no_version(check: str, tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "in", shards=1, rows=2) / "s0.tar"
    before = etag_of(shard, check)
    os.utime(shard, (1, 1))
    assert etag_of(shard, check) == before
    change_a_byte(shard, 600)
    assert etag_of(shard, check) != before


def test_a_small_change_in_a_large_file_shows_in_its_content(tmp_path: Path) -> None:
    shard = tmp_path / "large.tar"
    shard.write_bytes(bytes(1_000_000))
    seen, content = etag_of(shard), etag_of(shard, "content")
    change_a_byte(shard, 20_000)  # between two of the pieces that are looked at
    assert etag_of(shard) == seen
    assert etag_of(shard, "content") != content
    change_a_byte(shard, 999_999)
    assert etag_of(shard) != seen


def test_a_folder_of_images_is_known_by_the_bytes_of_all_that_is_used(tmp_path: Path) -> None:
    for name, data in {"a.png": png(0), "a.txt": b"a cat", "b.png": png(1)}.items():
        (tmp_path / name).write_bytes(data)
    before = etag_of(tmp_path)
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    assert etag_of(tmp_path) == before
    change_a_byte(tmp_path / "a.txt", 2)
    assert etag_of(tmp_path) != before


def begun(source: str, out: Path, **settings: str) -> Recipe:
    data = recipe_data(source, out, engine="local")
    data["source"] |= settings
    recipe = recipe_from(data)
    write_run_record(run_record(recipe, list_shards(recipe.source), MODEL, 4, 1), recipe.sink)
    return recipe


def goes_on_as(source: str, out: Path, **settings: str) -> None:
    data = recipe_data(source, out, engine="local")
    data["source"] |= settings
    find_todo(recipe_from(data))


@pytest.mark.parametrize("other", ["{0}/*.tar", "{0}/", "{0}/s{{0..1}}.tar", "file://{0}/s?.tar"])
def test_a_folder_and_patterns_that_pick_all_of_it_are_one_source(other: str, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", shards=2, rows=2)
    recipe = begun(str(source), tmp_path / "out")
    goes_on_as(other.format(source), tmp_path / "out")
    assert recipe.hash == recipe_from(recipe_data(other.format(source), tmp_path / "out", engine="local")).hash


def test_a_source_that_was_moved_is_the_same_and_a_part_of_it_is_not(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", shards=2, rows=2)
    begun(str(source), tmp_path / "out")
    os.rename(source, tmp_path / "moved")
    goes_on_as(str(tmp_path / "moved"), tmp_path / "out")
    with pytest.raises(SinkError, match=r"s1\.tar is gone"):
        goes_on_as(str(tmp_path / "moved" / "s0*"), tmp_path / "out")


def test_a_changed_shard_of_the_same_size_and_time_is_refused(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", shards=2, rows=2)
    begun(str(source), tmp_path / "out", check="content")
    change_a_byte(source / "s1.tar", 700)
    with pytest.raises(SinkError, match=r"s1.tar has changed \(of the same size"):
        goes_on_as(str(source), tmp_path / "out", check="content")


def test_another_way_to_look_at_the_source_is_named(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", shards=1, rows=2)
    begun(str(source), tmp_path / "out", check="content")
    with pytest.raises(SinkError, match=r"source.check"):
        goes_on_as(str(source), tmp_path / "out")
