"""Listing, planning and cutting: names, what is left to do, what a retry hands out."""

from __future__ import annotations

import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceError
from pipeline.reading import units as units_module
from pipeline.reading.listing import list_source
from pipeline.reading.units import ReadTask, Shard, count_rows, list_shards, plan_reads, read_units, unit_id
from pipeline.recipe import SourceConfig
from pipeline.samples import Sample


def source(*urls, **settings):
    return SourceConfig(shards=tuple(str(url) for url in urls), **settings)


def paths(*urls, **settings):
    return [shard.path for shard in list_shards(source(*urls, **settings))]


@pytest.fixture
def folder(tmp_path, tar_bytes, samples):
    for name, count in {"a/0001.tar": 7, "a/0002.tar": 4, "b/0001.tar": 3, "b/deep/x.tar": 1}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(tar_bytes(samples(count)))
    return tmp_path


def test_folders_globs_ranges_and_files_name_shards_relative_to_the_folder(folder):
    assert paths(folder) == ["a/0001.tar", "a/0002.tar", "b/0001.tar", "b/deep/x.tar"]
    assert paths(f"file://{folder}/a/") == ["0001.tar", "0002.tar"]
    assert paths(folder / "*" / "*.tar") == ["a/0001.tar", "a/0002.tar", "b/0001.tar"]
    assert paths(folder / "a" / "000[2].tar") == ["0002.tar"]
    assert paths(folder / "a" / "000{1..2}.tar") == ["0001.tar", "0002.tar"]
    assert paths(folder / "{a,b}" / "0001.tar") == ["a/0001.tar", "b/0001.tar"]
    assert paths(folder / "a" / "0001.tar") == ["0001.tar"]


def test_equal_relative_paths_of_two_urls_stay_apart_and_no_shard_is_listed_twice(folder):
    assert paths(folder / "a", folder / "b") == ["a/0001.tar", "a/0002.tar", "b/0001.tar", "b/deep/x.tar"]
    assert paths(folder / "a" / "0001.tar", folder / "b" / "0001.tar") == ["a/0001.tar", "b/0001.tar"]
    assert paths(folder / "a", f"file://{folder}/a/*.tar") == ["0001.tar", "0002.tar"]


def test_other_files_beside_shards_are_left_alone(folder):
    (folder / "a" / "0001_stats.json").write_text("{}")
    (folder / "a" / "preview.png").write_bytes(b"x")
    (folder / "a" / ".hidden.tar").write_bytes(b"x")
    assert paths(folder / "a") == ["0001.tar", "0002.tar"]


def test_a_new_file_is_seen_by_the_next_listing_and_a_rewritten_one_has_another_version(folder, tar_bytes, samples):
    before = list_shards(source(folder / "a"))
    (folder / "a" / "0003.tar").write_bytes(b"")
    rewritten = bytearray((folder / "a" / "0001.tar").read_bytes())
    rewritten[100] ^= 1
    (folder / "a" / "0001.tar").write_bytes(rewritten)
    os.utime(folder / "a" / "0002.tar", (1, 1))  # as a copy, a restored backup or `touch` may
    after = list_shards(source(folder / "a"))
    assert [shard.path for shard in after] == ["0001.tar", "0002.tar", "0003.tar"]
    assert before[0].etag != after[0].etag
    assert before[1] == after[1]


@pytest.mark.parametrize(
    ("urls", "settings", "words"),
    [
        (["nowhere"], {}, ["nowhere", "does not exist"]),
        (["nowhere/*.tar"], {}, ["nowhere", "does not exist"]),
        (["empty"], {}, ["no file is there"]),
        (["other"], {}, ["none of 3 file(s) is a shard", "2 x .json", "1 x .zip"]),
        (["a"], {"format": "parquet"}, ["looked for parquet: .parquet", "2 x .tar"]),
        (["a/*.tgz"], {}, ["no file is there"]),
        (["a/{1..2.tar"], {}, ["braces"]),
    ],
)
def test_a_source_without_shards_is_one_clear_error(folder, urls, settings, words):
    (folder / "empty").mkdir()
    (folder / "other").mkdir()
    for name in ("x.json", "y.json", "z.zip"):
        (folder / "other" / name).write_bytes(b"{}")
    with pytest.raises(SourceError) as caught:
        list_shards(source(*(folder / url for url in urls), **settings))
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_kind_of_storage_is_one_clear_error():
    with pytest.raises(SourceError, match="nosuchkind"):
        list_shards(source("nosuchkind://bucket/x"))


