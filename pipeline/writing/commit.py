"""How files get into the run's folder, and which of them count.

A unit's files have names that derive from its input and its driver's generation; its manifest is written last and is
the commit. A data file without a manifest that counts is noise, which the next driver removes. So a run may die
anywhere, two workers may commit one unit, and a driver that was taken over may go on, without a row lost or doubled.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ValidationError

from pipeline.common.showing import describe, public_url
from pipeline.errors import SinkError
from pipeline.reading.storage import open_fs, retrying
from pipeline.recipe import SinkConfig
from pipeline.writing.baseline import LOOKS, Baselines
from pipeline.writing.files import NotAFileError, get, list_folder, put, remove
from pipeline.writing.manifest import (
    KINDS,
    FileRecord,
    Manifest,
    Measured,
    data_path,
    manifest_path,
    quarantine_path,
    rejected_path,
    shard_path,
    split_generation,
    split_unit_id,
)
from pipeline.writing.merged import Merged
from pipeline.writing.paths import first_problem

log = logging.getLogger(__name__)

LISTERS = 8  # shards whose manifests are read side by side: on an object store each costs a few round trips


@dataclass(frozen=True, slots=True)
class FinishedUnit:
    """A unit ready to be committed: its files in memory, and the manifest that lists them."""

    manifest: Manifest
    files: tuple[tuple[str, bytes], ...]  # (path relative to the run's folder, content)

    def with_measured(self, measured: Measured) -> FinishedUnit:
        """The same unit, with what its making took."""
        return replace(self, manifest=self.manifest.model_copy(update={"measured": measured}))


def file_record(path: str, data: bytes, rows: int) -> FileRecord:
    """What a manifest says of a file."""
    return FileRecord(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=rows)


def commit(finished: FinishedUnit, sink: SinkConfig, check: Callable[[], None]) -> Manifest:
    """Write a unit's files and then its manifest. Doing it again, or twice at once, leaves the same files.

    Args:
        finished: the unit.
        sink: where the run stands.
        check: raises where another driver has taken the folder over. A driver that is paused after it, and wakes up too
            late, harms nothing: its files have names of their own, and its manifest counts for nothing
            (writing/baseline.py).

    Raises:
        SinkError: the sink does not take them; the unit is then not committed.
    """
    check()
    fs, root = open_fs(sink.folder, sink.storage_options)
    unit, generation = finished.manifest.unit, finished.manifest.generation
    if not sink.shard_size:
        # An attempt that died before its manifest may have left a kind of file that this one does not write: its rows
        # may be refused by now. Where units are merged, such files go after the merging.
        of_unit = {path(unit, generation, sink) for path in (data_path, rejected_path, quarantine_path)}
        for path in of_unit - {path for path, _ in finished.files}:
            remove(fs, f"{root}/{path}")
    for path, data in finished.files:
        put(fs, f"{root}/{path}", data)
    put(fs, f"{root}/{manifest_path(unit, generation)}", finished.manifest.to_bytes())
    return finished.manifest


@dataclass(slots=True)
class Committed:
    """Which units are committed, at one bit each: a million units take less than a megabyte beside their shards' names.

    Sent to the read tasks, hence `of_shard`.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedShard:
    """What is committed of one shard."""

    slug: str
    manifests: tuple[Manifest, ...]  # of the units that count, by chunk
    paths: tuple[str, ...]  # of its manifests, single and folded, that were there
    used: tuple[str, ...]  # of these, those that hold what counts

    @property
    def noise(self) -> list[str]:
        """Paths of manifests that do not count, and of copies."""
        return [path for path in self.paths if path not in self.used]

    @property
    def folds(self) -> list[str]:
        """Paths of folded manifests."""
        return [path for path in self.paths if path.startswith("_shards/")]


def committed_units(sink: SinkConfig) -> Iterator[Manifest]:
    """Every manifest that counts: see `committed_shards`.

    Raises:
        SinkError: the folder cannot be read.
    """
    for shard in committed_shards(sink):
        yield from shard.manifests


def committed_shards(
    sink: SinkConfig, *, trusted: bool = True, only: Container[str] | None = None
) -> Iterator[CommittedShard]:
    """The commits that count, each unit once, shard by shard; nothing is held but one window of shards.

    Of a unit's commits that writing/baseline.py admits, the one of the highest generation counts. Where that does not
    parse, or its files are missing or of another size than listed, the unit is not committed, and is done again. With
    `trusted=False` the files are not looked at. `only`: slugs of the shards that are read; None: all.

    Raises:
        SinkError: the folder cannot be read.
    """
    reader = Commits(sink, trusted=trusted)
    slugs = (slug for slug in reader.slugs() if only is None or slug in only)
    with ThreadPoolExecutor(LISTERS) as pool:
        while window := list(islice(slugs, 4 * LISTERS)):
            yield from pool.map(reader.shard, window)


