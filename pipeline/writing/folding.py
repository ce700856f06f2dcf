"""Finished shards take one object instead of one per unit: a million units are listed and read back in seconds.

    _units/SLUG/00000-GENERATION.json, 00001-GENERATION.json, ...   ->   _shards/SLUG-GENERATION.json

The folded file is written before the manifests go, and bears the generation of the driver that folds; each unit keeps
its own. A kill between the two leaves both; readers count a unit once.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.commit import LISTERS, Commits, Committed, CommittedShard
from pipeline.writing.files import put, remove
from pipeline.writing.lock import Claim
from pipeline.writing.manifest import Manifest, shard_path

FOLD_FROM = 16  # units; fewer cost few requests, and single manifests are easier to look into


def fold_finished_shards(sink: SinkConfig, claim: Claim, only: Iterable[str] | None = None) -> int:
    """Fold every shard all of whose units are committed; how many were folded.

    Args:
        sink: where the run stands.
        claim: the driver's.
        only: slugs of the shards that are the driver's; None where all are.

    Raises:
        RunAborted: another driver has taken the folder over.
        SinkError: the folder cannot be listed, read or written.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    commits = Commits(sink)
    slugs = iter(sorted(commits.loose if only is None else commits.loose & set(only)))
    folded = 0
    with ThreadPoolExecutor(LISTERS) as pool:
        while window := list(islice(slugs, 4 * LISTERS)):
            shards = [shard for shard in pool.map(commits.shard, window) if _is_to_fold(shard)]
            list(pool.map(partial(_fold, fs, root, claim.generation), shards))
            if shards:
                claim.check()  # after what counts is written, before anything is removed: see baseline.py
            list(pool.map(partial(_remove_single, fs, root, claim.generation), shards))
            folded += len(shards)
    return folded


def _is_to_fold(shard: CommittedShard) -> bool:
    committed = Committed()
    for manifest in shard.manifests:
        committed.add(manifest)
    if not committed.has_whole_shard(shard.slug) or list(shard.paths) == shard.folds == list(shard.used):
        return False
    return bool(shard.folds) or len(shard.manifests) >= FOLD_FROM  # an earlier driver may have folded it


def _fold(fs: AbstractFileSystem, root: str, generation: int, shard: CommittedShard) -> None:
    put(fs, f"{root}/{shard_path(shard.slug, generation)}", folded_bytes(shard.manifests))


def _remove_single(fs: AbstractFileSystem, root: str, generation: int, shard: CommittedShard) -> None:
    for path in shard.paths:
        if path != shard_path(shard.slug, generation):
            remove(fs, f"{root}/{path}")
    if isinstance(fs, LocalFileSystem):
        with contextlib.suppress(OSError):
            os.rmdir(Path(root, "_units", shard.slug))


def folded_bytes(manifests: Iterable[Manifest]) -> bytes:
    """One line per unit, so that two of them compare well."""
    units = ",\n".join(json.dumps(manifest.model_dump(mode="json"), sort_keys=True) for manifest in manifests)
    return f'{{"schema_version": 3, "units": [\n{units}\n]}}\n'.encode()
