"""Replaces the index of merged files by another, and removes what the new one does not name.

A driver that is paused and taken over meanwhile (writing/baseline.py) may still write its index, which is no longer the
highest, and remove what it replaced. So an index names beforehand what will be removed, and no later driver uses these
names.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.commit import LISTERS
from pipeline.writing.files import list_folder, put, remove
from pipeline.writing.lock import Claim
from pipeline.writing.manifest import KINDS
from pipeline.writing.merged import OUTPUT, Index, Merged, index_path, index_paths

SPLIT = "train"  # the name that `datasets` gives to a dataset of one part
OUTPUT_NAME = re.compile(rf"{SPLIT}-\d{{5,}}-of-\d{{5,}}-[0-9a-f]{{8,64}}\.(parquet|tar|json)")


def replace_index(sink: SinkConfig, before: Merged, index: Index, claim: Claim, unneeded: Sequence[str] = ()) -> None:
    """Put an index in place of the one that counted, and remove every file of ours that it does not name.

    Args:
        sink: where the run stands.
        before: the index that counted.
        index: of this driver.
        claim: the driver's.
        unneeded: further files that go with it, relative to the run's folder.

    Raises:
        RunAborted: another driver has taken the folder over; nothing is removed.
        SinkError: the store fails.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()
    slots = [slot for slots in index.slots.values() for slot in slots]
    named = {path for slot in slots if slot.file for path in (slot.file.path, slot.contents)}
    going = [path for path in left_by_merging(fs, root) if path not in named]
    older = [path for path in index_paths(fs, root) if path < index_path(index.generation)]
    # A driver that was taken over while it removed files may go on at any time: what it named stays named.
    others = before.index.dying if before.index else ()
    mine = index.model_copy(update={"dying": tuple(sorted({*others, *going}))})
    put(fs, f"{root}/{index_path(index.generation)}", mine.to_bytes())
    claim.check()  # after the index names what goes, before anything goes: see baseline.py
    with ThreadPoolExecutor(LISTERS) as pool:
        list(pool.map(lambda path: remove(fs, f"{root}/{path}"), [*going, *unneeded, *older]))
    for folder in sorted({posixpath.dirname(path) for path in unneeded}):
        remove_empty(fs, f"{root}/{folder}")
    if going:
        put(fs, f"{root}/{index_path(index.generation)}", index.model_copy(update={"dying": others}).to_bytes())


def left_by_merging(fs: AbstractFileSystem, root: str) -> list[str]:
    """Merged files and their contents, whether or not an index names them, relative to the run's folder."""
    folders = (*KINDS, *(f"{OUTPUT}/{kind}" for kind in KINDS))
    names = {folder: sorted(map(posixpath.basename, list_folder(fs, f"{root}/{folder}"))) for folder in folders}
    return [path for folder in folders for name in names[folder] if belongs_to_merged(path := f"{folder}/{name}")]


def belongs_to_merged(path: str) -> bool:
    """Whether a path, relative to the run's folder, is that of a merged file or of its contents."""
    folder, _, name = path.rpartition("/")
    return folder.removeprefix(f"{OUTPUT}/") in KINDS and OUTPUT_NAME.fullmatch(name) is not None


def remove_empty(fs: AbstractFileSystem, path: str) -> None:
    """Remove a folder that may be empty."""
    if isinstance(fs, LocalFileSystem):  # object stores have no folders
        with contextlib.suppress(OSError):
            os.rmdir(Path(path))
