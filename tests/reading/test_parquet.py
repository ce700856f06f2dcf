"""Parquet: which column is what, row ranges, and files that are damaged."""

from __future__ import annotations

import datetime
import decimal
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.reading.units import list_shards, plan_reads, read_units
from pipeline.recipe import SourceConfig, parse_edits
from pipeline.samples import Sample, Unreadable


@pytest.fixture
def read(tmp_path, read_all):
    """`read(table, row_group_size, **source)`: rows of a file with this table."""

    def read(table, row_group_size=4, unit_size=3, **settings):
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=row_group_size)
        found = read_all(SourceConfig(shards=(str(tmp_path),), **settings), unit_size=unit_size)
        assert [unit.unit.is_last for unit in found] == [False] * (len(found) - 1) + [True]
        return [row for unit in found for row in unit.rows]

    return read


def images_of(png, count):
    return [png(number) for number in range(count)]


def test_rows_come_in_order_in_units_across_row_groups(read, png):
    for count, group in [(1, 4), (10, 4), (12, 3), (40, 100), (5, 1)]:
        rows = read(pa.table({"image": images_of(png, count), "txt": [f"face {n}" for n in range(count)]}), group)
        assert [row.index for row in rows] == list(range(count))
        assert [row.image for row in rows] == images_of(png, count)
        assert [row.caption for row in rows] == [f"face {n}" for n in range(count)]
        assert rows[0].key == "00000000"
        assert rows[0].id == "x.parquet/00000000"
        assert rows[0].image_name == "image"


def test_committed_units_in_the_middle_leave_the_others_as_they_were(tmp_path, png, read_all):
    from pipeline.reading.units import unit_id

    pq.write_table(pa.table({"image": images_of(png, 50)}), tmp_path / "x.parquet", row_group_size=20)
    one = SourceConfig(shards=(str(tmp_path / "x.parquet"),))
    whole = read_all(one, unit_size=4)
    done = {unit_id("x.parquet", chunk) for chunk in (0, 3, 4, 5, 12)}
    assert read_all(one, unit_size=4, committed=done) == [unit for unit in whole if unit.unit.id not in done]


