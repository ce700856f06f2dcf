"""The dataset card of an export: for `datasets` and hubs what is where, for people what the set is and how it was made.

What is not known is said to be unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import pyarrow as pa
import yaml

import pipeline
from pipeline.looking.results import RunFolder
from pipeline.pairs.marks import SOURCE_TYPE
from pipeline.pairs.plan import Plan
from pipeline.pairs.preferences import BY_GATES
from pipeline.writing.card import SIZES, cell, features_in_yaml

NAMED_EDITS = 50  # lines of the table of edits
PLURAL = {True: "pairs of a better and a worse result", False: "edit pairs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What the files are."""

    preset: str
    schema: pa.Schema | None  # of the Parquet files; None: tars alone
    data: Mapping[str, Sequence[str]]  # files of each split that `datasets` reads, relative to the folder
    sizes: Mapping[str, int]  # bytes of all files, by their path
    rows: Mapping[str, int]  # of each split that has some
    notes: Sequence[str] = ()  # what a reader of the columns must know
    score: str | None = None  # by which pairs were chosen; None: rows are single results
    is_signed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a person says of the set."""

    license: str | None = None  # an identifier, such as cc-by-4.0
    title: str | None = None
    source: str | None = None  # where the input images are from


def card(written: Written, plan: Plan, runs: Sequence[RunFolder], said: Said) -> str:
    """The text of README.md."""
    front = yaml.safe_dump(_head(written, said), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(_text(written, plan, runs, said)) + "\n"


def _head(written: Written, said: Said) -> dict[str, Any]:
    total = sum(written.rows.values())
    head: dict[str, Any] = {
        "license": said.license or "unknown",
        "task_categories": ["image-to-image"],
        "tags": ["image-editing", "synthetic", "shardedit"],
        "size_categories": [next((name for most, name in SIZES if total < most), "n>10M")],
    }
    if said.title:
        head["pretty_name"] = said.title
    head["configs"] = [
        {
            "config_name": "default",
            "data_files": [{"split": split, "path": list(paths)} for split, paths in written.data.items()],
        }
    ]
    if written.schema is not None:
        sizes = {split: sum(written.sizes[path] for path in paths) for split, paths in written.data.items()}
        head["dataset_info"] = {
            "features": features_in_yaml(written.schema),
            "splits": [
                {"name": split, "num_bytes": sizes[split], "num_examples": rows} for split, rows in written.rows.items()
            ],
            "download_size": sum(sizes.values()),
            "dataset_size": sum(sizes.values()),
        }
    return head


def _text(written: Written, plan: Plan, runs: Sequence[RunFolder], said: Said) -> Iterator[str]:
    pairs = written.score is not None
    splits = ", ".join(f"{split} {count:,}" for split, count in written.rows.items())
    yield f"# {cell(said.title) if said.title else f'Edited images, as {written.preset} has them'}"
    yield (
        f"{sum(written.rows.values()):,} {PLURAL[pairs]} ({splits}) from {plan.sources:,} source images. "
        "Every edited image was made by a diffusion model. No source image is in two splits."
    )
    yield f"Left out: {'; '.join(_left_out(plan))}."
    yield "## Licence and sources"
    yield (
        f"Licence: {cell(said.license)}, as stated by who exported the set."
        if said.license
        else "The licence of the source images and of the results is unknown to the program that wrote this card."
    )
    read = sorted({shard for run in runs for shard in run.record["recipe"]["source"]["shards"]})
    origin = f"{cell(said.source)}. " if said.source else "Where they are from is not stated. "
    yield f"Source images: {origin}They were read from {', '.join(cell(shard) for shard in read)}."
    yield "## How it was made"
    yield _table(
        ("run", "model", "revision", "weights", "methods", "recipe", "results", "rejected", "failed"), _runs(runs)
    )
    yield from _gates(plan, runs)
    if pairs:
        by = "which of them passed the gates" if written.score == BY_GATES else f"`{written.score}`"
        yield f"Better and worse results are of the same source and instruction, and were told by {by}."
    yield "## What is in it"
    if written.notes:
        yield "\n".join(f"* {note}." for note in written.notes)
    yield _table(("edit", "results"), _edits(plan))
    if plan.figures:
        yield _table(("figure", "n", "mean", "median", "least", "greatest"), _figures(plan))
    yield "## Marks"
    yield (
        f"Every edited image says so in its XMP metadata: IPTC's `DigitalSourceType` is `{SOURCE_TYPE}`, beside the "
        "model, the method and the recipe's hash. Source images and masks are as they were."
        + (" Edited images are signed (C2PA)." if written.is_signed else "")
    )
    yield (
        "## Known limits\n\nInstructions are what was asked for, not what is seen in the result. Nobody looked at "
        "every pair: `shardedit audit` of this folder says what a program finds wrong with it."
    )
    yield f"Written by shardedit {pipeline.__version__}."


def _left_out(plan: Plan) -> Iterator[str]:
    left = plan.left
    yield f"{left.duplicates:,} row(s) that were there before (source, result and instruction alike)"
    if left.rejected:
        yield f"{left.rejected:,} result(s) that gates rejected, or that were not the chosen attempt"


def _runs(runs: Sequence[RunFolder]) -> Iterator[tuple[str, ...]]:
    for at, run in enumerate(runs):
        model, recipe = run.record["model"], run.record["recipe"]
        methods = recipe["methods"] or {"": recipe}
        used = sorted({f"{one['editing']['method']} after {one['inversion']['method']}" for one in methods.values()})
        revision, digest = model.get("revision") or "none", model.get("digest") or "unknown"
        yield (
            str(at),
            cell(model.get("name", "")),
            f"`{revision}`",
            f"`{digest}`",
            ", ".join(used),
            f"`{run.record['recipe_hash']}`",
            f"{run.totals.done:,}",
            f"{sum(span.rows for span in run.spans('rejected')):,}",
            f"{run.totals.failed:,}",
        )


def _gates(plan: Plan, runs: Sequence[RunFolder]) -> Iterator[str]:
    """Gates with their bounds, as the recipe has them, and what each rejected."""
    sections = [run.record["recipe"].get("gates") for run in runs]
    if not any(sections) and not plan.reasons:
        yield "No gate was applied: every result that was made is here."
        return
    for at, gates in enumerate(sections):
        if gates:
            bounds = {name: value for name, value in gates.items() if value not in (None, {}, [])}
            yield f"Gates of run {at}: `{json.dumps(bounds, sort_keys=True)}`"
        else:
            yield f"Run {at} had no gates."
    if plan.reasons:
        yield _table(("gate", "results rejected"), ((cell(name), f"{n:,}") for name, n in sorted(plan.reasons.items())))


def _edits(plan: Plan) -> Iterator[tuple[str, ...]]:
    named = sorted(plan.edits.items(), key=lambda item: (-item[1], item[0]))
    yield from ((cell(name), f"{count:,}") for name, count in named[:NAMED_EDITS])
    if len(named) > NAMED_EDITS:
        yield f"{len(named) - NAMED_EDITS:,} more", f"{sum(count for _, count in named[NAMED_EDITS:]):,}"


def _figures(plan: Plan) -> Iterator[tuple[str, ...]]:
    for name, values in sorted(plan.figures.items()):
        numbers = (fmean(values), median(values), min(values), max(values))
        yield cell(name), f"{len(values):,}", *(f"{number:.4g}" for number in numbers)


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
