"""The rows of one unit, read from where they stand: a file of its own, or part of a merged one (writing/merged.py)."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipeline.common.showing import describe, public_url
from pipeline.errors import SinkError
from pipeline.reading.storage import retrying
from pipeline.writing.files import read_part
from pipeline.writing.merged import Span

END_OF_TAR = bytes(1024)  # two blocks of zeros


def table_of(fs: AbstractFileSystem, root: str, span: Span, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a Parquet span; of a merged file, the row groups that hold some of them are read.

    Raises:
        SinkError: the file cannot be read.
    """

    def take(opened: BinaryIO) -> pa.Table:
        file = pq.ParquetFile(opened)
        first, groups = 0, []
        start = None
        for group in range(file.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            if first < span.start + span.rows and after > span.start:
                groups.append(group)
                start = first if start is None else start
            first = after
        table = file.read_row_groups(groups, columns=list(columns) if columns is not None else None)
        return table.slice(span.start - (start or 0), span.rows)

    return read_part(fs, f"{root}/{span.path}", take)


def rows_of(fs: AbstractFileSystem, root: str, span: Span, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of a span's rows that are no pictures, from either format; those that a row lacks are None.

    Raises:
        SinkError: the file cannot be read.
    """
    if not span.path.endswith(".tar"):
        rows: list[dict[str, Any]] = table_of(fs, root, span, columns).to_pylist()
        return rows
    found = (json.loads(sample["json"]) for sample in samples_of(fs, root, span))
    return [{name: row.get(name) for name in columns} for row in found]


def tar_of(fs: AbstractFileSystem, root: str, span: Span) -> bytes:
    """A tar with the members of a span alone.

    Raises:
        SinkError: the file cannot be read.
    """
    path = f"{root}/{span.path}"
    try:
        if span.end is None:
            whole: bytes = retrying()(fs.cat_file, path)
            return whole
        part: bytes = retrying()(fs.cat_file, path, start=span.begin, end=span.end)
        return part + END_OF_TAR
    except Exception as error:
        raise SinkError(
            f"{public_url(path)} cannot be read: {describe(error)}. To look for damage: shardedit verify"
        ) from error


def samples_of(fs: AbstractFileSystem, root: str, span: Span) -> Iterator[dict[str, bytes]]:
    """Samples of a tar span, {member: bytes}.

    Raises:
        SinkError: the file cannot be read.
    """
    return tar_samples(io.BytesIO(tar_of(fs, root, span)))


def end_of_members(tar: bytes) -> int:
    """Where the last member of a tar ends; zeros follow."""
    end = 0
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        for member in opened:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return end


def tar_samples(file: BinaryIO) -> Iterator[dict[str, bytes]]:
    """Samples of a tar of ours, {member: bytes}. Ours are whole and in order: the standard library will do."""
    key = ""
    sample: dict[str, bytes] = {}
    with tarfile.open(fileobj=file) as tar:
        for member in tar:
            opened = tar.extractfile(member)
            if opened is None:
                continue
            name, _, extension = member.name.partition(".")
            # A member that comes again begins a sample as well: a doubled row is two rows.
            if sample and (name != key or extension in sample):
                yield sample
                sample = {}
            key = name
            sample[extension] = opened.read()
            tar.members = []  # type: ignore[attr-defined]  # or it remembers every header
    if sample:
        yield sample