def test_unit_ids_are_file_names_that_never_meet():
    shards = ["a/b.tar", "a-b.tar", "a_b.tar", "a/b.tar.gz", "ä/b.tar", "ö/b.tar", ".", "x" * 300, "y" + "x" * 300]
    ids = [unit_id(shard, chunk) for shard in shards for chunk in (0, 1, 123_456)]
    assert len(set(ids)) == len(ids)
    assert len({name.lower() for name in ids}) == len(ids)
    assert all(name.isascii() and len(name) < 100 and not set(name) & set("/\\:. %*?") for name in ids)
    assert unit_id("faces/0001.tar", 2) == unit_id("faces/0001.tar", 2)
    assert unit_id("faces/0001.tar", 2).startswith("faces-0001-")
    assert unit_id("faces/0001.tar", 2).endswith("-00002")


def test_units_hold_their_rows_by_ordinal_and_the_last_says_so(folder, read_all):
    found = read_all(source(folder / "a"), unit_size=3)
    assert [(u.unit.shard, u.unit.chunk, u.unit.start, u.unit.stop, u.unit.is_last) for u in found] == [
        ("0001.tar", 0, 0, 3, False),
        ("0001.tar", 1, 3, 6, False),
        ("0001.tar", 2, 6, 7, True),
        ("0002.tar", 0, 0, 3, False),
        ("0002.tar", 1, 3, 4, True),
    ]
    assert [row.index for u in found for row in u.rows] == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    assert [u.unit.is_last for u in read_all(source(folder / "a" / "0001.tar"), unit_size=7)] == [True]


@pytest.mark.parametrize("committed", [{0}, {1}, {2}, {0, 1}, {0, 2}, {0, 1, 2}])
def test_committed_units_are_passed_over_and_the_others_stay_as_they_were(folder, read_all, committed):
    one = source(folder / "a" / "0001.tar")
    whole = read_all(one, unit_size=3)
    left = read_all(one, unit_size=3, committed={unit_id("0001.tar", chunk) for chunk in committed})
    assert left == [unit for unit in whole if unit.unit.chunk not in committed]


def test_content_of_committed_units_is_not_read(tmp_path, tar_bytes, bytes_read):
    large = bytes(2_000_000)
    (tmp_path / "x.tar").write_bytes(tar_bytes((f"{at}.png", large) for at in range(10)))
    one = source(tmp_path / "x.tar")
    (shard,) = list_shards(one)
    task = ReadTask(shard=shard, start=0, stop=None)
    done = {unit_id(shard.path, chunk) for chunk in range(4)}
    (unit,) = read_units(task, one, 2, done.__contains__)
    assert [row.index for row in unit.rows] == [8, 9]
    assert 4_000_000 < bytes_read.total() < 5_000_000
    bytes_read.clear()
    assert count_rows(shard, one) == 10
    assert 0 < bytes_read.total() < 100_000


def test_a_whole_committed_tar_is_not_planned(folder):
    shards = list_shards(source(folder / "a"))
    tasks = plan_reads(shards, 3, lambda _: True, lambda path: path == "0001.tar")
    assert [task.shard.path for task in tasks] == ["0002.tar"]


def test_one_row_is_read_ahead_and_no_more(folder):
    one = source(folder / "a" / "0001.tar")
    (shard,) = list_shards(one)
    asked = []

    def is_committed(unit):
        asked.append(unit)
        return False

    reader = read_units(ReadTask(shard=shard, start=0, stop=None), one, 2, is_committed)
    assert not asked
    next(reader)
    assert set(asked) == {unit_id("0001.tar", 0), unit_id("0001.tar", 1)}
    reader.close()


def breaking(monkeypatch, error, *, after, times):
    """Let every open file fail after so many bytes, so many times."""
    left = Counter(times=times)
    original = units_module._open

    def opened(*args, **kwargs):
        file = original(*args, **kwargs)

        class Breaking:
            passed = 0

            def read(self, count=-1):
                if self.passed > after and left["times"] > 0:
                    left["times"] -= 1
                    raise error
                data = file.read(count)
                self.passed += len(data)
                return data

            def seekable(self):
                return False

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

        return Breaking()

    monkeypatch.setattr(units_module, "_open", opened)
    return left


