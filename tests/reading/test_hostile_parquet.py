"""Parquet files that claim more than they are: bounded in time and memory, and told by name."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SourceError
from pipeline.reading import listing, parquet, shards
from pipeline.reading.guarded import Limits, borrowed
from pipeline.reading.units import list_shards
from pipeline.recipe import SourceConfig
from pipeline.samples import Sample, UnitInput, Unreadable

MIB = 2**20
Png = Callable[..., bytes]


def source(path: Path, **settings: int) -> SourceConfig:
    return SourceConfig(shards=(str(path),), **settings)


def varint(number: int) -> bytes:
    out = bytearray()
    number <<= 1  # zigzag
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def with_rows(data: bytes, real: int, claimed: int) -> bytes:
    """The footer of a file with `real` rows announces others: in all, and in its one row group."""
    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -8]
    changed = footer.replace(b"\x16" + varint(real), b"\x16" + varint(claimed))
    assert changed != footer
    return data[: -8 - length] + changed + len(changed).to_bytes(4, "little") + b"PAR1"


def written(table: pa.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def test_a_footer_of_ten_to_the_fifteen_rows_is_one_reported_row(tmp_path: Path, read_all, png: Png) -> None:
    data = written(pa.table({"image": [png(number) for number in range(77)]}))
    (tmp_path / "lies.parquet").write_bytes(with_rows(data, 77, 10**15))
    (tmp_path / "sound.parquet").write_bytes(data)
    units = read_all(source(tmp_path), unit_size=50)
    rows = [row for unit in units for row in unit.rows]
    assert [unit.unit.shard for unit in units] == ["lies.parquet", "sound.parquet", "sound.parquet"]
    assert isinstance(rows[0], Unreadable)
    assert "announces 1000000000000000 rows, in a file of" in rows[0].message
    assert all(isinstance(row, Sample) for row in rows[1:])


def test_a_reader_that_somebody_kills_makes_no_footer_a_damaged_one(tmp_path: Path, png: Png) -> None:
    """A sound file with unknown rows would be cut into other units than those that a run before it committed."""
    (tmp_path / "one.parquet").write_bytes(written(pa.table({"image": [png(number) for number in range(7)]})))
    with borrowed(Limits.for_parquet(source(tmp_path))) as reader:
        pass
    reader.process.kill()
    reader.process.poll = lambda: None  # type: ignore[method-assign]  # nobody has noticed yet
    (shard,) = list_shards(source(tmp_path))
    assert shard.rows == 7
    assert reader.process.wait() == -signal.SIGKILL


def test_a_footer_that_claims_a_gigabyte_is_not_fetched(tmp_path: Path, read_all, png: Png, monkeypatch) -> None:
    monkeypatch.setattr(parquet, "MAX_FOOTER", 100_000)
    data = written(pa.table({"image": [bytes(300_000), png(1)]}), compression="none")
    (tmp_path / "x.parquet").write_bytes(data[:-8] + (200_000).to_bytes(4, "little") + b"PAR1")
    ((row,),) = [unit.rows for unit in read_all(source(tmp_path))]
    assert "its footer claims 200008 bytes" in row.message


def giants(count: int, size: int, png: Png) -> pa.Table:
    """Rows that share one value of so many bytes, between ordinary ones: a file of some kilobytes."""
    values = [png(0), *[bytes(size)] * count, png(1)]
    return pa.table({"image": pa.array(values, pa.binary()), "txt": [f"row {at}" for at in range(len(values))]})


def test_dictionary_coded_giants_fail_alone(tmp_path: Path, read_all, png: Png) -> None:
    data = written(giants(30, 12 * MIB, png), compression="zstd", dictionary_pagesize_limit=100 * MIB)
    assert len(data) < MIB
    (tmp_path / "x.parquet").write_bytes(data)
    (unit,) = read_all(source(tmp_path, max_member_bytes=10 * MIB), unit_size=32)
    assert [isinstance(row, Sample) for row in unit.rows] == [True, *[False] * 30, True]
    assert "column image has 12582912 bytes, more than source.max_member_bytes" in unit.rows[5].message


def test_a_unit_takes_no_more_than_a_few_times_its_bytes_whatever_the_footer_says(
    tmp_path: Path, read_all, png: Png, monkeypatch
) -> None:
    monkeypatch.setattr(listing, "UNIT_BYTES", 4 * MIB)
    data = written(giants(30, 5 * MIB, png), compression="zstd", dictionary_pagesize_limit=100 * MIB)
    (tmp_path / "x.parquet").write_bytes(data)
    units = read_all(source(tmp_path, max_member_bytes=8 * MIB), unit_size=32)
    kept = [[row.index for row in unit.rows if isinstance(row, Sample)] for unit in units]
    assert kept == [[0, 1, 2, 3, 4], [25, 26, 27, 28]]
    assert "the rows before it in its unit hold more than 16777216 bytes" in units[0].rows[7].message


def test_a_row_group_that_needs_too_much_memory_is_lost_alone_and_by_name(tmp_path: Path, read_all, png: Png) -> None:
    large = pa.table({"image": pa.array([bytes(300 * MIB), png(2)], pa.binary())})
    with pq.ParquetWriter(tmp_path / "x.parquet", large.schema, compression="zstd", use_dictionary=False) as writer:
        writer.write_table(pa.table({"image": [png(0), png(1)]}))
        writer.write_table(large)
        writer.write_table(pa.table({"image": [png(3)]}))
    units = read_all(source(tmp_path, read_memory=256 * MIB), unit_size=8)
    rows = [row for unit in units for row in unit.rows]
    assert [row.image for row in rows if isinstance(row, Sample)] == [png(0), png(1), png(3)]
    assert [row.message for row in rows if isinstance(row, Unreadable)] == [
        "row group 1 of the shard (rows 2 to 3) needed more than 256 MiB of memory (source.read_memory)"
    ] * 2


def test_columns_that_become_gigabytes_of_values_are_told(tmp_path: Path, read_all, png: Png) -> None:
    numbers = pa.array([np.zeros(8 * MIB, dtype=np.int8), [1, 2]], pa.list_(pa.int8()))
    pq.write_table(pa.table({"image": [png(0), png(1)], "numbers": numbers}), tmp_path / "x.parquet")
    (unit,) = read_all(source(tmp_path))
    assert "its columns hold more than 16777216 bytes of text and numbers" in unit.rows[0].message
    assert unit.rows[1].columns == {"numbers": [1, 2]}


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "UNIT_BYTES", 3 * MIB)
    assert shards.UNIT_BYTES > 3 * MIB


def spans(units: list[UnitInput]) -> list[tuple[int, int, int]]:
    return [(unit.unit.chunk, unit.unit.start, unit.unit.stop) for unit in units]


def test_units_of_large_rows_end_early_and_are_the_same_for_every_reader(
    tmp_path: Path, read_all, png: Png, small_units: None
) -> None:
    values = [np.random.default_rng(at).bytes(MIB) for at in range(10)]
    pq.write_table(pa.table({"image": values}), tmp_path / "x.parquet", row_group_size=5)
    one = source(tmp_path, max_member_bytes=2 * MIB)
    whole = read_all(one, unit_size=8)
    assert spans(whole) == [(0, 0, 2), (1, 2, 4), (2, 4, 6), (3, 6, 8), (4, 8, 10)]
    assert [unit.unit.is_last for unit in whole] == [False] * 4 + [True]
    done = {whole[1].unit.id, whole[3].unit.id}
    assert read_all(one, unit_size=8, committed=done) == [unit for unit in whole if unit.unit.id not in done]


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_tars_and_folders_end_a_unit_with_the_row_that_fills_it(
    tmp_path: Path, read_all, tar_bytes, small_units: None, kind: str
) -> None:
    sizes = [1, 1, MIB, MIB, MIB, 5 * MIB, 1, 1, 1, 1]
    files = [(f"{at:02d}.png", bytes(size)) for at, size in enumerate(sizes)]
    if kind == "tar":
        (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    else:
        for name, data in files:
            (tmp_path / name).write_bytes(data)
    one = source(tmp_path, max_member_bytes=6 * MIB)
    whole = read_all(one, unit_size=4)
    assert spans(whole) == [(0, 0, 4), (1, 4, 6), (2, 6, 10)]
    assert [unit.unit.is_last for unit in whole] == [False, False, True]
    for unit in whole:
        done = {other.unit.id for other in whole if other != unit}
        assert read_all(one, unit_size=4, committed=done) == [unit]


def test_who_sees_no_image_column_is_told_as_before(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=r"Name the image's in source\.image"):
        list_shards(source(tmp_path))


def test_the_process_that_reads_it_knows_no_model(tmp_path: Path, png: Png) -> None:
    """torch takes a fifth of a gigabyte: what stands in `source.read_memory` is for pages."""
    (tmp_path / "sound.parquet").write_bytes(written(pa.table({"image": [png(0)]})))
    one = source(tmp_path)
    list_shards(one)  # reads its footer
    with borrowed(Limits.for_parquet(one)) as reader:
        maps = Path(f"/proc/{reader.process.pid}/maps").read_text(encoding="utf-8")
    assert "libarrow" in maps
    assert "torch" not in maps
