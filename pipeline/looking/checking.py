"""What is wrong with the rows of a file or unit: pictures that do not open, results that are missing or there twice,
and rows that were not made as run.json and the unit's manifest say.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain, product
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import ValidationError

from pipeline.common.room import Room
from pipeline.common.showing import describe
from pipeline.reading.shards import shard_slug, unit_id
from pipeline.seeds import run_seed_of, seed_for
from pipeline.settings.best_of import BestOfConfig
from pipeline.writing.manifest import KINDS, Manifest, kind_of
from pipeline.writing.rows import ATTEMPT, CHOSEN, REASONS, SETTINGS
from pipeline.writing.run_record import RunRecord, column_names_of
from pipeline.writing.spans import tar_samples
from pipeline.writing.webdataset import PICTURES, pictures_of

ROWS_AT_ONCE = 16
BYTES_AT_ONCE = 64 << 20  # of their pictures, encoded; one row where it has more
OPENED = Room(256 << 20)  # bytes of units' own files, opened at once: a larger unit is checked alone
DECODED = Room(32 << 20)  # pixels decoded at once, by however many threads: a larger picture is decoded alone


@dataclass(frozen=True, slots=True)
class Expected:
    """What run.json says of every unit."""

    methods: Mapping[str, str]  # their inversions, by name
    seed: int  # of the run
    best_of: BestOfConfig | None
    unit_size: int
    recipe_hash: str
    model_digest: str
    call_size: int
    columns: Mapping[str, Any]  # of every result, and what they hold
    shards: Mapping[str, str]  # path by slug
    inputs: Mapping[str, tuple[int, str]]  # (bytes, etag) by path
    names: Mapping[str, str]  # of columns that are not our own

    @staticmethod
    def of(record: RunRecord) -> Expected:
        """As a run's record says it."""
        recipe = record.recipe
        return Expected(
            methods={name: one["inversion"]["method"] for name, one in recipe["methods"].items()}
            or {recipe["editing"]["method"]: recipe["inversion"]["method"]},
            seed=recipe["run"]["seed"],
            best_of=_best_of(recipe.get("best_of")),
            unit_size=recipe["run"]["unit_size"],
            recipe_hash=record.recipe_hash,
            model_digest=record.model["digest"],
            call_size=record.call_size,
            columns={
                "model": record.model["name"],
                "model_revision": record.model["revision"],
                "model_digest": record.model["digest"],
                "recipe_hash": record.recipe_hash,
                "call_size": record.call_size,
            },
            shards={shard_slug(path): path for path, _, _ in record.input},
            inputs={path: (size, etag) for path, size, etag in record.input},
            names=column_names_of({"recipe": recipe}),
        )


def _best_of(stored: Any) -> BestOfConfig | None:
    """A recipe's section; none of what is no such section any more, which the recipe's hash tells."""
    try:
        return None if stored is None else BestOfConfig.model_validate(stored)
    except ValidationError:
        return None


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """Which result a stored row is, and what is wrong with it."""

    shard: str
    index: int
    id: str
    edit: str
    method: str
    kind: str  # of `KINDS`: where it stands
    made_by: str  # version of this package; for a failed result unit, stage and class of the error
    problem: str = ""  # what run.json contradicts
    attempt: int = 0  # of a run that makes several

    @property
    def ok(self) -> bool:
        """Whether it is a result, kept or rejected by gates."""
        return self.kind != "quarantine"

    def text(self) -> str:
        """For findings."""
        attempt = f", attempt {self.attempt}" if self.attempt else ""
        return f"({self.id}, {self.edit}, {self.method}{attempt})"


class BrokenError(Exception):
    """A file or one of its pictures does not open."""


_Row = tuple[dict[str, Any], dict[str, bytes]]  # its columns, and its pictures


def checked_rows(path: str, opened: BinaryIO, expected: Expected, pool: Executor | None = None) -> list[CheckedRow]:
    """Every row of a file, its pictures decoded.

    Args:
        path: relative to the run's folder: says what the file is.
        opened: the file.
        expected: what run.json says.
        pool: decodes pictures side by side.

    Raises:
        BrokenError: says what does not open.
    """
    kind = kind_of(path)
    checked: list[CheckedRow] = []
    decode = pool.map if pool else map
    try:
        rows = (
            _tar_rows(opened, expected)
            if path.endswith(".tar")
            else _parquet_rows(opened, kind != "quarantine", expected)
        )
        for some in _at_once(rows):
            found = [_checked(row, kind, expected) for row, _ in some]
            has_mask = [row.get("mask_share") is not None for row, _ in some]
            list(decode(_check_pictures, found, [pictures for _, pictures in some], has_mask))
            checked += found
    except (pa.ArrowException, tarfile.TarError, OSError, ValueError, KeyError) as error:
        raise BrokenError(describe(error)) from error
    return checked