class Commits:
    """The commits of a run's folder, opened for reading.

    Args:
        sink: where the run stands.
        trusted: whether units whose files are missing are left out.

    Raises:
        SinkError: the folder cannot be read.
    """

    def __init__(self, sink: SinkConfig, *, trusted: bool = True) -> None:
        self._fs, self._root = open_fs(sink.folder, sink.storage_options)
        self._fs.invalidate_cache()  # s3fs remembers listings
        self._merged = Merged(self._fs, self._root) if trusted else None
        self._baselines = Baselines(self._fs, self._root)
        # In this order, since folding goes from the first to the second: a shard is seen in one of them, or in both.
        self.loose = {posixpath.basename(path.rstrip("/")) for path in list_folder(self._fs, f"{self._root}/_units")}
        self._folds = self._list_folds()

    def slugs(self) -> list[str]:
        """Of the shards with commits, ascending."""
        return sorted(self.loose | self._folds.keys())

    def shard(self, slug: str) -> CommittedShard:
        """What is committed of one shard.

        Raises:
            SinkError: it cannot be read.
        """
        folds = self._folds.get(slug, [])
        for _ in range(LOOKS):
            found = self._look(slug, folds)
            if found is not None:
                return found if self._merged is None else self._whole(found, self._merged)
            self._fs.invalidate_cache()  # a driver at work folds, or removes what it has done again
            folds = self._list_folds().get(slug, [])
        raise SinkError(f"the manifests of {slug} change all the time. Run the same command again")

    def _list_folds(self) -> dict[str, list[int]]:
        """The generations of a shard's folded files, highest first, by slug."""
        folds: dict[str, list[int]] = {}
        for path in list_folder(self._fs, f"{self._root}/_shards"):
            if split := split_generation(path):
                folds.setdefault(split[0], []).append(split[1])
        return {slug: sorted(generations, reverse=True) for slug, generations in folds.items()}

    def _look(self, slug: str, folds: list[int]) -> CommittedShard | None:
        """None where something vanished while it was read."""
        may_count = self._baselines.may_count(slug)
        loose: dict[str, tuple[int, int]] = {}
        folder = f"_units/{slug}"
        for path in list_folder(self._fs, f"{self._root}/{folder}") if slug in self.loose else ():
            if (split := split_generation(path)) and split[0].isdecimal():
                loose[f"{folder}/{posixpath.basename(path)}"] = (int(split[0]), split[1])
        chosen: dict[int, tuple[int, str, Manifest | None]] = {}  # by chunk: generation, where it stands, manifest
        for fold in folds:
            path = shard_path(slug, fold)
            folded = _folded(self._fs, f"{self._root}/{path}", slug)
            if folded is None:
                return None
            for manifest in folded:
                _choose(chosen, may_count, (manifest.chunk, manifest.generation), path, manifest)
        # After the folded ones, which win where both have the same: a driver that has folded removes the single ones.
        for path, (chunk, generation) in loose.items():
            _choose(chosen, may_count, (chunk, generation), path, None)
        manifests: list[Manifest] = []
        used: set[str] = set()
        for chunk, (generation, path, one) in sorted(chosen.items()):
            if one is None:
                try:
                    data = get(self._fs, f"{self._root}/{path}")
                except NotAFileError:
                    data = b""
                if data is None:
                    return None
                one = _parsed(data, path, (slug, chunk, generation))
            if one is not None:
                manifests.append(one)
                used.add(path)
        there = [*loose, *(shard_path(slug, fold) for fold in folds)]
        return CommittedShard(
            slug=slug,
            manifests=tuple(manifests),
            paths=tuple(sorted(there)),
            used=tuple(sorted(used)),
        )

    def _whole(self, found: CommittedShard, merged: Merged) -> CommittedShard:
        """Without the units whose files are not there."""
        there = _whole(self._fs, self._root, found.slug, found.manifests, merged)
        if len(there) < len(found.manifests) and merged.changed:  # merged, and so removed, while they were looked for
            merged.reload()
            there = _whole(self._fs, self._root, found.slug, found.manifests, merged)
        for manifest in found.manifests:
            if manifest.unit not in there:
                log.warning("a file of unit %s is missing or not of the listed size: it is done again", manifest.unit)
        return replace(found, manifests=tuple(one for one in found.manifests if one.unit in there))


def _choose(
    chosen: dict[int, tuple[int, str, Manifest | None]],
    may_count: Callable[[int, int], bool],
    commit: tuple[int, int],
    path: str,
    manifest: Manifest | None,
) -> None:
    chunk, generation = commit
    if may_count(chunk, generation) and (chunk not in chosen or chosen[chunk][0] < generation):
        chosen[chunk] = (generation, path, manifest)


def _parsed(data: bytes, path: str, named: tuple[str, int, int]) -> Manifest | None:
    """A manifest; None for what is none, or is not of the unit and generation (slug, chunk, generation) of its name."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        log.warning("%s is no manifest, its unit is done again: %s", path, first_problem(error))
        return None
    slug, chunk, generation = named
    if (manifest.unit, manifest.chunk, manifest.generation) != (f"{slug}-{chunk:05d}", chunk, generation):
        log.warning("%s is the manifest of another unit, its own is done again", path)
        return None
    return manifest


class _FoldedUnits(BaseModel):
    """The manifests of a shard, each of which may be damaged on its own."""

    units: list[Any]


def _folded(fs: AbstractFileSystem, path: str, slug: str) -> list[Manifest] | None:
    """Manifests of a folded file; None where there is no such file."""
    try:
        data = get(fs, path)
        if data is None:
            return None
        folded = _FoldedUnits.model_validate_json(data)
    except (NotAFileError, ValidationError) as error:
        log.warning("%s is damaged, its shard is done again: %s", public_url(path), first_problem(error))
        return []
    manifests = []
    for item in folded.units:
        try:
            manifest = Manifest.model_validate(item)
        except ValidationError as error:
            log.warning("%s holds what is no manifest: %s", public_url(path), first_problem(error))
            continue
        if manifest.unit == f"{slug}-{manifest.chunk:05d}":
            manifests.append(manifest)
        else:
            log.warning("%s holds a manifest of unit %s, of another shard", public_url(path), manifest.unit)
    return manifests


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
