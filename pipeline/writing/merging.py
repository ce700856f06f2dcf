"""A finished run's units are merged into files of about `sink.shard_size` bytes, named as dataset hubs expect them.

    _parts/data/SLUG/CHUNK-GENERATION.parquet ...   ->   data/train-00000-of-00012-1a2b3c4d.parquet ...
                                                         the same for rejected/, quarantine/

What goes where derives from the units and their sizes alone, in the order of their names: any run over the same input
cuts the same files, whoever writes them. A name ends in eight digits of what the file holds, so that nobody overwrites
it with anything else. The files come first, each with its contents (writing/merged.py), then the index in one piece,
then what they replace is removed. So a kill leaves the old state or the new one, and the same command goes on: files
that are written already are kept.

The first merging decides where files begin. Later ones, after `--retry-failed` or `verify --repair`, write only those
anew whose units have changed.

Where another driver may still remove a file of that name (writing/indexing.py), the name takes more digits.

Memory: one unit's file, and one row group. Disk: an object store gets each file from a temporary one of this machine.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipeline.common import stopping
from pipeline.common.showing import public_url
from pipeline.errors import SinkError
from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.commit import committed_units
from pipeline.writing.files import Made, get, list_folder, put, put_made, read_part, size_of
from pipeline.writing.indexing import SPLIT, left_by_merging, remove_empty, replace_index
from pipeline.writing.lock import Claim
from pipeline.writing.manifest import KINDS, PARTS, SUFFIXES, FileRecord, Manifest
from pipeline.writing.merged import (
    OUTPUT,
    Contents,
    Index,
    Merged,
    MergedUnit,
    Slot,
    Span,
    contents_path,
    order,
    read_contents,
)
from pipeline.writing.parquet import parquet_writer, regroup
from pipeline.writing.quarantine import SHARED as SHARED_IN_QUARANTINE
from pipeline.writing.rows import shared_columns, with_features
from pipeline.writing.spans import END_OF_TAR, end_of_members, table_of, tar_of

TAR_RECORD = 10240  # bytes; tars are padded to whole records
BATCH_ROWS = 16  # rows of a unit's file that are read at a time

UnitFile = tuple[str, FileRecord]
"""A unit and its file of one kind."""


@dataclass(frozen=True, slots=True)
class Job:
    """One merged file that is to be written."""

    stem: str  # of its path, relative to the run's folder; what it holds completes it
    suffix: str
    avoid: frozenset[str]  # paths that it must not have
    sources: tuple[tuple[FileRecord, Span], ...]  # each unit's file as listed, and where its rows stand now


Build = Callable[[SinkConfig, Iterable[Job]], Iterator[Contents]]
"""Writes files, and returns what they hold in the order of the jobs."""


def merge_here(sink: SinkConfig, jobs: Iterable[Job]) -> Iterator[Contents]:
    """Write files one after the other, in this process."""
    for job in jobs:
        stopping.check()
        yield build(sink, job)


def merge_units(sink: SinkConfig, write: Build, claim: Claim) -> bool:
    """Merge the files of a run all of whose units are committed; whether anything was written.

    Only for the one driver of a folder.

    Args:
        sink: where the run stands.
        write: writes merged files, here or elsewhere.
        claim: the driver's.

    Raises:
        RunAborted: another driver has taken the folder over.
        SinkError: the folder cannot be listed, read or written; what is merged already stays.
    """
    if not sink.shard_size:
        return False
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()
    merged = Merged(fs, root)
    firsts = _firsts(committed_units(sink), merged, sink.shard_size)
    left = left_by_merging(fs, root)
    slots: dict[str, dict[int, Slot]] = {kind: {} for kind in KINDS}
    asked: list[tuple[str, int, str]] = []  # (kind, number, first unit) of the files that are written

    def jobs() -> Iterator[Job]:
        for kind, number, units in _groups(committed_units(sink), firsts):
            planned = _PlannedFile(fs, root, sink, merged, left, kind, number, len(firsts[kind]))
            if (there := planned.kept(units)) is not None:
                slots[kind][number] = there
            else:
                asked.append((kind, number, units[0][0]))
                yield planned.job(units)

    written = 0
    for contents in write(sink, jobs()):
        kind, number, first = asked[written]
        path = contents.file.path
        slots[kind][number] = Slot(first=first, file=contents.file, contents=contents_path(path))
        written += 1
    index = Index(
        generation=claim.generation,
        slots={kind: tuple(slot for _, slot in sorted(slots[kind].items())) for kind in KINDS},
    )
    replace_index(sink, merged, index, claim, _unit_files(fs, root))
    for kind in KINDS:
        remove_empty(fs, f"{root}/{PARTS}/{kind}")
    remove_empty(fs, f"{root}/{PARTS}")
    return bool(written)


def _firsts(manifests: Iterable[Manifest], merged: Merged, shard_size: int) -> dict[str, list[str]]:
    """The first unit of every file, by kind: as merged before, unless a file would be left without units."""
    fresh: dict[str, list[str]] = {kind: [] for kind in KINDS}
    before = {kind: merged.slots(kind) for kind in KINDS}
    filled: dict[str, set[str]] = {kind: set() for kind in KINDS}
    sizes = Counter[str]()
    for manifest in manifests:
        for kind, file in manifest.by_kind.items():
            if not fresh[kind] or sizes[kind] + file.size > shard_size:
                fresh[kind].append(manifest.unit)
                sizes[kind] = 0
            sizes[kind] += file.size
            if slot := merged.slot_of(kind, manifest.unit):
                filled[kind].add(slot.first)
    return {
        kind: [slot.first for slot in before[kind]]
        if before[kind] and len(filled[kind]) == len(before[kind])
        else fresh[kind]
        for kind in KINDS
    }


def _groups(manifests: Iterable[Manifest], firsts: dict[str, list[str]]) -> Iterator[tuple[str, int, list[UnitFile]]]:
    """(kind, number, units) of every file, of each kind in order."""
    units: dict[str, list[UnitFile]] = {kind: [] for kind in KINDS}
    numbers = dict.fromkeys(KINDS, 0)
    starts = {kind: [order(first) for first in firsts[kind][1:]] for kind in KINDS}
    for manifest in manifests:
        for kind, file in manifest.by_kind.items():
            at = numbers[kind]
            if at < len(starts[kind]) and order(manifest.unit) >= starts[kind][at]:
                yield kind, at, units[kind]
                units[kind] = []
                numbers[kind] += 1
            units[kind].append((manifest.unit, file))
    for kind in KINDS:
        if units[kind]:
            yield kind, numbers[kind], units[kind]


@dataclass(frozen=True, slots=True)
class _PlannedFile:
    """One merged file as planned."""

    fs: AbstractFileSystem
    root: str
    sink: SinkConfig
    merged: Merged
    left: Sequence[str]  # files of ours that are there, whether or not the index names them
    kind: str
    number: int
    total: int

    def kept(self, units: Sequence[UnitFile]) -> Slot | None:
        """The slot of a file that is there already and holds these units."""
        slots = self.merged.slots(self.kind)
        if self.number < len(slots) and len(slots) == self.total:
            slot = slots[self.number]
            contents = self.merged.contents(slot) if self.merged.counts(slot) else None
            if contents is not None and _holds(contents, units):
                return slot
        for path in self.left:  # written by a merging that was killed before its index
            if not path.startswith(f"{OUTPUT}/{self.stem}-"):
                continue
            contents = read_contents(self.fs, self.root, path)
            if contents is None or contents_path(contents.file.path) != path or not _holds(contents, units):
                continue
            if contents.file.path in self.avoid or path in self.avoid:
                continue
            if size_of(self.fs, f"{self.root}/{contents.file.path}") == contents.file.size:
                return Slot(first=units[0][0], file=contents.file, contents=path)
        return None

    def job(self, units: Sequence[UnitFile]) -> Job:
        """What is to be written."""
        sources = [(file, self.merged.find(file, unit) or Span(file.path, unit, file.rows)) for unit, file in units]
        return Job(self.stem, SUFFIXES[self.sink.format], self.avoid, tuple(sources))

    @property
    def stem(self) -> str:
        """What the file's path begins with."""
        return f"{self.kind}/{SPLIT}-{self.number:05d}-of-{self.total:05d}"

    @property
    def avoid(self) -> frozenset[str]:
        """Paths of the stem that a driver may be about to remove."""
        dying = self.merged.index.dying if self.merged.index else ()
        return frozenset(path for path in dying if self.stem in path)


