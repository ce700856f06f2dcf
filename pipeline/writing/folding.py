"""Finished shards take one object instead of one per unit: a million units are listed and read back in seconds.

    _units/<slug>/00000.json, 00001.json, ...   ->   _shards/<slug>.json

The folded file is written before the manifests go. A kill between the two leaves both; readers count a unit once.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.commit import LISTERS, Committed, units_of_shard
from pipeline.writing.files import get, list_folder, put, remove
from pipeline.writing.manifest import Manifest, shard_path
from pipeline.writing.merged import Merged

FOLD_FROM = 16  # units; of fewer the requests are few as well, and a small run's folder is easier to look into


def fold_finished_shards(sink: SinkConfig) -> int:
    """Fold every shard all of whose units are committed; how many were folded. For the one driver of a folder.

    Raises:
        SinkError: the folder cannot be listed, read or written.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()
    slugs = iter(sorted(posixpath.basename(path.rstrip("/")) for path in list_folder(fs, f"{root}/_units")))
    merged = Merged(fs, root)
    folded = 0
    with ThreadPoolExecutor(LISTERS) as pool:
        while window := list(islice(slugs, 4 * LISTERS)):
            folded += sum(pool.map(partial(_fold, fs, root, merged), window))
    return folded


def _fold(fs: AbstractFileSystem, root: str, merged: Merged, slug: str) -> bool:
    loose = [path for path in list_folder(fs, f"{root}/_units/{slug}") if path.endswith(".json")]
    there = get(fs, f"{root}/{shard_path(slug)}") is not None  # an earlier run folded, or was killed while it did
    if not there and len(loose) < FOLD_FROM:
        return False
    manifests = units_of_shard(fs, root, slug, merged)
    committed = Committed()
    for manifest in manifests:
        committed.add(manifest)
    if not committed.has_whole_shard(slug):
        return False
    put(fs, f"{root}/{shard_path(slug)}", folded_bytes(manifests))
    for path in loose:
        remove(fs, path)
    if isinstance(fs, LocalFileSystem):
        with contextlib.suppress(OSError):
            os.rmdir(Path(root, "_units", slug))
    return True


def folded_bytes(manifests: list[Manifest]) -> bytes:
    """One line per unit, so that two of them compare well."""
    units = ",\n".join(json.dumps(manifest.model_dump(mode="json"), sort_keys=True) for manifest in manifests)
    return f'{{"schema_version": 1, "units": [\n{units}\n]}}\n'.encode()
