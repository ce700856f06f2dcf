"""Parquet files: damaged bytes, and sound ones of other schemas."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.corpus.making import MAX_MEMBER, PNG, Case, over

TABLE_ROWS = 12


class Foreign(pa.ExtensionType):
    """A type that a reader must not ask Python code to rebuild."""

    def __init__(self) -> None:
        super().__init__(pa.binary(), "tests.foreign")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR."

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Foreign:
        return cls()


def table(**columns: Any) -> pa.Table:
    """Twelve rows of image, caption and id; columns given as None are left out."""
    base: dict[str, Any] = {
        "id": [f"r{row:02d}" for row in range(TABLE_ROWS)],
        "image": [PNG] * TABLE_ROWS,
        "caption": ["a caption"] * TABLE_ROWS,
    }
    return pa.table({name: data for name, data in {**base, **columns}.items() if data is not None})


def parquet(data: pa.Table, **options: Any) -> bytes:
    """A table's file, in row groups of four."""
    buffer = io.BytesIO()
    pq.write_table(data, buffer, **{"row_group_size": 4, **options})
    return buffer.getvalue()


def repeated(value: Any, kind: pa.DataType | None = None) -> pa.Array:
    """A column of one value."""
    return pa.array([value] * TABLE_ROWS, type=kind)


