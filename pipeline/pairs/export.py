"""`shardedit export RUN ...`: results of finished runs in the columns that a trainer reads, split by source image.

Two readings: the first takes the digests of every row, which decide duplicates, splits and files; the second writes.
Memory is bounded by a row group. A file is there as a whole or not at all and its bytes follow from the runs and the
settings alone, so a second command after a kill writes the files that are missing, and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa
import yaml
from webdataset import TarWriter

import pipeline
from pipeline.common.showing import public_url
from pipeline.errors import RecipeError, SinkError
from pipeline.looking.results import RunFolder
from pipeline.pairs.presets import NEEDED, PRESETS, Preset, PresetName, Row, name_of
from pipeline.reading.storage import open_fs
from pipeline.writing.card import SIZES, features_in_yaml
from pipeline.writing.files import get, list_folder, put, put_made
from pipeline.writing.merged import Span
from pipeline.writing.parquet import parquet_writer, regroup
from pipeline.writing.spans import table_of

RECORD = "export.json"
SHOWN = 5  # rows that an error names
READ_AT_ONCE = 32  # rows of a span


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """What to write, and how."""

    runs: tuple[str, ...]
    out: str
    preset: PresetName
    validation: float = 0.02  # share of the source images
    shard_bytes: int = 500_000_000
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Place:
    """A row of a run that goes into a split."""

    run: int
    span: Span
    row: int  # of the span
    size: int  # bytes of its pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written."""

    splits: dict[str, int]  # rows
    duplicates: int  # left out
    files: tuple[str, ...]
    written: int  # of these, by this command


def export(config: ExportConfig, say: Callable[[str], None] = lambda _: None) -> Export:
    """Write the results of runs as a set for a trainer.

    Raises:
        RecipeError: the preset's columns cannot be filled, or a split would be empty.
        SinkError: a run is not done or cannot be read, or the folder holds something else.
    """
    preset = PRESETS[config.preset]
    runs = [RunFolder(url) for url in config.runs]
    for run in runs:
        _refuse_unfit(run)
    fs, root = open_fs(config.out, config.storage_options)
    splits, duplicates = _plan(runs, config, preset)
    files = _files(splits, config, preset)
    _claim(fs, root, config, runs)
    there = {path.rpartition("/")[2] for path in list_folder(fs, f"{root}/data")}
    sizes: dict[str, int] = {}
    written = 0
    for name, places in files.items():
        if name not in there:
            make = partial(_tar if preset.suffix == "tar" else _parquet, preset, runs, places)
            put_made(fs, f"{root}/data/{name}", make, lambda _, name=name: name)  # type: ignore[misc]
            written += 1
            say(f"data/{name}: {len(places):,} rows")
        sizes[name] = int(fs.info(f"{root}/data/{name}")["size"])
    rows = {split: len(places) for split, places in splits.items() if places}
    put(fs, f"{root}/README.md", _card(config, preset, runs, rows, duplicates, sizes).encode("utf-8", "replace"))
    return Export(splits=rows, duplicates=duplicates, files=tuple(files), written=written)


def _refuse_unfit(run: RunFolder) -> None:
    where = public_url(run.sink.folder)
    sink = run.record["recipe"]["sink"]
    if not (run.summary or {}).get("complete"):
        raise SinkError(f"{where} is not done: a part would be exported for the whole. Run its `shardedit edit` again")
    if sink["format"] != "parquet":
        raise RecipeError(where, [("sink.format", "is webdataset: runs in Parquet are exported")])
    if not (sink["include_input"] or sink["columns"] == "instructpix2pix"):
        raise RecipeError(
            where,
            [("sink.include_input", "is false: the inputs are not in the run. Edit with sink.include_input=true")],
        )


def _rows(run: RunFolder, span: Span) -> Iterator[dict[str, Any]]:
    """Results of a unit under our own names, some at a time."""
    wanted = {name: run.column_names.get(name, name) for name in NEEDED}
    for start in range(0, span.rows, READ_AT_ONCE):
        count = min(READ_AT_ONCE, span.rows - start)
        part = Span(span.path, span.unit, count, span.start + start, size=span.size)
        for found in table_of(run.fs, run.root, part, list(wanted.values())).to_pylist():
            yield {name: found[column] for name, column in wanted.items()}


def _plan(runs: Sequence[RunFolder], config: ExportConfig, preset: Preset) -> tuple[dict[str, list[Place]], int]:
    """Rows of each split, in the runs' order, and how many were there before."""
    splits: dict[str, list[Place]] = {name: [] for name in preset.splits}
    seen: set[bytes] = set()
    empty: dict[str, list[str]] = {}
    duplicates = 0
    for number, run in enumerate(runs):
        for span in run.spans("data"):
            for at, row in enumerate(_rows(run, span)):
                for text in preset.texts:
                    if not (row[text] or "").strip():
                        empty.setdefault(text, []).append(name_of(row))
                source, edited = row["input"]["bytes"], row["image"]["bytes"]
                digest = hashlib.sha256(source).digest()
                pair = hashlib.sha256(digest + hashlib.sha256(edited).digest() + row["instruction"].encode()).digest()
                if pair in seen:
                    duplicates += 1
                    continue
                seen.add(pair)
                split = preset.splits[is_held_out(digest, config.validation)]
                splits[split].append(Place(number, span, at, len(source) + len(edited)))
    problems = [
        (text, f"is empty in {len(names):,} row(s): {', '.join(names[:SHOWN])}. Give edits an instruction or prompts")
        for text, names in empty.items()
    ]
    if not problems and not splits[preset.splits[0]]:
        problems = [("validation", f"{config.validation:g} leaves no row to train on. Lower it")]
    if problems:
        raise RecipeError(f"preset {config.preset}", problems)
    return splits, duplicates