def _checked(row: Mapping[str, Any], kind: str, expected: Expected) -> CheckedRow:
    is_result = kind != "quarantine"
    made_by = row["code_version"] if is_result else "\n".join((row["unit"], row["stage"], row["error_class"]))
    problem = _contradiction(row, expected) or _misplaced(row, kind) if is_result else ""
    where = (row["shard"], row["index"], row["id"], row["edit"], row["method"], kind)
    return CheckedRow(*where, made_by, problem, row.get(ATTEMPT, 0) if is_result else 0)


def _misplaced(row: Mapping[str, Any], kind: str) -> str:
    reasons = row.get(REASONS) or []
    if kind == "data" and reasons:
        return f"stands in data/, and was rejected by {', '.join(reasons)}"
    if kind == "data" and not row.get(CHOSEN, True):
        return "stands in data/, and another attempt was chosen"
    if kind == "rejected" and not reasons and row.get(CHOSEN, True):
        return "stands in rejected/, and no gate rejected it"
    return ""


def _contradiction(row: Mapping[str, Any], expected: Expected) -> str:
    if (inversion := expected.methods.get(row["method"])) is None:
        return f"has method {row['method']}, which run.json does not have"
    attempt = row.get(ATTEMPT, 0)
    if attempt:  # which may have another inversion
        inversion = json.loads(row[SETTINGS])["inversion"]["method"]
    seed = seed_for(run_seed_of(expected.seed, expected.best_of, attempt), row["id"], inversion)
    for name, value in (*expected.columns.items(), ("seed", seed)):
        if row[name] != value:
            return f"has {name} {row[name]}, by run.json it is {value}"
    return ""