def test_a_stream_that_breaks_is_read_on_from_a_fresh_open_without_a_row_lost_or_doubled(folder, read_all, monkeypatch):
    one = source(folder / "a" / "0001.tar")
    whole = read_all(one, unit_size=2)
    for after in (0, 3000, 12_000, 18_000):  # before the first unit is whole, and after
        with monkeypatch.context() as patch:
            left = breaking(patch, OSError(5, "broken pipe"), after=after, times=4)
            assert read_all(one, unit_size=2) == whole
        assert left["times"] == 0


@pytest.mark.parametrize(
    ("error", "opens"), [(OSError(5, "broken"), 5), (PermissionError("no"), 1), (FileNotFoundError("gone"), 1)]
)
def test_what_stays_broken_is_a_source_error_after_five_attempts_or_one(folder, read_all, monkeypatch, error, opens):
    left = breaking(monkeypatch, error, after=0, times=100)
    with pytest.raises(SourceError, match=r"0001\.tar"):
        read_all(source(folder / "a" / "0001.tar"), unit_size=2)
    assert 100 - left["times"] == opens


def test_a_shard_that_changed_since_it_was_listed_is_a_source_error(folder):
    one = source(folder / "a" / "0001.tar")
    (shard,) = list_shards(one)
    with (folder / "a" / "0001.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(SourceError, match="changed"):
        list(read_units(ReadTask(shard=shard, start=0, stop=None), one, 2, lambda _: False))


def test_rows_of_a_shard_are_counted_as_they_are_read(folder, read_all, tar_bytes, png):
    members = [("a.txt", b""), ("img.1.jpg", png(0)), ("img.2.jpg", png(1)), ("b.png", png(2)), ("b.png", png(2))]
    (folder / "a" / "0001.tar").write_bytes(tar_bytes(members)[:-9000])
    one = source(folder)
    counted = sum(count_rows(shard, one) for shard in list_shards(one))
    assert counted == sum(len(unit.rows) for unit in read_all(one))


def test_parquet_units_that_begin_in_one_row_group_are_one_task():
    shard = Shard(path="x.parquet", url="x", format="parquet", size=1, etag="", rows=25, row_groups=(10, 2, 13))
    tasks = plan_reads([shard], 4, lambda _: False, lambda _: False)
    assert [(task.start, task.stop) for task in tasks] == [(0, 12), (12, 25)]
    small = Shard(path="x.parquet", url="x", format="parquet", size=1, etag="", rows=10, row_groups=(1,) * 10)
    assert [(t.start, t.stop) for t in plan_reads([small], 4, lambda _: False, lambda _: False)] == [
        (0, 4),
        (4, 8),
        (8, 10),
    ]
    done = {unit_id("x.parquet", 1)}
    tasks = plan_reads([shard], 4, done.__contains__, lambda _: False)
    assert [(task.start, task.stop) for task in tasks] == [(0, 4), (8, 12), (12, 25)]


def test_tars_go_before_parquet_and_parquet_before_images_unless_the_format_is_named(folder, png):
    pq.write_table(pa.table({"image": [png(0)]}), folder / "a" / "0001.parquet")
    (folder / "a" / "p.png").write_bytes(png(0))
    assert {shard.format for shard in list_shards(source(folder / "a"))} == {"webdataset"}
    assert paths(folder / "a", format="parquet") == ["0001.parquet"]
    assert paths(folder / "a", format="folder") == ["."]
    for path in (folder / "a").glob("*.tar"):
        path.unlink()
    assert paths(folder / "a") == ["0001.parquet"]


def test_reading_twice_gives_equal_units(folder, read_all):
    first, second = read_all(source(folder)), read_all(source(folder))
    assert first == second
    assert all(isinstance(row, Sample) for unit in first for row in unit.rows)


def left_out(*urls, **settings):
    return dict(list_source(source(*urls, **settings)).left_out)


def test_links_are_followed_as_in_the_cache_of_a_hub(tmp_path, folder):
    snapshot = tmp_path / "cache" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "0001.tar").symlink_to("../../../a/0001.tar")
    (snapshot / "more").symlink_to(folder / "b")
    (snapshot / "again").symlink_to(snapshot)  # a folder inside itself ends
    (tmp_path / "linked").symlink_to(snapshot)
    whole = ["0001.tar", "more/0001.tar", "more/deep/x.tar"]
    assert paths(snapshot) == paths(tmp_path / "linked") == whole
    assert paths(snapshot / "*.tar") == ["0001.tar"]
    assert paths(snapshot / "*" / "*.tar") == ["more/0001.tar"]
    assert paths(tmp_path / "linked" / "0001.tar") == ["0001.tar"]
    one = source(snapshot / "more")
    (shard, _) = list_shards(one)
    assert shard.size == (folder / "b" / "0001.tar").stat().st_size
    assert count_rows(shard, one) == 3