def is_held_out(source: bytes, share: float) -> bool:
    """Whether a source image is in the second split, by the SHA-256 of its bytes: all its edits are on one side."""
    return int.from_bytes(source[:8]) < share * 2**64


def _files(splits: dict[str, list[Place]], config: ExportConfig, preset: Preset) -> dict[str, list[Place]]:
    """Names as hubs have them, and what goes into each."""
    files: dict[str, list[Place]] = {}
    for split, places in splits.items():
        parts: list[list[Place]] = []
        held = 0
        for place in places:
            if not parts or held >= config.shard_bytes:
                parts.append([])
                held = 0
            parts[-1].append(place)
            held += place.size
        for at, part in enumerate(parts):
            files[f"{split}-{at:05d}-of-{len(parts):05d}.{preset.suffix}"] = part
    return files


def _claim(fs: Any, root: str, config: ExportConfig, runs: Sequence[RunFolder]) -> None:
    """Say what the folder is for, before anything is in it."""
    about = {
        "preset": config.preset,
        "validation": config.validation,
        "shard_bytes": config.shard_bytes,
        "version": pipeline.__version__,
        "runs": [
            {"recipe_hash": run.record["recipe_hash"], "model": run.record["model"], "rows": run.totals.done}
            for run in runs
        ],
    }
    data = json.dumps(about, indent=1, sort_keys=True).encode()
    before = get(fs, f"{root}/{RECORD}")
    if before is not None and before != data:
        raise SinkError(f"{public_url(config.out)} holds another export: of other runs or settings. Give another --out")
    if before is None and list_folder(fs, f"{root}/data"):
        raise SinkError(f"{public_url(config.out)} holds data that no export wrote. Give another --out")
    if before is None:
        put(fs, f"{root}/{RECORD}", data)


def _made(preset: Preset, runs: Sequence[RunFolder], places: Sequence[Place]) -> Iterator[dict[str, Any]]:
    """Rows of a file; each unit is read once."""
    at = 0
    while at < len(places):
        first = places[at]
        wanted = set()
        while at < len(places) and (places[at].run, places[at].span) == (first.run, first.span):
            wanted.add(places[at].row)
            at += 1
        rows: Iterator[Row] = _rows(runs[first.run], first.span)
        yield from (preset.made(row) for number, row in enumerate(rows) if number in wanted)


def _parquet(preset: Preset, runs: Sequence[RunFolder], places: Sequence[Place], file: BinaryIO) -> None:
    schema = preset.schema
    batches = (pa.RecordBatch.from_pylist([row], schema=schema) for row in _made(preset, runs, places))
    with parquet_writer(file, schema) as writer:
        for table in regroup(batches, schema):
            writer.write_table(table)


def _tar(preset: Preset, runs: Sequence[RunFolder], places: Sequence[Place], file: BinaryIO) -> None:
    with TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as writer:
        for sample in _made(preset, runs, places):
            writer.write(sample)


def _card(
    config: ExportConfig,
    preset: Preset,
    runs: Sequence[RunFolder],
    rows: dict[str, int],
    duplicates: int,
    sizes: dict[str, int],
) -> str:
    """The dataset card. What is not known is said to be unknown."""
    total = sum(rows.values())
    files = {split: [f"data/{name}" for name in sizes if name.startswith(f"{split}-")] for split in rows}
    bytes_of = {split: sum(sizes[path.removeprefix("data/")] for path in paths) for split, paths in files.items()}
    head: dict[str, Any] = {
        "license": "unknown",
        "task_categories": ["image-to-image"],
        "tags": ["image-editing", "synthetic", "shardedit"],
        "size_categories": [next((name for most, name in SIZES if total < most), "n>10M")],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": paths} for split, paths in files.items()],
            }
        ],
    }
    if preset.columns:
        head["dataset_info"] = {
            "features": features_in_yaml(preset.schema),
            "splits": [{"name": split, "num_bytes": bytes_of[split], "num_examples": rows[split]} for split in rows],
            "download_size": sum(sizes.values()),
            "dataset_size": sum(sizes.values()),
        }
    made_by = [
        f"| {at} | `{run.record['model'].get('name', '')}` {run.record['model'].get('revision', '')} | "
        f"`{run.record['recipe_hash']}` | {run.totals.done:,} | {run.totals.failed:,} |"
        for at, run in enumerate(runs)
    ]
    text = [
        f"# Edit pairs in the columns of {config.preset}",
        f"{total:,} pairs ({', '.join(f'{split} {count:,}' for split, count in rows.items())}). Every edited image was "
        "made by a diffusion model. No source image is in two splits. "
        f"{duplicates:,} row(s) that were there before (source, result and instruction alike) are left out.",
        "The licence of the source images and of the results is unknown to the program that wrote this card.",
        "| run | model | recipe | results | failed |\n|---|---|---|---|---|\n" + "\n".join(made_by),
        f"Written by shardedit {pipeline.__version__}.",
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n" + "\n\n".join(text) + "\n"