def table_cases() -> Iterator[tuple[Case, bytes]]:
    """Parquet files: damaged bytes, and sound ones of other schemas."""
    names = tuple(f"r{row:02d}" for row in range(TABLE_ROWS))

    def case(kind: str, name: str, data: bytes, edited: tuple[str, ...] = (), told: int = 0) -> tuple[Case, bytes]:
        shard = f"{kind}-{name}".replace(" ", "_").replace("/", "_") + ".parquet"
        return Case(kind, name, shard, edited=edited, told=told), data

    whole = parquet(table(), compression="none", use_dictionary=False)
    for part in range(16):
        yield case("parquet cut", f"at {part} of 16", whole[: part * len(whole) // 16], told=1)
    yield case("parquet cut", "last byte", whole[:-1], told=1)
    for part in range(16):
        place = 4 + part * (len(whole) - 12) // 16
        yield case("parquet noise", f"at {part} of 16", over(whole, place, random.Random(part).randbytes(60)))
        yield case("parquet zeros", f"at {part} of 16", over(whole, place, bytes(60)))
    footer = len(whole) - 8
    for name, length in {"0": 0, "1": 1, "2^31": 2**31 - 1, "2^32": 2**32 - 1, "the file": len(whole)}.items():
        yield case("parquet footer", f"length {name}", over(whole, footer, struct.pack("<I", length)), told=1)
    yield case("parquet footer", "magic", over(whole, footer + 4, b"XXXX"), told=1)
    yield case("parquet footer", "encrypted", over(whole, footer + 4, b"PARE"), told=1)
    yield case("parquet footer", "first magic", over(whole, 0, b"XXXX"))
    length = struct.unpack("<I", whole[footer : footer + 4])[0]
    for part in range(12):
        place = footer - length + part * length // 12
        yield case("parquet footer", f"noise at {part} of 12", over(whole, place, random.Random(part).randbytes(6)))
    yield case("parquet footer", "only magic", b"PAR1", told=1)
    yield case("parquet footer", "text", b"hello", told=1)
    yield case("parquet footer", "nothing", b"", told=1)

    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images: dict[str, tuple[Any, tuple[str, ...], int]] = {
        "missing": (None, (), 1),
        "text": (["x"] * TABLE_ROWS, (), 1),
        "numbers": (list(range(TABLE_ROWS)), (), 1),
        "null type": (pa.nulls(TABLE_ROWS), (), 1),
        "all null": (repeated(None, pa.binary()), (), TABLE_ROWS),
        "half null": ([PNG, None] * 6, names[::2], 6),
        "empty": ([b""] * TABLE_ROWS, (), TABLE_ROWS),
        "lists": (repeated([PNG]), (), 1),
        "large": (repeated(PNG, pa.large_binary()), names, 0),
        "view": (repeated(PNG, pa.binary_view()), names, 0),
        "fixed size": (repeated(PNG, pa.binary(len(PNG))), (), 0),
        "dictionary": (repeated(PNG).dictionary_encode(), (), 0),
        "struct": (repeated({"bytes": PNG, "path": "x"}, struct_type), names, 0),
        "struct, only path": (repeated({"bytes": None, "path": "/etc/passwd"}, struct_type), (), TABLE_ROWS),
        "struct, null": (repeated(None, struct_type), (), TABLE_ROWS),
        "struct without bytes": (repeated({"a": 1}), (), 1),
        "struct of structs": (repeated({"image": {"bytes": PNG}}), (), 1),
        "foreign type": (pa.ExtensionArray.from_storage(Foreign(), repeated(PNG)), (), 0),
        "over the limit": ([PNG, bytes(2 * MAX_MEMBER)] * 6, names[::2], 6),
    }
    for name, (column, edited, told) in images.items():
        yield case("parquet image", name, parquet(table(image=column)), edited, told)
    for name, column in {
        "numbers": list(range(TABLE_ROWS)),
        "bytes": [b"\xff"] * TABLE_ROWS,
        "null": [None] * TABLE_ROWS,
        "lists": [["a"]] * TABLE_ROWS,
        "dictionary": repeated("a").dictionary_encode(),
    }.items():
        yield case("parquet caption", name, parquet(table(caption=column)), names)
    not_utf8 = pa.Array.from_buffers(pa.string(), TABLE_ROWS, repeated(b"\xff\xfe").buffers())
    yield case("parquet caption", "not UTF-8", parquet(table(caption=not_utf8)), names)
    for name, column in {
        "twice": ["r00"] * TABLE_ROWS,
        "null": [None] * TABLE_ROWS,
        "numbers": list(range(TABLE_ROWS)),
        "floats": [0.5] * TABLE_ROWS,
        "empty": [""] * TABLE_ROWS,
        "paths": [f"../../{row}" for row in range(TABLE_ROWS)],
        "with hashes": ["x", "x", "x#1"] * 4,
        "NUL": [f"a\0{row}" for row in range(TABLE_ROWS)],
        "not UTF-8": not_utf8,
        "900 kB": ["k" * 900_000, *names[1:]],
    }.items():
        yield case("parquet key", name, parquet(table(id=column)))
    for name, column in {
        "broken JSON": ["{"] * TABLE_ROWS,
        "numbers": [5] * TABLE_ROWS,
        "deep JSON": ["[" * 100_000] * TABLE_ROWS,
        "bytes": [b"\xff"] * TABLE_ROWS,
        "lists": [[1]] * TABLE_ROWS,
    }.items():
        yield case("parquet edit", name, parquet(table(edit=column)), told=TABLE_ROWS)
    for name, column in {
        "times beyond years": pa.array([2**62] * TABLE_ROWS, pa.timestamp("s")),
        "nanoseconds": pa.array([1] * TABLE_ROWS, pa.timestamp("ns")),
        "durations": pa.array([2**62] * TABLE_ROWS, pa.duration("s")),
        "dates": pa.array([2**30] * TABLE_ROWS, pa.date32()),
        "maps": pa.array([[("a", 1), ("a", 2)]] * TABLE_ROWS, pa.map_(pa.string(), pa.int64())),
        "infinities": [float("inf")] * TABLE_ROWS,
        "half floats": pa.array(np.ones(TABLE_ROWS, np.float16)),
        "foreign type": pa.ExtensionArray.from_storage(Foreign(), repeated(b"x")),
        "deep": repeated([[[[[[[[1]]]]]]]]),
        "not UTF-8": not_utf8,
    }.items():
        try:
            data = parquet(table(other=column))
        except (pa.ArrowException, ValueError):  # what this pyarrow cannot write
            continue
        yield case("parquet column", name, data, names if name not in ("times beyond years", "dates") else ())
    yield case("parquet column", "named empty", parquet(table(**{"": [1] * TABLE_ROWS})), names)
    yield case("parquet column", "odd name", parquet(table(**{"\u202e\U0001f468\n": [1] * TABLE_ROWS})), names)
    arrays = [pa.array(names), repeated(PNG), repeated(PNG)]
    double = pa.Table.from_arrays(arrays, names=["id", "image", "image"])
    yield case("parquet column", "image twice", parquet(double), told=1)
    double = pa.Table.from_arrays([*arrays[:2], repeated(1), repeated(2)], names=["id", "image", "n", "n"])
    yield case("parquet column", "another twice", parquet(double), told=1)
    for codec in ("snappy", "gzip", "brotli", "lz4", "zstd"):
        data = parquet(table(), compression=codec)
        yield case("parquet codec", f"{codec} sound", data, names)
        yield case("parquet codec", f"{codec} noise", over(data, 60, b"\xa5" * 40))
    pandas = table().replace_schema_metadata(
        {"pandas": b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.", "huggingface": b"{"}
    )
    yield case("parquet metadata", "pickles", parquet(pandas), names)
    yield case("parquet metadata", "no rows", parquet(table().slice(0, 0)))
    yield case("parquet metadata", "one row group of nothing", parquet(table(), row_group_size=12), names)
    yield case("parquet metadata", "pages of version 2", parquet(table(), data_page_version="2.0"), names)
    bomb = table(other=["x" * (4 << 20)] * TABLE_ROWS)
    yield case("parquet metadata", "48 MiB of one letter", parquet(bomb, compression="zstd"), names)