def test_a_link_to_nothing_is_refused_by_name(folder):
    (folder / "a" / "0003.tar").symlink_to(folder / "gone.tar")
    for url in (folder, folder / "a" / "*.tar", folder / "*" / "0003.tar"):
        with pytest.raises(SourceError, match=r"0003\.tar is a link to .*gone\.tar, which does not exist"):
            list_shards(source(url))
    assert paths(folder / "b") == ["0001.tar", "deep/x.tar"]


def test_what_stands_beside_shards_is_counted(folder):
    (folder / "a" / "0001_stats.json").write_text("{}")
    (folder / "a" / "t.parquet").write_bytes(b"x")
    (folder / "a" / ".hidden.tar").write_bytes(b"x")
    (folder / "a" / ".git").mkdir()
    os.mkfifo(folder / "a" / "pipe.tar")
    assert left_out(folder / "b") == {}
    assert left_out(folder / "a", folder / "b") == {
        "no shard (.json)": 1,
        "no shard (.parquet)": 1,
        "hidden file": 1,
        "hidden folder": 1,
        "neither file nor folder": 1,
    }
    assert left_out(folder / "b" / "*") == {"folder that a wildcard picks": 1}
    assert left_out(folder / "b" / "**") == {}
    listed = list_source(source(folder / "b" / "*"))
    assert listed.note() == "not read: 1 folder that a wildcard picks"


def test_names_with_the_letters_of_wildcards_are_names_where_such_a_file_is(tmp_path, tar_bytes, samples):
    for name in ("a[1].tar", "b*.tar", "c{1..2}.tar", "d?.tar", "e::f.tar"):
        (tmp_path / "odd {x} [y]").mkdir(exist_ok=True)
        (tmp_path / "odd {x} [y]" / name).write_bytes(tar_bytes(samples(2)))
    names = ["a[1].tar", "b*.tar", "c{1..2}.tar", "d?.tar", "e::f.tar"]
    assert paths(tmp_path / "odd {x} [y]") == names
    for name in names:
        one = source(tmp_path / "odd {x} [y]" / name)
        (shard,) = list_shards(one)
        assert (shard.path, count_rows(shard, one)) == (name, 2)


def test_images_of_a_folder_and_their_sidecars_may_be_links_and_what_belongs_to_none_is_counted(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "in").mkdir()
    for name in ("cat.png", "cat.txt"):
        (tmp_path / "blobs" / name).write_bytes(b"x")
        (tmp_path / "in" / name).symlink_to(f"../blobs/{name}")
    (tmp_path / "in" / "dog.txt").write_bytes(b"x")
    (tmp_path / "in" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "in" / "round.png").symlink_to("round.png")
    one = source(tmp_path / "in")
    listed = list_source(one)
    (shard,) = listed.shards
    assert next((row.image, row.caption) for row in shard.files) == ("cat.png", "cat.txt")
    assert listed.left_out == {"beside no image (.txt)": 1}
    (task,) = plan_reads([shard], 8, lambda _: False, lambda _: False)
    ((cat, *lost),) = [unit.rows for unit in read_units(task, one, 8, lambda _: False)]
    assert isinstance(cat, Sample)
    assert [row.message.partition(" (")[0] for row in lost] == [
        "file gone.png was listed but cannot be read",
        "file round.png was listed but cannot be read",
    ]


def test_a_units_bytes_are_of_everything_that_its_rows_hold(tmp_path, tar_bytes, png, read_all):
    members = [("a.png", png(0)), ("a.txt", b"four"), ("a.mask.png", png(1)), ("a.depth.bin", bytes(1000))]
    (tmp_path / "one.tar").write_bytes(tar_bytes(members))
    (unit,) = read_all(source(tmp_path, mask="mask.png"), unit_size=4)
    assert unit.nbytes == sum(len(content) for _, content in members)