def test_hugging_face_images_and_other_images_beside_them(read, png):
    struct = [{"bytes": png(0), "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    other = [{"bytes": png(5), "path": None}, None, None]
    rows = read(pa.table({"image": struct, "edited_image": other, "raw": [b"1", None, b"3"]}))
    assert rows[0].image == png(0)
    assert rows[0].members == {"edited_image": png(5), "raw": b"1"}
    assert rows[0].columns == {}
    assert isinstance(rows[1], Unreadable)
    assert "only a path" in rows[1].message
    assert isinstance(rows[2], Unreadable)
    assert "column image is empty" in rows[2].message


def test_a_named_image_column_is_taken_and_else_a_known_or_the_only_one(read, png):
    table = pa.table({"jpg": [png(0)], "image": [png(1)], "photo": [png(2)]})
    assert read(table)[0].image == png(1)
    assert read(table, image="photo")[0].image == png(2)
    assert read(table.select(["photo"]))[0].image == png(2)
    assert read(pa.table({"photo": [png(0)], "mask": [png(1)]}))[0].mask == png(1)


def test_a_source_without_an_image_column_is_one_clear_error(read, png):
    with pytest.raises(SourceError, match="a, b"):
        read(pa.table({"a": [1], "b": ["x"]}))
    with pytest.raises(SourceError, match=r"source\.image"):
        read(pa.table({"one": [png(0)], "two": [png(1)]}))
    with pytest.raises(SourceError, match="'face', which source.image asks for"):  # noqa: RUF043
        read(pa.table({"image": [png(0)]}), image="face")


def test_captions_fall_back_only_from_the_default(read, png):
    table = pa.table({"image": [png(0)], "text": ["t"], "caption": ["c"], "alt": ["a"]})
    assert read(table)[0].caption == "c"
    assert read(table.drop(["caption"]))[0].caption == "t"
    assert read(table, caption="alt")[0].caption == "a"
    assert read(table, caption="title")[0].caption == ""
    assert read(table, caption="title")[0].columns == {"text": "t", "caption": "c", "alt": "a"}


def test_edit_requests_come_as_json_text_or_struct_and_blank_ones_count_as_none(read, png):
    request = {"concepts": [{"prompt": "hat", "guidance_scale": 3.0}]}
    texts = pa.table({"image": images_of(png, 4), "edit": [json.dumps(request), None, " ", "{no json"]})
    rows = read(texts)
    assert parse_edits(rows[0].edits, "x")["edit"].concepts[0].guidance_scale == 3.0
    assert [row.edits for row in rows[1:]] == [None, None, "{no json"]
    structs = pa.table({"image": images_of(png, 2), "edit": [{**request, "source_prompt": None}, None]})
    rows = read(structs)
    assert parse_edits(rows[0].edits, "x")["edit"].concepts[0].prompt == "hat"
    assert rows[1].edits is None
    named = pa.table({"image": images_of(png, 1), "edits": [{"one": request, "two": request}]})
    assert set(parse_edits(read(named)[0].edits, "x")) == {"one", "two"}
    both = pa.table({"image": images_of(png, 1), "edit": ["{}"], "edits": ["{}"]})
    assert isinstance(read(both)[0], Unreadable)


def test_keys_come_from_a_column_and_repeated_ones_get_ids_of_their_own(read, png):
    rows = read(pa.table({"image": images_of(png, 5), "id": ["a", "b", "a", None, ""]}))
    assert [row.key for row in rows] == ["a", "b", "a", "00000003", "00000004"]
    assert [row.id for row in rows][:3] == ["x.parquet/a", "x.parquet/b", "x.parquet/a#2"]
    numbers = read(pa.table({"image": images_of(png, 2), "id": [7, 8], "__key__": ["k", "l"]}))
    assert [row.key for row in numbers] == ["k", "l"]
    assert numbers[0].columns == {"id": 7}
    assert read(pa.table({"image": images_of(png, 1), "id": [7]}))[0].key == "7"


def test_every_kind_of_column_becomes_json(read, png):
    table = pa.table(
        {
            "image": [png(0)],
            "when": [datetime.datetime(2026, 1, 2, 3, 4, 5)],
            "nanoseconds": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")),
            "price": [decimal.Decimal("1.50")],
            "nan": [float("nan")],
            "nested": [{"list": [1.5, None], "blob": b"\x00\x01"}],
            "flag": [True],
            "kind": pa.array(["cat"]).dictionary_encode(),
        }
    )
    (row,) = read(table)
    columns = json.loads(json.dumps(row.columns, allow_nan=False))
    assert columns["when"] == "2026-01-02T03:04:05"
    assert columns["nanoseconds"].endswith("123456789")
    assert (columns["price"], columns["nan"], columns["flag"], columns["kind"]) == ("1.50", None, True, "cat")
    assert columns["nested"] == {"list": [1.5, None], "blob": "AAE="}


def test_images_over_the_limit_are_reported_without_their_bytes(read, png):
    rows = read(pa.table({"image": [b"x" * 5000, png(0)]}), max_member_bytes=1000)
    assert "5000 bytes" in rows[0].message
    assert rows[0].sample.image == b""
    assert isinstance(rows[1], Sample)


def test_a_file_without_rows_is_one_empty_last_unit(tmp_path, read_all, png):
    pq.write_table(pa.table({"image": [png(0)]}).slice(0, 0), tmp_path / "x.parquet")
    (unit,) = read_all(SourceConfig(shards=(str(tmp_path),)))
    assert (unit.rows, unit.unit.is_last) == ((), True)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "footer"])
