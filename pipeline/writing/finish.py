"""Outcomes of a unit become its files and its manifest.

Rows are sorted by (index, edit, method) whatever order they finished in, so that a unit's bytes are the same alone,
beside other units, and after a restart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pipeline
from pipeline.recipe import Recipe
from pipeline.records import Rejected
from pipeline.remote.pictures import Spent
from pipeline.samples import ReadRow, UnitInput, Unreadable
from pipeline.writing.commit import FinishedUnit, file_record
from pipeline.writing.gate_counts import gate_counts
from pipeline.writing.manifest import NOT_MEASURED, Counts, Manifest, data_path, quarantine_path, rejected_path
from pipeline.writing.parquet import render_parquet
from pipeline.writing.quarantine import render_quarantine
from pipeline.writing.rows import ATTEMPT, Labels, OutputRow, as_written, is_kept, schema_of, shared_columns
from pipeline.writing.webdataset import render_tar


def finish_unit(
    unit_input: UnitInput,
    encoded: Sequence[OutputRow | Rejected],
    recipe: Recipe,
    *,
    generation: int,
    model_digest: str,
    call_size: int,
    spent: Mapping[str, Spent] = MappingProxyType({}),
) -> FinishedUnit:
    """Render a unit. A unit in which nothing passed, was rejected by gates, or failed, has no file of that kind.

    Args:
        unit_input: what was read.
        encoded: one row or rejection per (image, edit, method) asked for, or one row per attempt at it, in any order.
        recipe: decides formats.
        generation: of the driver.
        model_digest: of the model that made the results.
        call_size: rows of a network call.
        spent: what servers took for all of it, by method.
    """
    unit = unit_input.unit
    made = sorted((one for one in encoded if not isinstance(one, Rejected)), key=_order_of_row)
    failed = sorted((one for one in encoded if isinstance(one, Rejected)), key=_order_of_rejected)
    _check_once_each(unit_input, made, failed)
    rows, rejected = [row for row in made if is_kept(row)], [row for row in made if not is_kept(row)]
    files: list[tuple[str, bytes, int]] = []
    for some, path_of in ((rows, data_path), (rejected, rejected_path)):
        if some:
            path = path_of(unit.id, generation, recipe.sink)
            files.append((path, _render(some, recipe, labels_of(unit_input.rows)), len(some)))
    if failed:
        path = quarantine_path(unit.id, generation, recipe.sink)
        files.append((path, render_quarantine(failed, unit.id, recipe.sink), len(failed)))
    counts = Counts(
        images=len(unit_input.rows),
        asked=len({_result(row) for row in made}) + len(failed),
        ok=len(rows),
        failed=len(failed),
        rejected=len({_result(row) for row in rejected} - {_result(row) for row in rows}),
        rejected_rows=len(rejected),
        gates=gate_counts(made, recipe.gates),
        spent=dict(spent),
        failed_by_stage=dict(sorted(Counter(one.stage for one in failed).items())),
        failed_by_class=dict(sorted(Counter(one.error_class for one in failed).items())),
    )
    manifest = Manifest(
        unit=unit.id,
        generation=generation,
        shard=unit.shard,
        chunk=unit.chunk,
        start=unit.start,
        stop=unit.stop,
        is_last=unit.is_last,
        shard_size=unit_input.shard_size,
        shard_etag=unit_input.shard_etag,
        recipe_hash=recipe.hash,
        code_version=pipeline.__version__,
        model_digest=model_digest,
        call_size=call_size,
        files=tuple(file_record(path, data, count) for path, data, count in files),
        counts=counts,
        measured=NOT_MEASURED,
    )
    return FinishedUnit(manifest, tuple((path, data) for path, data, _ in files))


def _render(rows: Sequence[OutputRow], recipe: Recipe, labels: Labels) -> bytes:
    sink = recipe.sink
    if sink.format == "webdataset":
        return render_tar(rows, sink)
    written = [as_written(row, sink, labels) for row in rows]
    return render_parquet(
        written,
        schema_of(recipe, labels),
        shared_columns(sink),
    )


def labels_of(rows: Sequence[ReadRow]) -> Labels:
    """Columns of classes that any row of a unit has; its rows are of one file, so that they have the same."""
    samples = (row.sample if isinstance(row, Unreadable) else row for row in rows)
    return next((sample.labels for sample in samples if sample.labels), {})


def _result(row: OutputRow) -> tuple[int, str, str]:
    return row["index"], row["edit"], row["method"]


def _order_of_row(row: OutputRow) -> tuple[int, str, str, int]:
    # By name, not in the order of the recipe: one that lists them in another order is the same recipe.
    return *_result(row), row.get(ATTEMPT, 0)


def _order_of_rejected(rejected: Rejected) -> tuple[int, str, str]:
    return rejected.sample.index, rejected.edit, rejected.method


def _check_once_each(unit_input: UnitInput, rows: Sequence[OutputRow], failed: Sequence[Rejected]) -> None:
    """See that every result asked for is in data, rejected or quarantine, once; else the fault is ours."""
    results = [_order_of_row(row) for row in rows]
    results += [(*_order_of_rejected(one), 0) for one in failed]
    twice = [result for result, count in Counter(results).items() if count > 1]
    assert not twice, f"unit {unit_input.unit.id} has results twice: {twice[:3]}"
    read = {row.sample.index if isinstance(row, Unreadable) else row.index for row in unit_input.rows}
    assert read == {index for index, *_ in results}, f"unit {unit_input.unit.id} lost rows or made some up"
