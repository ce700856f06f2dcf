"""Rows that failed, with stage, reason and their bytes as read: one file per unit that has any, in the sink's format.

    KEY.input.bin  KEY.json          a sample of a tar: the bytes, and every other column

The bytes have no picture's name: most of what stands here is no image, and whoever opens it should not try.
Two runs over the same data write the same file: a reason holds no address, time or host.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.recipe import SinkConfig
from pipeline.records import Rejected
from pipeline.writing.parquet import render_parquet
from pipeline.writing.rows import MAX_MESSAGE, json_text, stem_of, utf8_text, with_features
from pipeline.writing.webdataset import json_member, render_samples

_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("id", pa.string()),
    ("shard", pa.string()),
    ("key", pa.string()),
    ("index", pa.int64()),
    ("edit", pa.string()),
    ("method", pa.string()),
    ("unit", pa.string()),
    ("stage", pa.string()),
    ("error_class", pa.string()),
    ("message", pa.string()),
    ("attempt", pa.int64()),
    ("image", pa.binary()),
    ("columns", pa.string()),
]
SCHEMA = with_features(_COLUMNS, {name: {"dtype": str(kind), "_type": "Value"} for name, kind in _COLUMNS})
"""Bytes stay bytes: most of what stands here is no image."""

SHARED = ("image",)  # columns whose values repeat from row to row: an image has several results


def render_quarantine(rejected: Sequence[Rejected], unit: str, sink: SinkConfig) -> bytes:
    """Write what failed in a unit, in the order given."""
    if sink.format == "webdataset":
        return render_samples([_sample(one, unit) for one in rejected])
    return render_parquet([quarantine_row(one, unit) for one in rejected], SCHEMA, shared=SHARED)


def _sample(rejected: Rejected, unit: str) -> dict[str, Any]:
    row = quarantine_row(rejected, unit)
    image, columns = row.pop("image"), json.loads(row["columns"])
    stem = stem_of(rejected.sample, rejected.edit, rejected.method)
    return {"__key__": stem, "input.bin": image, "json": json_member(row | {"columns": columns})}


def quarantine_row(rejected: Rejected, unit: str) -> dict[str, Any]:
    """One row of `SCHEMA`."""
    sample = rejected.sample
    return {
        "id": utf8_text(sample.id),
        "shard": utf8_text(sample.shard),
        "key": utf8_text(sample.key),
        "index": sample.index,
        "edit": rejected.edit,
        "method": rejected.method,
        "unit": unit,
        "stage": rejected.stage,
        "error_class": rejected.error_class,
        "message": utf8_text(rejected.message)[:MAX_MESSAGE],
        "attempt": rejected.attempt,
        "image": sample.image,
        "columns": json_text(dict(sample.columns)),
    }
