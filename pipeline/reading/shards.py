"""What is planned and read: shards, the tasks that read them, and the names of their units."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from pipeline.records import Unit

Format = Literal["webdataset", "parquet", "folder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderRow:
    """One image of a folder and its sidecars, as paths relative to the folder; "" where there is none."""

    key: str
    image: str
    caption: str = ""
    edit: str = ""
    mask: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One input file, or one folder of image files."""

    path: str  # relative to the source, "/"-separated; unique; "." for a folder of images
    url: str  # openable with the source's storage options
    format: Format
    size: int  # bytes, as listed
    etag: str  # version as the store or a look at the bytes tells it (reading/versions.py); "" where neither does
    rows: int | None = None  # None: only a read can tell (tar), or the file is damaged
    row_groups: tuple[int, ...] = ()  # Parquet: rows of each group
    row_bytes: int = 0  # Parquet: of a row on average, unpacked, in the row group where that is most
    files: tuple[FolderRow, ...] = ()  # folder: its images with their sidecars, sorted


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTask:
    """What one worker reads in one go: a whole tar, some units of a Parquet file, one chunk of a folder."""

    shard: Shard
    start: int  # first row, a multiple of the unit size
    stop: int | None  # row after the last; None: to the end of the shard
    rows: tuple[FolderRow, ...] = ()  # folder: this chunk's files; the shard travels without its list of files


def shard_slug(shard_path: str) -> str:
    """A name for a shard that is safe as a file name: its path's words, and a hash that keeps like names apart."""
    stem = re.sub(r"(\.tar)?(\.gz)?$|\.tgz$|\.parquet$", "", shard_path)
    words = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")[-64:].strip("-")
    digest = hashlib.sha256(shard_path.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{words}-{digest}" if words else digest


def unit_id(shard_path: str, chunk: int) -> str:
    """Name of a shard's chunk (from 0): the same in every run, different for every shard and chunk."""
    return f"{shard_slug(shard_path)}-{chunk:05d}"


def unit_of(shard: Shard, chunk: int, unit_size: int, count: int, *, is_last: bool) -> Unit:
    """The unit that holds `count` rows of a shard from `chunk * unit_size` on."""
    start = chunk * unit_size
    return Unit(
        id=unit_id(shard.path, chunk), shard=shard.path, chunk=chunk, start=start, stop=start + count, is_last=is_last
    )
