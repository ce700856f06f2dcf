"""The version of a file: what a later start compares, to see that a shard is still what the run began with.

A store's entity tag is taken as it is. A local file has none, and its modification time will not do: `touch`, a copy or
a restored backup change it, and it can be set back. So its bytes are hashed: all of a small file; of a larger one its
size and `PIECES` pieces spread over it. With `source.check: content` it is the SHA-256 of all bytes, wherever they are.

Cost: at most 64 kB of a local file at every start; with `content` the whole source.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem

from pipeline.reading.storage import open_fs, retrying
from pipeline.recipe import SourceConfig

PIECES = 16
PIECE = 4096  # bytes
LOOKERS = 16  # files that are read side by side
BLOCK = 1 << 20
UNREADABLE = "unreadable"


def tag_of(info: Mapping[str, Any]) -> str:
    """The version that a store gives for a file; "" where it gives none."""
    return str(info.get("ETag") or info.get("etag") or "").strip('"')


def versions(files: Iterable[tuple[str, str]], source: SourceConfig) -> dict[str, str]:
    """The versions of files, by URL.

    Args:
        files: (URL, entity tag or another version that the store gives).
        source: decides what is looked at, and opens it.

    Returns:
        `UNREADABLE` for a file that cannot be read: reading its rows gives the better error.
    """
    with ThreadPoolExecutor(LOOKERS) as pool:
        return dict(pool.map(lambda file: (file[0], _version(file[0], file[1], source)), files))


def _version(url: str, tag: str, source: SourceConfig) -> str:
    fs, path = open_fs(url, source.storage_options)
    try:
        if source.check == "content":
            return f"sha256 {_content(fs, path)}"
        if not tag and isinstance(fs, LocalFileSystem):
            with open(path, "rb", buffering=0) as opened:
                return f"sample {_sample(opened)}"
    except OSError:
        return UNREADABLE
    return tag


def _sample(opened: BinaryIO) -> str:
    size = os.fstat(opened.fileno()).st_size
    digest = hashlib.sha256(str(size).encode())
    for at in range(PIECES) if size > PIECES * PIECE else (0,):
        length = PIECE if size > PIECES * PIECE else size
        digest.update(os.pread(opened.fileno(), length, at * (size - length) // (PIECES - 1)))
    return digest.hexdigest()[:32]


def _content(fs: Any, path: str) -> str:
    for attempt in retrying():
        with attempt, fs.open(path, "rb", block_size=BLOCK) as opened:
            digest = hashlib.sha256()
            while block := opened.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()
