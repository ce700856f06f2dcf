"""How files come to stand in the run's folder, and what of them counts.

A unit's files have names that derive from its input alone; its manifest is written last and is the commit. A data file
without a manifest is noise: a rerun writes the same file again, or removes it where the unit has none of that kind any
more. So a run may die anywhere, and two workers may commit one unit, without a row lost or doubled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from pipeline.errors import SinkError
from pipeline.reading.storage import open_fs, retrying
from pipeline.recipe import SinkConfig
from pipeline.showing import describe, public_url
from pipeline.writing.files import get, list_folder, put, remove
from pipeline.writing.manifest import (
    KINDS,
    FileRecord,
    Manifest,
    data_path,
    manifest_path,
    quarantine_path,
    shard_path,
    split_unit_id,
)
from pipeline.writing.merged import Merged

log = logging.getLogger(__name__)

LISTERS = 8  # shards whose manifests are read side by side: on an object store each costs a few round trips


@dataclass(frozen=True, slots=True)
class FinishedUnit:
    """A unit ready to be committed: its files in memory, and the manifest that lists them."""

    manifest: Manifest
    files: tuple[tuple[str, bytes], ...]  # (path relative to the run's folder, content)


def file_record(path: str, data: bytes, rows: int) -> FileRecord:
    """What a manifest says of a file."""
    return FileRecord(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=rows)


def commit(finished: FinishedUnit, sink: SinkConfig) -> Manifest:
    """Write a unit's files and then its manifest. Doing it again, or twice at once, leaves the same files.

    Raises:
        SinkError: the sink does not take them; the unit is then not committed.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    unit = finished.manifest.unit
    # An attempt that died before its manifest may have written a kind of file that this one has not: its rows may
    # since have been found to kill their process.
    for path in {data_path(unit, sink), quarantine_path(unit, sink)} - {path for path, _ in finished.files}:
        remove(fs, f"{root}/{path}")
    for path, data in finished.files:
        put(fs, f"{root}/{path}", data)
    put(fs, f"{root}/{manifest_path(finished.manifest.unit)}", finished.manifest.to_bytes())
    return finished.manifest


@dataclass(slots=True)
class Committed:
    """Which units are committed, at one bit each: a million units take less than a megabyte beside their shards' names.

    It travels to the read tasks, hence `of_shard`.
    """

    chunks: dict[str, int] = field(default_factory=dict)  # by shard slug: bit i stands for chunk i
    last: dict[str, int] = field(default_factory=dict)  # by shard slug: its last chunk, where that is committed

    def add(self, manifest: Manifest) -> None:
        """Note a committed unit."""
        slug, _ = split_unit_id(manifest.unit)
        self.chunks[slug] = self.chunks.get(slug, 0) | 1 << manifest.chunk
        if manifest.is_last:
            self.last[slug] = manifest.chunk

    def has(self, unit_id: str) -> bool:
        """Whether a unit is committed."""
        slug, chunk = split_unit_id(unit_id)
        return bool(self.chunks.get(slug, 0) >> int(chunk) & 1)

    def has_whole_shard(self, slug: str) -> bool:
        """Whether every unit of a shard is committed: the last one says that it is the last."""
        return slug in self.last and self.chunks[slug] == (1 << (self.last[slug] + 1)) - 1

    def of_shard(self, slug: str) -> Committed:
        """The part that concerns one shard."""
        return Committed(
            {slug: self.chunks[slug]} if slug in self.chunks else {},
            {slug: self.last[slug]} if slug in self.last else {},
        )


