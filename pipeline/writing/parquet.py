"""Rows as a Parquet file: those of one unit in memory, those of a merged file group by group.

The same rows give the same bytes: fixed codecs and row groups, no time. Encoded images are stored as they are (they do
not shrink further); an input image that several rows share is stored once per row group, in the column's dictionary.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 100  # what viewers of image datasets fetch at a time
BYTES_PER_GROUP = 64 * 2**20  # a writer holds a row group several times over: rows, table, pages
DICTIONARY_BYTES = 2**30  # a column falls back to plain storage, without sharing, beyond this


def render_parquet(rows: Sequence[dict[str, Any]], schema: pa.Schema, shared: Sequence[str] = ()) -> bytes:
    """Write rows as Parquet.

    Args:
        rows: {column: value}, for every column of the schema.
        schema: of the file, with its metadata.
        shared: paths of binary columns whose values repeat from row to row.
    """
    buffer = io.BytesIO()
    with parquet_writer(buffer, schema, shared) as writer:
        for group in _groups(rows):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            pa.default_memory_pool().release_unused()  # else large rows leave their pages behind
    return buffer.getvalue()


def parquet_writer(file: BinaryIO, schema: pa.Schema, shared: Sequence[str] = ()) -> pq.ParquetWriter:
    """Writes row groups as they come; see `render_parquet`."""
    leaves = _leaves(schema)
    plain = [path for path in leaves if not path.endswith("bytes") and path != "image"]
    return pq.ParquetWriter(
        file,
        schema,
        compression={path: "zstd" if path in plain else "none" for path in leaves},
        use_dictionary=[*shared, *plain],
        write_statistics=plain,  # the least and the greatest image tell nothing, and take four times its memory
        dictionary_pagesize_limit=DICTIONARY_BYTES,
    )


def regroup(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows as they stand in other files, in row groups such as `render_parquet` makes: however they were cut before."""
    group: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        for at in range(batch.num_rows):
            row = batch.slice(at, 1)
            weight = row.nbytes
            if group and (len(group) == ROWS_PER_GROUP or size + weight > BYTES_PER_GROUP):
                yield pa.Table.from_batches(group, schema).combine_chunks()
                group, size = [], 0
            group.append(row)
            size += weight
    if group:
        yield pa.Table.from_batches(group, schema).combine_chunks()


def _leaves(schema: pa.Schema) -> list[str]:
    """Paths of the columns as Parquet stores them, e.g. `masks.list.element.bytes`."""
    empty = io.BytesIO()
    pq.write_table(schema.empty_table(), empty)
    leaves = pq.ParquetFile(empty).schema
    return [leaves.column(at).path for at in range(len(leaves))]


def _groups(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        weight = _weight(row)
        if group and (len(group) == ROWS_PER_GROUP or size + weight > BYTES_PER_GROUP):
            yield group
            group, size = [], 0
        group.append(row)
        size += weight
    if group:
        yield group


def _weight(value: Any) -> int:
    """Bytes of what a row holds, roughly."""
    if isinstance(value, dict):
        return sum(_weight(item) for item in value.values())
    if isinstance(value, list):
        return sum(_weight(item) for item in value)
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    return len(value) if isinstance(value, (bytes, str)) else 8
