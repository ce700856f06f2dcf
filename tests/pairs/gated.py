"""Runs as gates and several attempts leave them: rows of a run, with the columns that those add."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.writing.manifest import Manifest

Change = Callable[[int, dict[str, Any]], dict[str, Any]]


def rewritten(run: Path, out: Path, change: Change, extra: dict[str, pa.DataType]) -> Path:
    """A copy of a run whose results are changed.

    Args:
        run: with files that are not merged (`sink.shard_size: 0`).
        out: where the copy goes.
        change: makes of a row's number and the row another one.
        extra: columns that it adds.
    """
    shutil.copytree(run, out)
    number = 0
    for path in sorted(out.glob("_units/*/*.json")):
        manifest = Manifest.model_validate_json(path.read_bytes())
        files = []
        for record in manifest.files:
            if record.path.startswith("data/"):
                file = out / record.path
                number = with_rows_changed(file, number, change, extra)
                content = file.read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                record = record.model_copy(update={"size": len(content), "sha256": digest})
            files.append(record)
        path.write_bytes(manifest.model_copy(update={"files": tuple(files)}).to_bytes())
    return out


def with_rows_changed(file: Path, number: int, change: Change, extra: dict[str, pa.DataType]) -> int:
    """Change a file's rows, the first of which has this number; returns that after its last."""
    table = pq.read_table(file)
    schema = pa.schema([*table.schema, *extra.items()], metadata=table.schema.metadata)
    rows = [change(number + at, row) for at, row in enumerate(table.to_pylist())]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return number + len(rows)
