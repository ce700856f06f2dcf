"""Folders of image files and their sidecars."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import SourceError
from pipeline.reading.units import list_shards, plan_reads
from pipeline.recipe import SourceConfig
from pipeline.samples import Sample, Unreadable


@pytest.fixture
def folder(tmp_path, png):
    files = {
        "cats/tom.JPG": png(0),
        "cats/tom.txt": b"a cat",
        "cats/tom.json": json.dumps({"edit": {"concepts": [{"prompt": "hat"}]}, "age": 3}).encode(),
        "cats/tom.mask.png": png(1),
        "cats/v1.2.png": png(2),
        "cats/v1.2.txt": b"dots",
        "dogs/rex.png": png(3),
        "dogs/rex.jpg": png(4),
        "dogs/.hidden.png": png(5),
        "readme.md": b"x",
        "a.webp": png(6),
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def rows_of(units):
    return [row for unit in units for row in unit.rows]


def test_images_come_sorted_with_their_sidecars(folder, read_all, png):
    units = read_all(SourceConfig(shards=(str(folder),)), unit_size=2)
    rows = rows_of(units)
    assert [row.key for row in rows] == ["a", "cats/tom", "cats/v1.2", "dogs/rex.jpg", "dogs/rex.png"]
    assert [(unit.unit.chunk, len(unit.rows), unit.unit.is_last) for unit in units] == [
        (0, 2, False),
        (1, 2, False),
        (2, 1, True),
    ]
    tom = rows[1]
    assert (tom.image, tom.image_name, tom.caption, tom.mask) == (png(0), "jpg", "a cat", png(1))
    assert (tom.edits, tom.columns) == ({"concepts": [{"prompt": "hat"}]}, {"age": 3})
    assert (rows[2].caption, rows[2].mask, rows[2].edits) == ("dots", None, None)
    assert {unit.unit.shard for unit in units} == {"."}


def test_a_wildcard_or_a_single_file_still_finds_the_sidecars(folder, read_all):
    for url in (folder / "cats" / "*.JPG", folder / "cats" / "tom.JPG"):
        (row,) = rows_of(read_all(SourceConfig(shards=(str(url),))))
        assert (row.key, row.caption) == ("tom", "a cat")
        assert row.edits is not None


def test_several_folders_are_shards_of_their_own(folder, read_all):
    units = read_all(SourceConfig(shards=(str(folder / "cats"), str(folder / "dogs"))), unit_size=8)
    assert [unit.unit.shard for unit in units] == ["cats", "dogs"]
    assert [row.id for row in units[1].rows] == ["dogs/rex.jpg", "dogs/rex.png"]


def test_a_task_carries_its_own_files_only(folder):
    (shard,) = list_shards(SourceConfig(shards=(str(folder),)))
    tasks = plan_reads([shard], 2, lambda _: False, lambda _: False)
    assert [len(task.rows) for task in tasks] == [2, 2, 1]
    assert all(task.shard.files == () for task in tasks)


def test_the_version_of_a_folder_changes_with_any_file_that_is_used(folder):
    def version():
        return list_shards(SourceConfig(shards=(str(folder),)))[0].etag

    before = version()
    (folder / "readme.md").write_bytes(b"changed")
    assert version() == before
    (folder / "cats" / "tom.txt").write_bytes(b"another cat")
    assert version() != before


def test_a_file_that_vanishes_or_is_too_large_is_one_reported_row(folder, read_all):
    from pipeline.reading.units import read_units

    one = SourceConfig(shards=(str(folder),), max_member_bytes=400)
    (folder / "a.webp").write_bytes(bytes(401))
    (shard,) = list_shards(one)
    (folder / "dogs" / "rex.png").unlink()
    (task,) = plan_reads([shard], 8, lambda _: False, lambda _: False)
    (unit,) = read_units(task, one, 8, lambda _: False)
    reported = {row.sample.key: row.message for row in unit.rows if isinstance(row, Unreadable)}
    assert set(reported) == {"a", "dogs/rex.png"}
    assert "max_member_bytes" in reported["a"]
    assert "FileNotFoundError" in reported["dogs/rex.png"]
    assert sum(isinstance(row, Sample) for row in unit.rows) == 3


def test_only_the_named_kind_of_image_is_taken(folder, read_all):
    rows = rows_of(read_all(SourceConfig(shards=(str(folder),), format="folder", image="png", mask="webp")))
    assert [row.key for row in rows] == ["cats/tom.mask", "cats/v1.2", "dogs/rex"]
    with pytest.raises(SourceError, match="gif"):
        list_shards(SourceConfig(shards=(str(folder),), format="folder", image="gif"))
