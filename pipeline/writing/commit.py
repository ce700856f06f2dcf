"""How files come to stand in the run's folder, and what of them counts.

A unit's files have names that derive from its input alone; its manifest is written last and is the commit. A data file
without a manifest is noise: a rerun writes the same file again, or removes it where the unit has none of that kind any
more. So a run may die anywhere, and two workers may commit one unit, without a row lost or doubled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import posixpath
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from pipeline.errors import SinkError
from pipeline.reading.storage import open_fs, retrying
from pipeline.recipe import SinkConfig
from pipeline.showing import describe, public_url
from pipeline.writing.manifest import (
    FileRecord,
    Manifest,
    data_path,
    manifest_path,
    quarantine_path,
    shard_path,
    split_unit_id,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

TEMPORARY_SUFFIX = ".tmp"
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
    for path in {data_path(unit, sink.format), quarantine_path(unit)} - {path for path, _ in finished.files}:
        remove(fs, f"{root}/{path}")
    for path, data in finished.files:
        put(fs, f"{root}/{path}", data)
    put(fs, f"{root}/{manifest_path(finished.manifest.unit)}", finished.manifest.to_bytes())
    return finished.manifest


def put(fs: AbstractFileSystem, path: str, data: bytes, *, durable: bool = True) -> None:
    """Write a whole file or none of it: no reader, and no kill, meets a part.

    Args:
        fs: where to.
        path: in it.
        data: the content.
        durable: whether a local file is to outlive a crash of the machine.

    Raises:
        SinkError: says which file, and why not.
    """
    try:
        if isinstance(fs, LocalFileSystem):
            _put_local(Path(path), data, durable)
        else:
            # One upload is atomic on an object store. Never rename there: that is a copy and a delete. A large file
            # goes up in parts, which are no object before the last call completes them: what a killed upload leaves
            # is never listed or read, so nothing here cleans it; a lifecycle rule of the bucket frees its space.
            retrying()(fs.pipe_file, path, data)
    except Exception as error:  # those of botocore and aiohttp share no other base
        raise SinkError(
            f"{public_url(path)} cannot be written: {describe(error)}. Check sink.folder, its permissions and its space"
        ) from error


def _put_local(path: Path, data: bytes, durable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, since only there a rename is atomic; the dot hides it from `data/*.parquet`.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if not durable:
        return
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # or a crash of the machine may forget the new name
    finally:
        os.close(directory)


def is_temporary(path: str) -> bool:
    """Whether a file is one that a local `put` began: a kill leaves it behind, and no reader takes it."""
    name = posixpath.basename(path)
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def get(fs: AbstractFileSystem, path: str) -> bytes | None:
    """A file's content, or None where there is none.

    Raises:
        SinkError: it can neither be read nor be said to be missing.
    """
    try:
        data: bytes = retrying()(fs.cat_file, path)
        return data
    except FileNotFoundError:
        return None
    except Exception as error:
        raise SinkError(
            f"{public_url(path)} cannot be read: {describe(error)}. Check sink.folder and its permissions"
        ) from error


def read_part(fs: AbstractFileSystem, path: str, take: Callable[[BinaryIO], T]) -> T:
    """What `take` reads of a file, for files of which a part is enough; from a fresh open where the store fails.

    Raises:
        SinkError: it cannot be opened or read.
    """

    def attempt() -> T:
        with fs.open(path, "rb") as opened:
            return take(opened)

    try:
        return retrying()(attempt)
    except Exception as error:
        raise SinkError(
            f"{public_url(path)} cannot be read: {describe(error)}. To look for damage: shardedit verify"
        ) from error


def remove(fs: AbstractFileSystem, path: str) -> None:
    """Remove a file that may be there.

    Raises:
        SinkError: it can neither be removed nor be said to be missing.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            retrying()(fs.rm_file, path)
    except Exception as error:
        raise SinkError(
            f"{public_url(path)} cannot be removed: {describe(error)}. Check sink.folder and its permissions"
        ) from error


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
    # In this order, since folding goes from the first to the second: a shard is seen in one of them, or in both.
    loose = {posixpath.basename(path.rstrip("/")) for path in list_folder(fs, f"{root}/_units")}
    folded = {posixpath.basename(path).removesuffix(".json") for path in list_folder(fs, f"{root}/_shards")}
    slugs = iter(sorted(loose | folded))
    with ThreadPoolExecutor(LISTERS) as pool:
        while window := list(islice(slugs, 4 * LISTERS)):
            for manifests in pool.map(lambda slug: units_of_shard(fs, root, slug, trusted), window):
                yield from manifests


def list_folder(fs: AbstractFileSystem, path: str) -> dict[str, int]:
    """What stands in a folder, {path: size}; empty where there is no such folder.

    Raises:
        SinkError: it cannot be listed.
    """
    try:
        return {entry["name"]: entry["size"] or 0 for entry in retrying()(fs.ls, path, detail=True)}
    except FileNotFoundError:
        return {}
    except Exception as error:
        raise SinkError(
            f"{public_url(path)} cannot be listed: {describe(error)}. Check sink.folder and its permissions"
        ) from error


def units_of_shard(fs: AbstractFileSystem, root: str, slug: str, trusted: bool = True) -> list[Manifest]:
    """A shard's part of `committed_units`, by chunk; each unit once, though folding may be half done.

    Raises:
        SinkError: it cannot be read.
    """
    paths = [path for path in list_folder(fs, f"{root}/_units/{slug}") if path.endswith(".json")]
    loose = [manifest for path in paths if (manifest := _parsed(fs, path)) is not None]
    # After the loose ones, which only go once the folded ones are there. Loose ones win: their unit was done again.
    chunks = {manifest.chunk: manifest for manifest in (*_folded(fs, f"{root}/{shard_path(slug)}"), *loose)}
    manifests = [chunks[chunk] for chunk in sorted(chunks)]
    if not trusted:
        return manifests
    sizes = _sizes(fs, root, slug, manifests)
    return [manifest for manifest in manifests if _files_are_there(manifest, sizes)]


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


def _sizes(fs: AbstractFileSystem, root: str, slug: str, manifests: Iterable[Manifest]) -> dict[str, int]:
    """Sizes of a shard's files, by path relative to the root."""
    listed = sorted({file.path for manifest in manifests for file in manifest.files})
    if isinstance(fs, LocalFileSystem):
        there = ((path, Path(root, path)) for path in listed)
        return {path: file.stat().st_size for path, file in there if file.is_file()}
    sizes: dict[str, int] = {}
    for folder in sorted({posixpath.dirname(path) for path in listed}):
        # One listing for the whole shard, not a request per file.
        try:
            found: dict[str, Any] = retrying()(fs.find, f"{root}/{folder}", prefix=f"part-{slug}-", detail=True)
        except Exception as error:
            raise SinkError(
                f"{public_url(f'{root}/{folder}')} cannot be listed: {describe(error)}. Check sink.folder and its "
                "permissions"
            ) from error
        sizes |= {f"{folder}/{posixpath.basename(path)}": entry["size"] for path, entry in found.items()}
    return sizes


def _files_are_there(manifest: Manifest, sizes: dict[str, int]) -> bool:
    for file in manifest.files:
        if sizes.get(file.path) != file.size:
            log.warning("%s is missing or not of the listed size: unit %s is done again", file.path, manifest.unit)
            return False
    return True
