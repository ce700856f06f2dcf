"""What is planned and read: shards, the tasks that read them, and the names of their units."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

from pipeline.samples import Unit

Format = Literal["webdataset", "parquet", "folder", "sets"]
UNIT_BYTES = 64 << 20  # of a unit's rows together, about; at least a quarter of the largest member that is allowed


class DamagedFileError(Exception):
    """The file is no Parquet, is cut, or holds no image column."""


class NoImageColumnError(DamagedFileError):
    """The file is sound, but nothing in it can be an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderRow:
    """One image of a folder and its sidecars, as paths relative to the folder; "" where there is none."""

    key: str
    image: str
    caption: str = ""
    edit: str = ""
    mask: str = ""
    size: int = 0  # bytes of these files together, as listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One input file, or one folder of image files."""

    path: str  # relative to the source, "/"-separated; unique; "." for a folder of images
    url: str  # openable with the source's storage options
    format: Format
    size: int  # bytes, as listed
    etag: str  # version as the store or a look at the bytes tells it (reading/versions.py); "" where neither does
    rows: int | None = None  # None: only a read can tell (tar, sets), or the file is damaged
    row_groups: tuple[int, ...] = ()  # Parquet: rows of each group
    row_bytes: int = 0  # Parquet: of a row on average, unpacked, in the row group where that is most
    files: tuple[FolderRow, ...] = ()  # folder: its images with their sidecars, sorted
    unit_bytes: int = UNIT_BYTES  # a unit ends with the row that brings it to so many, if not before

    def unit_rows(self, unit_size: int) -> int:
        """Parquet: rows of a unit. From the footer, so that whoever reads any part of the file cuts alike."""
        return max(1, min(unit_size, self.unit_bytes // max(1, self.row_bytes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTask:
    """What one worker reads in one go: a whole tar, or file of sets; some units of a Parquet file; a folder's chunk."""

    shard: Shard
    start: int  # first row, with which a unit begins
    stop: int | None  # row after the last; None: to the end of the shard
    chunk: int = 0  # of the first row
    rows: tuple[FolderRow, ...] = ()  # folder: this chunk's files; the shard travels without its list of files


def shard_slug(shard_path: str) -> str:
    """A name for a shard that is safe as a file name: its path's words, and a hash that keeps like names apart."""
    stem = re.sub(r"(\.tar)?(\.gz)?$|\.tgz$|\.parquet$|\.jsonl$", "", shard_path)
    words = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")[-64:].strip("-")
    digest = hashlib.sha256(shard_path.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{words}-{digest}" if words else digest


def unit_id(shard_path: str, chunk: int) -> str:
    """Name of a shard's chunk (from 0): the same in every run, different for every shard and chunk."""
    return f"{shard_slug(shard_path)}-{chunk:05d}"


class Cuts:
    """Where units end, from the sizes of a shard's rows alone, which come one by one: the same for every reader.

    Args:
        unit_size: rows of a unit, at most.
        unit_bytes: a unit ends with the row that brings it to so many.
    """

    def __init__(self, unit_size: int, unit_bytes: int) -> None:
        self._unit_size, self._unit_bytes = unit_size, unit_bytes
        self.starts = [0]  # first rows of units; the last one may have none yet
        self.rows = 0
        self._bytes = 0

    def add(self, size: int) -> None:
        """The next row's bytes."""
        self.rows += 1
        self._bytes += size
        if self.rows - self.starts[-1] == self._unit_size or self._bytes >= self._unit_bytes:
            self.starts.append(self.rows)
            self._bytes = 0

    def chunk_of(self, index: int) -> int:
        """Which unit a row belongs to; known once all rows before it are."""
        return bisect_right(self.starts, index) - 1


def unit_of(shard: Shard, chunk: int, start: int, count: int, *, is_last: bool) -> Unit:
    """The unit that holds `count` rows of a shard from row `start` on."""
    return Unit(
        id=unit_id(shard.path, chunk), shard=shard.path, chunk=chunk, start=start, stop=start + count, is_last=is_last
    )
