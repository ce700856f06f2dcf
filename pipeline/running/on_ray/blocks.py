"""Units as rows of Arrow tables: what Ray Data carries. One row is one unit, its images still encoded.

Plain columns and JSON, no pickle: what comes from a dataset stays data on its way through a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.reading.rows_as_json import pack_row, unpack_row
from pipeline.samples import Unit, UnitInput, Unreadable
from pipeline.writing.commit import FinishedUnit
from pipeline.writing.manifest import Manifest

# 64-bit offsets: a unit may hold more than the 2 GiB that `binary` can address.
READ = pa.schema([("unit", pa.string()), ("rows", pa.large_string()), ("blobs", pa.large_list(pa.large_binary()))])
FINISHED = pa.schema(
    [("manifest", pa.large_string()), ("paths", pa.list_(pa.string())), ("files", pa.large_list(pa.large_binary()))]
)


def pack_input(unit_input: UnitInput) -> pa.Table:
    """A unit as read: one row of `READ`."""
    blobs: list[bytes] = []
    labels: list[Mapping[str, Any]] = []  # the same for all rows of a file, and long
    rows = []
    for row in unit_input.rows:
        sample = row.sample if isinstance(row, Unreadable) else row
        if sample.labels not in labels:
            labels.append(sample.labels)
        rows.append({**pack_row(row, blobs), "labels": labels.index(sample.labels)})
    unit = {name: getattr(unit_input.unit, name) for name in ("id", "shard", "chunk", "start", "stop", "is_last")}
    head = {"unit": unit, "shard_size": unit_input.shard_size, "shard_etag": unit_input.shard_etag}
    head["labels"] = labels
    # ASCII, so that lone surrogates in names and captions survive the way through UTF-8.
    return pa.Table.from_pylist([{"unit": json.dumps(head), "rows": json.dumps(rows), "blobs": blobs}], schema=READ)


def unpack_input(table: pa.Table) -> UnitInput:
    """Inverse of `pack_input`."""
    (row,) = table.to_pylist()
    head = json.loads(row["unit"])
    labels = [{name: tuple(classes) for name, classes in one.items()} for one in head["labels"]]
    return UnitInput(
        unit=Unit(**head["unit"]),
        shard_size=head["shard_size"],
        shard_etag=head["shard_etag"],
        rows=tuple(unpack_row(item, row["blobs"], labels[item["labels"]]) for item in json.loads(row["rows"])),
    )


def pack_finished(finished: FinishedUnit) -> pa.Table:
    """A unit ready to be committed: one row of `FINISHED`."""
    row = {
        "manifest": finished.manifest.model_dump_json(),
        "paths": [path for path, _ in finished.files],
        "files": [data for _, data in finished.files],
    }
    return pa.Table.from_pylist([row], schema=FINISHED)


def unpack_finished(table: pa.Table) -> list[FinishedUnit]:
    """Inverse of `pack_finished`, for any number of rows."""
    return [
        FinishedUnit(
            Manifest.model_validate_json(row["manifest"]),
            tuple(zip(row["paths"], row["files"], strict=True)),
        )
        for row in table.to_pylist()
    ]
