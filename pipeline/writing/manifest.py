"""The manifest of a unit: what was read, what was written, how it went. Its existence is the commit.

    _units/SLUG/CHUNK-GENERATION.json      or, of a finished shard, all of them in _shards/SLUG-GENERATION.json

Names carry the generation of the driver whose run wrote them (writing/lock.py): what one driver writes, no other can
overwrite. Which generation of a unit counts, writing/baseline.py says.

The files that it lists stand in _parts/ until the run is whole and they are merged (writing/merging.py), or in data/
and quarantine/ from the beginning where `sink.shard_size` is 0.

Everything but `measured` derives from the input, the recipe and the model: two runs write the same.
"""

from __future__ import annotations

import json
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.recipe import SinkConfig

SUFFIXES = {"parquet": "parquet", "webdataset": "tar"}
KINDS = ("data", "quarantine")  # of files: results, and what failed
PARTS = "_parts"  # folder of units' files until they are merged
# Of the files that are never merged: the unit, and the generation.
PART_NAME = re.compile(r"part-(.+-\d{5,})-(\d{8,})\.(?:parquet|tar)")


class Part(BaseModel):
    """Base of what is written as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Part):
    """One written file."""

    path: str  # relative to the run's folder, "/"-separated
    size: int  # bytes
    sha256: str
    rows: int


class Counts(Part):
    """How a unit went. `asked` counts results, one per (image, edit, method); every one is ok or failed."""

    images: int
    asked: int
    ok: int
    failed: int
    failed_by_stage: dict[str, int]
    failed_by_class: dict[str, int]


class Measured(Part):
    """What may differ from run to run."""

    worker_seconds: float  # the worker's share of time; the sum over a worker's units is the time it was busy
    workers: int  # that were planned for the run which made the unit
    unet_rows: int  # asked for in that time; units that overlap in a worker share theirs, the sum is exact


class Manifest(Part):
    """See the module."""

    schema_version: Literal[2] = 2
    unit: str
    generation: int  # of the driver whose run made it
    shard: str  # path relative to the source
    chunk: int
    start: int  # index of the first row in the shard
    stop: int  # index after the last
    is_last: bool  # of its shard
    shard_size: int
    shard_etag: str
    recipe_hash: str
    code_version: str
    model_digest: str
    call_size: int
    files: tuple[FileRecord, ...]
    counts: Counts
    measured: Measured

    @property
    def by_kind(self) -> dict[str, FileRecord]:
        """The files by what they hold: "data", "quarantine", or both."""
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


def quarantine_path(unit_id: str, generation: int, sink: SinkConfig) -> str:
    """Where what failed in a unit stands, relative to the run's folder."""
    return _file_path("quarantine", unit_id, generation, "parquet", sink)


def _file_path(kind: str, unit_id: str, generation: int, suffix: str, sink: SinkConfig) -> str:
    if not sink.shard_size:  # never merged: readers of data/ are to see it
        return f"{kind}/part-{unit_id}-{generation:08d}.{suffix}"
    slug, chunk = split_unit_id(unit_id)
    return f"{PARTS}/{kind}/{slug}/{chunk}-{generation:08d}.{suffix}"


def kind_of(path: str) -> str:
    """Whether a listed file holds "data" or "quarantine"."""
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