def committed_units(sink: SinkConfig, *, trusted: bool = True) -> Iterator[Manifest]:
    """Every manifest whose files exist with the listed size, shard by shard; nothing is held but one window of shards.

    A manifest that does not parse, or whose files are missing or of another size, does not count: its unit is done
    again. With `trusted=False` the files are not looked at.

    Raises:
        SinkError: the folder cannot be listed.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()  # s3fs remembers listings
    merged = Merged(fs, root) if trusted else None
    # In this order, since folding goes from the first to the second: a shard is seen in one of them, or in both.
    loose = {posixpath.basename(path.rstrip("/")) for path in list_folder(fs, f"{root}/_units")}
    folded = {posixpath.basename(path).removesuffix(".json") for path in list_folder(fs, f"{root}/_shards")}
    slugs = iter(sorted(loose | folded))
    with ThreadPoolExecutor(LISTERS) as pool:
        while window := list(islice(slugs, 4 * LISTERS)):
            for manifests in pool.map(lambda slug: units_of_shard(fs, root, slug, merged), window):
                yield from manifests


def units_of_shard(fs: AbstractFileSystem, root: str, slug: str, merged: Merged | None) -> list[Manifest]:
    """A shard's part of `committed_units`, by chunk; each unit once, though folding may be half done.

    Args:
        fs: the file system.
        root: of the run's folder in it.
        slug: of the shard.
        merged: where units' files may be instead; None: they are not looked at.

    Raises:
        SinkError: it cannot be read.
    """
    paths = [path for path in list_folder(fs, f"{root}/_units/{slug}") if path.endswith(".json")]
    loose = [manifest for path in paths if (manifest := _parsed(fs, path)) is not None]
    # After the loose ones, which only go once the folded ones are there. Loose ones win: their unit was done again.
    chunks = {manifest.chunk: manifest for manifest in (*_folded(fs, f"{root}/{shard_path(slug)}"), *loose)}
    manifests = [chunks[chunk] for chunk in sorted(chunks)]
    if merged is None:
        return manifests
    there = _whole(fs, root, slug, manifests, merged)
    if len(there) < len(manifests) and merged.changed:  # merged, and so removed, while they were looked for
        merged.reload()
        there = _whole(fs, root, slug, manifests, merged)
    for manifest in manifests:
        if manifest.unit not in there:
            log.warning("a file of unit %s is missing or not of the listed size: it is done again", manifest.unit)
    return [manifest for manifest in manifests if manifest.unit in there]


def _parsed(fs: AbstractFileSystem, path: str) -> Manifest | None:
    data = get(fs, path)
    if data is None:
        return None
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        log.warning("%s is no manifest, its unit is done again: %s", public_url(path), error.errors()[0]["msg"])
        return None


def manifest_of(fs: AbstractFileSystem, root: str, unit_id: str) -> Manifest | None:
    """A unit's manifest, alone or folded, whether or not its files are there; None for a unit that is not committed.

    Raises:
        SinkError: it cannot be read.
    """
    slug, chunk = split_unit_id(unit_id)
    if (manifest := _parsed(fs, f"{root}/{manifest_path(unit_id)}")) is not None:
        return manifest
    folded = _folded(fs, f"{root}/{shard_path(slug)}")
    return next((manifest for manifest in folded if manifest.chunk == int(chunk)), None)


def _folded(fs: AbstractFileSystem, path: str) -> list[Manifest]:
    data = get(fs, path)
    if data is None:
        return []
    try:
        return [Manifest.model_validate(manifest) for manifest in json.loads(data)["units"]]
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged, its shard is done again: %s", public_url(path), describe(error))
        return []


def _whole(fs: AbstractFileSystem, root: str, slug: str, manifests: Iterable[Manifest], merged: Merged) -> set[str]:
    """The units whose files are all there, alone or merged."""
    alone = {
        manifest.unit: [file for file in manifest.files if merged.find(file, manifest.unit) is None]
        for manifest in manifests
    }
    sizes = _sizes(fs, root, slug, sorted(file.path for files in alone.values() for file in files))
    return {unit for unit, files in alone.items() if all(sizes.get(file.path) == file.size for file in files)}


def _sizes(fs: AbstractFileSystem, root: str, slug: str, listed: list[str]) -> dict[str, int]:
    """Sizes of a shard's files, by path relative to the root."""
    if isinstance(fs, LocalFileSystem):
        there = ((path, Path(root, path)) for path in listed)
        return {path: file.stat().st_size for path, file in there if file.is_file()}
    sizes: dict[str, int] = {}
    for folder in sorted({posixpath.dirname(path) for path in listed}):
        # One listing for the whole shard, not a request per file.
        prefix = f"part-{slug}-" if folder in KINDS else ""
        try:
            found: dict[str, Any] = retrying()(fs.find, f"{root}/{folder}", prefix=prefix, detail=True)
        except Exception as error:
            raise SinkError(
                f"{public_url(f'{root}/{folder}')} cannot be listed: {describe(error)}. Check sink.folder and its "
                "permissions"
            ) from error
        sizes |= {f"{folder}/{posixpath.basename(path)}": entry["size"] for path, entry in found.items()}
    return sizes