def _at_once(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    some: list[_Row] = []
    held = 0
    for row in rows:
        some.append(row)
        held += sum(map(len, row[1].values()))
        if len(some) == ROWS_AT_ONCE or held >= BYTES_AT_ONCE:
            yield some
            some, held = [], 0
    if some:
        yield some


def _parquet_rows(opened: BinaryIO, is_result: bool, expected: Expected) -> Iterator[_Row]:
    file = pq.ParquetFile(opened)
    groups = ([group] for group in range(file.num_row_groups))  # small where rows are large: writing/parquet.py
    for batch in chain.from_iterable(file.iter_batches(ROWS_AT_ONCE, row_groups=group) for group in groups):
        for row in batch.to_pylist():
            columns = {name: expected.names.get(name, name) for name in PICTURES} if is_result else {}
            stored = {name: row[column] for name, column in columns.items() if column in row}
            stored |= {f"mask.{at}": mask for at, mask in enumerate(row.get("masks", ()))}
            yield row, {name: picture["bytes"] for name, picture in stored.items() if picture is not None}


def _tar_rows(opened: BinaryIO, expected: Expected) -> Iterator[_Row]:
    for sample in tar_samples(opened):
        yield json.loads(sample["json"]), pictures_of(sample, expected.names)


def _check_pictures(row: CheckedRow, pictures: Mapping[str, bytes], has_mask: bool) -> None:
    """Decode every picture of a row.

    Raises:
        BrokenError: one is not there or does not decode, or a mask does not fit its image.
    """
    if not row.ok:
        return
    if "image" not in pictures:
        raise BrokenError(f"{row.text()} has no image")
    if ("mask" in pictures) != has_mask:
        raise BrokenError(f"{row.text()} has {'no mask' if has_mask else 'a mask'}, which its mask_share contradicts")
    sizes = {}
    for name, data in pictures.items():
        try:
            with Image.open(io.BytesIO(data)) as image, DECODED.taken(image.width * image.height):
                image.load()
                sizes[name] = image.size
        except Exception as error:  # decoders raise what they like
            raise BrokenError(f"{name} of {row.text()} does not decode: {describe(error)}") from error
    for name, size in sizes.items():
        if name.startswith("mask") and size != sizes["image"]:
            raise BrokenError(f"{name} of {row.text()} is {size[0]} x {size[1]}, its image is not")


def row_problems(manifest: Manifest, rows: list[CheckedRow], expected: Expected) -> Iterator[str]:
    """Whether data, rejected and quarantine together hold what the unit was asked for, once each."""
    counts = manifest.counts
    for name, says, found in (
        ("data/", counts.ok, sum(row.kind == "data" for row in rows)),
        ("rejected/", counts.rejected_rows, sum(row.kind == "rejected" for row in rows)),
        ("quarantine/", counts.failed, sum(row.kind == "quarantine" for row in rows)),
    ):
        if says != found:
            yield f"{found} row(s) of unit {manifest.unit} in {name}, its manifest says {says}"
    if counts.asked != counts.ok + counts.rejected + counts.failed:
        has = f"{counts.ok} + {counts.rejected} + {counts.failed}"
        yield f"the manifest of unit {manifest.unit} asks for {counts.asked}, and has {has}"
    if counts.images != (count := manifest.stop - manifest.start):
        yield f"the manifest of unit {manifest.unit} counts {counts.images} images in {count} rows"
    yield from _failures_problems(manifest, rows)
    for one in rows:
        if one.problem:
            yield f"{one.text()} {one.problem}"
        elif one.ok and one.made_by != manifest.code_version:
            yield f"{one.text()} was made by version {one.made_by}, its manifest says {manifest.code_version}"
    yield from _doubled(rows)
    results = {kind: {(one.index, one.edit, one.method) for one in rows if one.kind == kind} for kind in KINDS}
    if counts.rejected != (found := len(results["rejected"] - results["data"])):
        yield f"{found} result(s) of unit {manifest.unit} have rejected rows alone, its manifest says {counts.rejected}"
    edits: dict[int, set[tuple[str, str]]] = {}
    ids: dict[int, set[str]] = {}
    for one in rows:
        if one.shard != manifest.shard or not manifest.start <= one.index < manifest.stop:
            yield f"{one.text()} belongs to another unit"
            continue
        edits.setdefault(one.index, set()).add((one.edit, one.method))
        ids.setdefault(one.index, set()).add(one.id)
    if manifest.stop - manifest.start > expected.unit_size:
        return  # said already; and no damaged manifest decides how long a loop is
    for index in range(manifest.start, manifest.stop):
        pairs = edits.get(index, set())
        if not pairs:
            yield f"row {index} of {manifest.shard} is missing"
        for edit, method in sorted(set(product({edit for edit, _ in pairs}, expected.methods)) - pairs):
            yield f"({next(iter(ids[index]))}, {edit}, {method}) is missing"
        if len(ids.get(index, ())) > 1:
            yield f"row {index} of {manifest.shard} has several ids"


def _doubled(rows: list[CheckedRow]) -> Iterator[str]:
    """Attempts that are there more often than once, and results that are kept or failed more often than once."""
    attempts = [(one.index, one.edit, one.method, one.attempt) for one in rows]
    ends = [(one.index, one.edit, one.method) for one in rows if one.kind != "rejected"]
    for found in (attempts, ends):
        for name, count in Counter(found).items():
            if count > 1:
                twice = next(one for one in rows if (one.index, one.edit, one.method) == name[:3])
                yield f"{twice.text()} is there {count} times"
        if len(set(found)) < len(found):
            return


def _failures_problems(manifest: Manifest, rows: list[CheckedRow]) -> Iterator[str]:
    """Whether the manifest counts failures as they stand in quarantine/."""
    failed = [one.made_by.split("\n") for one in rows if not one.ok]
    if others := sorted({unit for unit, _, _ in failed if unit != manifest.unit}):
        yield f"rows in quarantine/ name unit {others[0]}, not {manifest.unit}"
    for name, says, found in (
        ("stage", manifest.counts.failed_by_stage, Counter(stage for _, stage, _ in failed)),
        ("reason", manifest.counts.failed_by_class, Counter(error_class for _, _, error_class in failed)),
    ):
        if says != found:
            yield f"failures of unit {manifest.unit} by {name} are {dict(found)}, its manifest says {says}"


def manifest_problems(manifest: Manifest, expected: Expected) -> Iterator[str]:
    """Where a manifest contradicts run.json, or itself."""
    if expected.shards.get(shard_slug(manifest.shard)) != manifest.shard:
        yield f"its shard {manifest.shard} is not in run.json's input"
    if manifest.unit != unit_id(manifest.shard, manifest.chunk):
        yield f"unit {manifest.unit} is none of shard {manifest.shard}"
    count = manifest.stop - manifest.start
    # Units of large rows are shorter than asked for, so that later ones begin earlier; the last one may have none.
    fits = count <= expected.unit_size and count >= (0 if manifest.is_last else 1)
    if not 0 <= manifest.start <= manifest.chunk * expected.unit_size or not fits:
        yield f"rows {manifest.start} to {manifest.stop} are not those of chunk {manifest.chunk}"
    version = (manifest.shard_size, manifest.shard_etag)
    if (listed := expected.inputs.get(manifest.shard, version)) != version:
        yield f"its shard had {version[0]} bytes and version '{version[1]}', by run.json {listed[0]} and '{listed[1]}'"
    for name in ("recipe_hash", "model_digest", "call_size"):
        if getattr(manifest, name) != getattr(expected, name):
            yield f"{name} is {getattr(manifest, name)}, run.json says {getattr(expected, name)}"