def test_a_file_that_is_no_parquet_is_one_reported_row_and_the_others_are_read(tmp_path, read_all, png, damage):
    pq.write_table(pa.table({"image": images_of(png, 8)}), tmp_path / "good.parquet")
    data = (tmp_path / "good.parquet").read_bytes()
    bad = {
        "cut": data[: len(data) // 2],
        "garbage": b"x" * 3000,
        "empty": b"",
        "footer": data[:-60] + b"\xff" * 50 + data[-10:],
    }[damage]
    (tmp_path / "bad.parquet").write_bytes(bad)
    units = read_all(SourceConfig(shards=(str(tmp_path),)), unit_size=8)
    assert [unit.unit.shard for unit in units] == ["bad.parquet", "good.parquet"]
    assert [unit.unit.is_last for unit in units] == [True, True]
    (row,) = units[0].rows
    assert isinstance(row, Unreadable)
    assert "cannot be read" in row.message
    assert "0x" not in row.message
    assert all(isinstance(row, Sample) for row in units[1].rows)


def test_a_damaged_page_costs_its_row_group_at_most_and_every_lost_row_is_told(tmp_path, read_all, png):
    path = tmp_path / "x.parquet"
    table = pa.table({"image": images_of(png, 12)})
    pq.write_table(table, path, row_group_size=4, use_dictionary=False, compression="snappy")
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[group.data_page_offset : group.data_page_offset + group.total_compressed_size] = (
        b"\xff" * group.total_compressed_size
    )
    path.write_bytes(data)
    units = read_all(SourceConfig(shards=(str(path),)), unit_size=3)
    rows = [row for unit in units for row in unit.rows]
    assert len(rows) == 12
    assert [row.index for row in rows if isinstance(row, Sample)] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert all("rows 4 to 7" in row.message for row in rows if isinstance(row, Unreadable))
    assert units[-1].unit.is_last
    # The same messages whichever unit is read alone: a rerun quarantines the same bytes.
    for unit in units:
        others = {other.unit.id for other in units} - {unit.unit.id}
        assert read_all(SourceConfig(shards=(str(path),)), unit_size=3, committed=others) == [unit]


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_whatever_is_damaged_every_row_of_the_footer_is_read_or_told(tmp_path, read_all, seed):
    noise = random.Random(seed)
    path = tmp_path / "x.parquet"
    table = pa.table({"image": [bytes([n]) * 300 for n in range(30)], "id": [f"k{n}" for n in range(30)]})
    pq.write_table(table, path, row_group_size=7)
    data = bytearray(path.read_bytes())
    for _ in range(noise.randrange(1, 6)):
        data[noise.choice([noise.randrange(len(data)), len(data) - 1 - noise.randrange(800)])] = noise.randrange(256)
    path.write_bytes(data)
    one = SourceConfig(shards=(str(path),))
    try:
        (shard,) = list_shards(one)
    except SourceError as error:  # the damage renamed the only column that could be the image
        assert "source.image" in str(error)  # noqa: PT017
        return
    units = read_all(one, unit_size=4)
    rows = [row for unit in units for row in unit.rows]
    assert [unit.unit.is_last for unit in units] == [False] * (len(units) - 1) + [True]
    assert len(rows) == (1 if shard.rows is None else 30)


def test_a_file_is_not_loaded_as_a_whole(tmp_path, bytes_read):
    """Reading 4 of 64 row groups fetches little more than these."""
    path = tmp_path / "x.parquet"
    large = [bytes([number]) * 200_000 for number in range(64)]
    pq.write_table(pa.table({"image": large}), path, row_group_size=1, compression="none", use_dictionary=False)
    one = SourceConfig(shards=(str(path),))
    (shard,) = list_shards(one)
    tasks = plan_reads([shard], 4, lambda _: False, lambda _: False)
    assert len(tasks) == 16
    (unit,) = read_units(tasks[3], one, 4, lambda _: False)
    assert [row.image[:1] for row in unit.rows] == [bytes([number]) for number in (12, 13, 14, 15)]
    assert 800_000 <= bytes_read.total() < 2_000_000
