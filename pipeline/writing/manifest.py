"""The manifest of a unit: what was read, what was written, how it went. Its existence is the commit.

    _units/<shard slug>/<chunk>.json      or, of a finished shard, all of them in _shards/<shard slug>.json

Everything but `measured` derives from the input, the recipe and the model: two runs write the same.
"""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.records import Unit

SUFFIXES = {"parquet": "parquet", "webdataset": "tar"}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Part):
    """One written file."""

    path: str  # relative to the run's folder, "/"-separated
    size: int  # bytes
    sha256: str
    rows: int


class Counts(_Part):
    """How a unit went. `asked` counts results, one per (image, edit, method); every one is ok or failed."""

    images: int
    asked: int
    ok: int
    failed: int
    failed_by_stage: dict[str, int]
    failed_by_class: dict[str, int]


class Measured(_Part):
    """What may differ from run to run."""

    worker_seconds: float  # the worker's share of time; the sum over a worker's units is the time it was busy
    workers: int  # that were planned for the run which made the unit
    unet_rows: int  # asked for in that time; units that overlap in a worker share theirs, the sum is exact


class Manifest(_Part):
    """See the module."""

    schema_version: Literal[1] = 1
    unit: str
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

    def to_bytes(self) -> bytes:
        """JSON in one fixed spelling."""
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=True) + "\n").encode()


def manifest_path(unit: Unit | str) -> str:
    """Where a unit's manifest stands, relative to the run's folder."""
    slug, chunk = split_unit_id(unit if isinstance(unit, str) else unit.id)
    return f"_units/{slug}/{chunk}.json"


def data_path(unit_id: str, format: Literal["parquet", "webdataset"]) -> str:
    """Where a unit's results stand, relative to the run's folder."""
    return f"data/part-{unit_id}.{SUFFIXES[format]}"


def quarantine_path(unit_id: str) -> str:
    """Where what failed in a unit stands, relative to the run's folder."""
    return f"quarantine/part-{unit_id}.parquet"


def shard_path(slug: str) -> str:
    """Where the manifests of a finished shard stand once they are folded into one file (writing/folding.py)."""
    return f"_shards/{slug}.json"


def split_unit_id(unit_id: str) -> tuple[str, str]:
    """Shard slug and chunk of a unit id, e.g. ("faces-0001-3fa2b1c4", "00002")."""
    slug, _, chunk = unit_id.rpartition("-")
    return slug, chunk