def _holds(contents: Contents, units: Sequence[UnitFile]) -> bool:
    return [(one.unit, one.sha256) for one in contents.units] == [(unit, file.sha256) for unit, file in units]


def build(sink: SinkConfig, job: Job) -> Contents:
    """Write one merged file, and then its contents. Doing it again leaves the same bytes.

    Raises:
        SinkError: a unit's rows cannot be read, or the file cannot be written.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()
    merge = _merge_tars if job.suffix == "tar" else partial(_merge_parquet, shared=_shared(sink, job))
    name = partial(_name, job)
    made = put_made(fs, f"{root}/{job.stem}", lambda file: merge(fs, root, job, file), name)
    path = f"{posixpath.dirname(job.stem)}/{name(made)}"
    file = FileRecord(path=path, size=made.size, sha256=made.sha256, rows=sum(unit.rows for unit in made.by))
    contents = Contents(file=file, units=tuple(made.by))
    put(fs, f"{root}/{contents_path(path)}", (contents.model_dump_json(indent=1) + "\n").encode())
    return contents


def _name(job: Job, made: Made[list[MergedUnit]]) -> str:
    """Name of a merged file and of its contents: differs with the bytes, and with the units that equal bytes are of."""
    text = "\n".join([made.sha256, *(f"{unit.unit} {unit.sha256}" for unit in made.by)])
    digest = hashlib.sha256(text.encode()).hexdigest()
    for digits in range(8, len(digest) + 1, 8):
        path = f"{job.stem}-{digest[:digits]}.{job.suffix}"
        if not {path, contents_path(path)} & job.avoid:
            return posixpath.basename(path)
    raise SinkError(f"{job.stem} was written and removed too often. Set another sink.folder")


def _shared(sink: SinkConfig, job: Job) -> Sequence[str]:
    return SHARED_IN_QUARANTINE if job.stem.startswith("quarantine/") else shared_columns(sink)


def _merge_tars(fs: AbstractFileSystem, root: str, job: Job, out: BinaryIO) -> list[MergedUnit]:
    units: list[MergedUnit] = []
    row = at = 0
    for file, span in job.sources:
        tar = tar_of(fs, root, span)
        if span.path == file.path:
            _check(file, tar)
        end = end_of_members(tar)
        out.write(memoryview(tar)[:end])
        units.append(MergedUnit(unit=span.unit, sha256=file.sha256, rows=span.rows, start=row, begin=at, end=at + end))
        row, at = row + span.rows, at + end
    out.write(END_OF_TAR)
    out.write(bytes(-(at + len(END_OF_TAR)) % TAR_RECORD))
    return units


def _merge_parquet(
    fs: AbstractFileSystem, root: str, job: Job, out: BinaryIO, shared: Sequence[str]
) -> list[MergedUnit]:
    paths = dict.fromkeys(span.path for _, span in job.sources)
    schema = unified([read_part(fs, f"{root}/{path}", pq.read_schema) for path in paths])
    units: list[MergedUnit] = []
    row = 0
    for file, span in job.sources:
        units.append(MergedUnit(unit=span.unit, sha256=file.sha256, rows=span.rows, start=row))
        row += span.rows
    batches = (
        _with_all_columns(batch, schema) for file, span in job.sources for batch in _batches(fs, root, file, span)
    )
    written = 0
    with parquet_writer(out, schema, shared) as writer:
        for table in regroup(batches, schema):
            writer.write_table(table)
            written += table.num_rows
            del table
            pa.default_memory_pool().release_unused()
    if written != row:
        raise SinkError(f"{job.stem} got {written} rows, its units list {row}. Run: shardedit verify --repair")
    return units


def unified(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """One schema for all: files of the source may have classes of their own, as columns beside those that all have."""
    first = schemas[0]
    if all(schema.equals(first, check_metadata=True) for schema in schemas):
        return first
    types: dict[str, pa.DataType] = {}
    features: dict[str, Any] = {}
    for schema in schemas:
        types |= {field.name: field.type for field in schema}
        for name, feature in json.loads(schema.metadata[b"huggingface"])["info"]["features"].items():
            # Numbers of classes that are not the same in all files are no more than numbers.
            number = {"dtype": "int64", "_type": "Value"}
            features[name] = feature if features.get(name, feature) == feature else number
    return with_features(list(types.items()), features)


def _with_all_columns(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    if batch.schema.names == schema.names:
        return batch.replace_schema_metadata(schema.metadata)
    columns = [
        batch.column(field.name) if field.name in batch.schema.names else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _batches(fs: AbstractFileSystem, root: str, file: FileRecord, span: Span) -> Iterator[pa.RecordBatch]:
    if span.path != file.path:
        yield from table_of(fs, root, span).to_batches()
        return
    data = get(fs, f"{root}/{span.path}")
    if data is None:
        raise SinkError(f"{public_url(f'{root}/{span.path}')} vanished while it was merged. Run the same command again")
    _check(file, data)
    yield from pq.ParquetFile(pa.BufferReader(data)).iter_batches(batch_size=BATCH_ROWS)


def _check(file: FileRecord, data: bytes) -> None:
    """See that a file is undamaged since its commit: in a merged file, whose hash is new, damage would be hidden."""
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise SinkError(
            f"{file.path} has other bytes than were committed. Run: shardedit verify --repair, then the same command"
        )


def _unit_files(fs: AbstractFileSystem, root: str) -> list[str]:
    """Units' own files, relative to the run's folder."""
    found = []
    for kind in KINDS:
        for folder in list_folder(fs, f"{root}/{PARTS}/{kind}"):
            slug = posixpath.basename(folder.rstrip("/"))
            paths = list_folder(fs, f"{root}/{PARTS}/{kind}/{slug}")
            found += [f"{PARTS}/{kind}/{slug}/{posixpath.basename(path)}" for path in paths]
    return found
