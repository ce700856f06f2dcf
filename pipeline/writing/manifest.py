"""The manifest of a unit: what was read, what was written, how it went. Its existence is the commit.

    _units/SLUG/CHUNK-GENERATION.json      or, of a finished shard, all of them in _shards/SLUG-GENERATION.json

Names carry the generation of the driver whose run wrote them (writing/lock.py): what one driver writes, no other can
overwrite. Which generation of a unit counts, writing/baseline.py says.

The files that it lists stand in _parts/ until the run is whole and they are merged (writing/merging.py), or in data/,
rejected/ and quarantine/ from the beginning where `sink.shard_size` is 0.

Everything but `measured` derives from the input, the recipe and the model: two runs write the same.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.recipe import SinkConfig
from pipeline.remote.pictures import Spent
from pipeline.writing.paths import Chunk, FilePath, Generation, NonNegative, Sha256, UnitId, is_of_unit

SUFFIXES = {"parquet": "parquet", "webdataset": "tar"}
KINDS = ("data", "rejected", "quarantine")  # of files: results, those that gates rejected, and what failed
PARTS = "_parts"  # folder of units' files until they are merged
# Name of a file that is never merged: unit and generation.
PART_NAME = re.compile(r"part-(.+-\d{5,})-(\d{8,})\.(?:parquet|tar)")


class Stored(BaseModel):
    """Base of what is written as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileRecord(Stored):
    """One written file."""

    path: FilePath
    size: NonNegative  # bytes
    sha256: Sha256
    rows: NonNegative


@dataclass(frozen=True, slots=True, kw_only=True)
class GateCounts:
    """What became of rows at one gate: they passed, were rejected, or had nothing to be judged by."""

    passed: NonNegative
    rejected: NonNegative
    alone: NonNegative  # of the rejected, those that no other gate rejected
    undefined: NonNegative
    measured: NonNegative  # rows with a number
    seen: tuple[float, ...] = ()  # of the numbers: least, lower quartile, middle, upper quartile, greatest


class Counts(Stored):
    """How a unit went. `asked` counts results, one per (image, edit, method); every one is ok, rejected or failed."""

    images: NonNegative
    asked: NonNegative
    ok: NonNegative
    failed: NonNegative
    rejected: NonNegative = 0  # of which no row passed the gates
    rejected_rows: NonNegative = 0  # in rejected/
    gates: dict[str, GateCounts] = {}
    spent: dict[str, Spent] = {}  # what servers took, by method, for results that failed, too
    failed_by_stage: dict[str, NonNegative]
    failed_by_class: dict[str, NonNegative]


class Measured(Stored):
    """What may differ from run to run."""

    # The worker's share of time; the sum over a worker's units is the time it was busy.
    worker_seconds: float = Field(ge=0)
    workers: int = Field(ge=1)  # that lived when the unit was made
    network_rows: NonNegative  # asked for in that time; units that overlap in a worker share theirs, the sum is exact
    busy_seconds: float = Field(default=0.0, ge=0)  # of `worker_seconds`, in which the model had a call to work on


NOT_MEASURED = Measured(worker_seconds=0, workers=1, network_rows=0)


class Manifest(Stored):
    """What was read, what was written and how it went, of one unit."""

    schema_version: Literal[3] = 3
    unit: UnitId
    generation: Generation  # of the driver whose run made it
    shard: str  # path relative to the source
    chunk: Chunk
    start: NonNegative  # index of the first row in the shard
    stop: NonNegative  # index after the last
    is_last: bool  # of its shard
    shard_size: NonNegative
    shard_etag: str
    recipe_hash: str
    code_version: str
    model_digest: str
    call_size: int
    files: tuple[FileRecord, ...]
    counts: Counts
    measured: Measured

    @model_validator(mode="after")
    def _is_of_its_unit(self) -> Manifest:
        slug, chunk = split_unit_id(self.unit)
        if int(chunk) != self.chunk:
            raise ValueError(f"unit {self.unit} is not chunk {self.chunk} of its shard")
        if others := [file.path for file in self.files if not is_of_unit(file.path, slug, chunk)]:
            raise ValueError(f"{others[0]} is no file of unit {self.unit}")
        if len(self.by_kind) < len(self.files):
            raise ValueError(f"unit {self.unit} has two files of a kind")
        return self

    @property
    def by_kind(self) -> dict[str, FileRecord]:
        """The files by what they hold: one or more of `KINDS`."""
        return {kind_of(file.path): file for file in self.files}

    def to_bytes(self) -> bytes:
        """JSON in one fixed spelling."""
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=True) + "\n").encode()


def manifest_path(unit_id: str, generation: int) -> str:
    """Where a unit's manifest stands, relative to the run's folder."""
    slug, chunk = split_unit_id(unit_id)
    return f"_units/{slug}/{chunk}-{generation:08d}.json"


def data_path(unit_id: str, generation: int, sink: SinkConfig) -> str:
    """Where a unit's results stand, relative to the run's folder."""
    return _file_path("data", unit_id, generation, SUFFIXES[sink.format], sink)


def rejected_path(unit_id: str, generation: int, sink: SinkConfig) -> str:
    """Where the results that gates rejected stand, relative to the run's folder."""
    return _file_path("rejected", unit_id, generation, SUFFIXES[sink.format], sink)


def quarantine_path(unit_id: str, generation: int, sink: SinkConfig) -> str:
    """Where what failed in a unit stands, relative to the run's folder."""
    return _file_path("quarantine", unit_id, generation, SUFFIXES[sink.format], sink)


def _file_path(kind: str, unit_id: str, generation: int, suffix: str, sink: SinkConfig) -> str:
    if not sink.shard_size:  # never merged: readers of data/ are to see it
        return f"{kind}/part-{unit_id}-{generation:08d}.{suffix}"
    slug, chunk = split_unit_id(unit_id)
    return f"{PARTS}/{kind}/{slug}/{chunk}-{generation:08d}.{suffix}"


def kind_of(path: str) -> str:
    """Which of `KINDS` a listed file holds."""
    return path.removeprefix(f"{PARTS}/").partition("/")[0]


def shard_path(slug: str, generation: int) -> str:
    """Where the manifests of a finished shard stand once a driver has folded them (writing/folding.py)."""
    return f"_shards/{slug}-{generation:08d}.json"


def split_generation(path: str) -> tuple[str, int] | None:
    """What stands before the generation in a file's name, and that; None for a name without one.

    E.g. ("00003", 1) of "_units/faces-0001-3fa2b1c4/00003-00000001.json".
    """
    found = re.fullmatch(r"(.+)-(\d{8,})\.json", path.rpartition("/")[2])
    return (found[1], int(found[2])) if found else None


def split_unit_id(unit_id: str) -> tuple[str, str]:
    """Shard slug and chunk of a unit id, e.g. ("faces-0001-3fa2b1c4", "00002")."""
    slug, _, chunk = unit_id.rpartition("-")
    return slug, chunk
