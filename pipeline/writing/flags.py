"""The flags of a run's drivers, one small file each in its folder. What they mean: writing/lock.py."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.common.partition import WHOLE, Partition
from pipeline.errors import SinkError
from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.files import from_json, get, list_folder, remove

FOLDER = "_lock"
NAME = re.compile(r"(\d{8,})-(?:(\d+)of([1-9]\d*)-)?([0-9a-f]{16})\.json")

State = Literal["trying", "holding", "released"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """What a driver says of itself. The host is a hash: names of machines do not belong in shared folders."""

    state: State
    host: str
    pid: int
    started: str  # of the process, in ticks since boot: a pid may be reused
    beat: int = 0
    beat_at: float = 0.0  # seconds since 1970 by the holder's clock; for people only

    def to_bytes(self) -> bytes:
        """As JSON."""
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()


def parsed(data: bytes | None) -> Flag | None:
    """A flag as stored; None where it is absent or damaged."""
    try:
        return Flag(**from_json(data or b""))
    except (ValueError, TypeError):
        return None


def flag_name(generation: int, partition: Partition, owner: str) -> str:
    """Name of a driver's flag. Names alone tell which flags exclude each other, so that the others need not be read."""
    part = "" if partition == WHOLE else f"{partition.index}of{partition.count}-"
    return f"{generation:08d}-{part}{owner}.json"


def generation(name: str) -> int:
    """Of a flag, by its name."""
    return int(name.partition("-")[0])


def partition_of(name: str) -> Partition:
    """What a flag is for, by its name."""
    found = NAME.fullmatch(name)
    return Partition(int(found[2]), int(found[3])) if found and found[2] else WHOLE


def owner(name: str) -> str:
    """Of a flag, by its name."""
    return name.rpartition("-")[2].removesuffix(".json")


def flags(fs: AbstractFileSystem, root: str) -> list[str]:
    """Names of all flags that are up.

    Raises:
        SinkError: the folder cannot be listed.
    """
    fs.invalidate_cache()  # s3fs remembers listings
    names = (posixpath.basename(path) for path in list_folder(fs, f"{root}/{FOLDER}"))
    return sorted(name for name in names if NAME.fullmatch(name))


@contextmanager
def no_empty_folder(sink: SinkConfig) -> Iterator[None]:
    """A run that is refused before it wrote anything leaves no new folder behind on a local disk, flags or not.

    Put around the lock: generations may then begin again, for nothing was written under the earlier ones.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    new = isinstance(fs, LocalFileSystem) and not os.path.exists(root)
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError, SinkError):
                _remove_if_only_locked(fs, root)
        raise


def _remove_if_only_locked(fs: AbstractFileSystem, root: str) -> None:
    folder = Path(root, FOLDER)
    there = [path for path in folder.rglob("*") if not path.is_dir()]
    up = (parsed(get(fs, str(path))) for path in there)
    if [path.name for path in Path(root).iterdir()] == [FOLDER] and all(
        flag and flag.state == "released" for flag in up
    ):
        for path in there:
            remove(fs, str(path))
        for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
            inner.rmdir()
        folder.rmdir()  # refused by the system where another driver has come in the meantime
        Path(root).rmdir()
