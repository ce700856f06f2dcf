"""A finished or half-finished run, read back through its manifests: figures first, pictures of chosen results only.

A data file without a manifest is noise (writing/commit.py) and is not looked at. Parquet gives single columns and row
groups, so that reading figures costs little; of a tar, the part with a unit is read.
"""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.common.showing import public_url
from pipeline.errors import SinkError
from pipeline.evaluation.metrics import NAMES
from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.remote.pictures import Spent
from pipeline.remote.pictures import added as spent_by_both
from pipeline.writing.commit import committed_units
from pipeline.writing.files import NotAFileError, get
from pipeline.writing.gate_counts import added
from pipeline.writing.manifest import GateCounts, Manifest
from pipeline.writing.merged import Merged, Span
from pipeline.writing.paths import first_problem
from pipeline.writing.rows import ATTEMPT, REASONS
from pipeline.writing.run_record import column_names_of, read_run_record
from pipeline.writing.spans import rows_of, samples_of, table_of
from pipeline.writing.summary import SUMMARY_FILE
from pipeline.writing.webdataset import pictures_of

log = logging.getLogger(__name__)

READERS = 8  # units read side by side
PORTION_BYTES = 64 << 20  # of encoded pictures, held at a time
INPUTS = ("input", "input_thumbnail")  # columns, one of which is there
TEXTS = ("id", "edit", "method", "caption", "request")
NO_GATES = ("judge",)  # sections of `gates` that are none
FAILURE_COLUMNS = ("id", "edit", "method", "stage", "error_class", "message")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRef:
    """One result: where it stands, and its figures."""

    span: Span  # the rows of its unit
    row: int  # of these, from 0
    id: str
    edit: str
    method: str
    figures: dict[str, float | None]  # `NAMES`, and those that gates judge
    reasons: tuple[str, ...] = ()  # the gates that rejected it
    attempt: int | None = None  # of a run that makes several

    @property
    def is_rejected(self) -> bool:
        """Whether gates rejected it."""
        return self.span.kind == "rejected"

    @property
    def file(self) -> str:
        """The file that holds it, relative to the run's folder."""
        return self.span.path

    @property
    def row_in_file(self) -> int:
        """Its row there, from 0."""
        return self.span.start + self.row


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResult:
    """One result with its pictures, encoded as stored."""

    ref: ResultRef
    caption: str
    request: dict[str, Any]
    input: bytes  # the whole input where the run kept it, else its thumbnail
    mask: bytes | None  # None: the result has no region
    image: bytes


@dataclass(slots=True)
class StoredTotals:
    """All committed units of a run, added up."""

    done: int = 0
    failed: int = 0
    rejected: int = 0  # results of which no row passed the gates
    rejected_rows: int = 0
    images: int = 0
    network_rows: int = 0
    spent: dict[str, Spent] = field(default_factory=dict)  # by servers, by method; empty: none was asked
    output_bytes: int = 0
    gates: dict[str, GateCounts] = field(default_factory=dict)
    spans: dict[str, list[Span]] = field(default_factory=dict)  # by kind, in the order of the units

    def add(self, manifest: Manifest, merged: Merged) -> None:
        """Add a unit."""
        self.done += manifest.counts.ok
        self.failed += manifest.counts.failed
        self.rejected += manifest.counts.rejected
        self.rejected_rows += manifest.counts.rejected_rows
        self.gates = added(self.gates, manifest.counts.gates)
        self.images += manifest.counts.images
        self.network_rows += manifest.measured.network_rows
        self.spent = spent_by_both(self.spent, manifest.counts.spent)
        for span, file in zip(merged.spans(manifest), manifest.files, strict=True):
            self.output_bytes += file.size
            self.spans.setdefault(span.kind, []).append(span)


class _SummaryParts(BaseModel):
    """What is read of summary.json."""

    images_per_second: float | None = None
    complete: bool = False


class RunFolder:
    """A run's folder, opened for reading.

    Args:
        sink: the recipe's sink section, or its folder alone.

    Raises:
        SinkError: no run is here.
    """

    def __init__(self, sink: SinkConfig | str) -> None:
        self.sink = SinkConfig(folder=sink) if isinstance(sink, str) else sink
        self.fs, self.root = open_fs(self.sink.folder, self.sink.storage_options)
        record = read_run_record(self.sink)
        if record is None:
            raise SinkError(
                f"{public_url(self.sink.folder)} holds no run: run.json is missing. Give the folder that "
                "`shardedit edit` wrote to (sink.folder)"
            )
        self.record = record.model_dump(mode="json")
        self._names = column_names_of(self.record)
        self.summary = self._summary()
        self.totals = StoredTotals()
        merged = Merged(self.fs, self.root)
        for manifest in committed_units(self.sink):  # drawn once, none is kept: a long run has a million
            self.totals.add(manifest, merged)

    def _summary(self) -> dict[str, Any] | None:
        """As stored; None where it is missing or damaged, for the next `edit` writes it again."""
        try:
            data = get(self.fs, f"{self.root}/{SUMMARY_FILE}")
            return None if data is None else _SummaryParts.model_validate_json(data).model_dump()
        except (NotAFileError, ValidationError) as error:
            log.warning("%s is none: %s", SUMMARY_FILE, first_problem(error))
            return None

    @property
    def name(self) -> str:
        """Last part of the folder's path."""
        return posixpath.basename(self.root.replace("\\", "/").rstrip("/")) or self.root

    @property
    def column_names(self) -> Mapping[str, str]:
        """Names of columns that are not our own."""
        return self._names

    @property
    def gates(self) -> dict[str, dict[str, float | None]]:
        """The gates that are on, with their bounds; none of a run without gates."""
        section = self.record["recipe"].get("gates") or {}
        return {name: bounds for name, bounds in section.items() if name not in NO_GATES and isinstance(bounds, dict)}

    def spans(self, kind: str) -> list[Span]:
        """The rows of every committed unit, of a kind of file, in the order of the units."""
        return self.totals.spans.get(kind, [])

    def figures(self, spans: Sequence[Span]) -> list[ResultRef]:
        """Every result of these units, in their order, without pictures."""
        with ThreadPoolExecutor(READERS) as pool:
            return [ref for refs in pool.map(self._figures_of, spans) for ref in refs]

    def portions(self, refs: Sequence[ResultRef]) -> Iterator[list[ResultRef]]:
        """These results, unit by unit, in parts whose pictures may be held together: `load` one after the other."""
        portion: list[ResultRef] = []
        held = 0
        for span, some in _by_span(refs).items():
            is_tar = span.path.endswith(".tar")  # which is read whole
            for part in [some] if is_tar else [[ref] for ref in some]:
                size = span.size if is_tar else span.size // max(1, span.rows)
                if portion and held + size > PORTION_BYTES:
                    yield portion
                    portion, held = [], 0
                portion += part
                held += size
        if portion:
            yield portion

    def load(self, refs: Sequence[ResultRef]) -> list[StoredResult]:
        """These results with their pictures, in the order given; each unit is read once."""
        with ThreadPoolExecutor(READERS) as pool:
            loaded = [result for results in pool.map(self._load, _by_span(refs).values()) for result in results]
        found = {(result.ref.span, result.ref.row): result for result in loaded}
        return [found[ref.span, ref.row] for ref in refs]

    def failures(self, spans: Sequence[Span]) -> Iterator[dict[str, str]]:
        """What failed, without its bytes: `FAILURE_COLUMNS` of every row of these units."""
        for span in spans:
            yield from rows_of(self.fs, self.root, span, FAILURE_COLUMNS)

    def _figures_of(self, span: Span) -> list[ResultRef]:
        names = tuple(dict.fromkeys((*NAMES, *self.gates)))
        more = [*([REASONS] if self.gates else []), *([ATTEMPT] if self.record["recipe"].get("best_of") else [])]
        columns = ("id", "edit", "method", *names, *more)
        rows = rows_of(self.fs, self.root, span, columns)
        return [
            ResultRef(
                span=span,
                row=at,
                id=row["id"],
                edit=row["edit"],
                method=row["method"],
                figures={name: row[name] for name in names},
                reasons=tuple(row.get(REASONS) or ()),
                attempt=row.get(ATTEMPT),
            )
            for at, row in enumerate(rows)
        ]

    def _load(self, refs: Sequence[ResultRef]) -> list[StoredResult]:
        span = refs[0].span
        wanted = {ref.row: ref for ref in refs}
        rows = self._rows_of_tar(span) if span.path.endswith(".tar") else self._rows_of_parquet(span, set(wanted))
        return [
            StoredResult(
                ref=wanted[at],
                caption=row["caption"] or "",
                request=json.loads(row["request"]) if isinstance(row["request"], str) else row["request"],
                input=row["input"],
                mask=row["mask"],
                image=row["image"],
            )
            for at, row in rows
            if at in wanted
        ]

    def _rows_of_parquet(self, span: Span, wanted: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for at in sorted(wanted):
            one = replace(span, start=span.start + at, rows=1)  # its row group alone is read
            names = {name: self._names.get(name, name) for name in (*TEXTS, *INPUTS, "mask", "image")}
            (found,) = table_of(self.fs, self.root, one, list(names.values())).to_pylist()
            row = {name: found[column] for name, column in names.items() if column in found}
            source = next(row[name] for name in INPUTS if name in row)
            pictures = {"input": source, "mask": row["mask"], "image": row["image"]}
            yield at, row | {name: picture and picture["bytes"] for name, picture in pictures.items()}

    def _rows_of_tar(self, span: Span) -> Iterator[tuple[int, dict[str, Any]]]:
        for at, sample in enumerate(samples_of(self.fs, self.root, span)):
            pictures = pictures_of(sample, self._names)
            source = next(pictures[name] for name in INPUTS if name in pictures)
            shown = {"input": source, "mask": pictures.get("mask"), "image": pictures["image"]}
            yield at, json.loads(sample["json"]) | shown


def _by_span(refs: Sequence[ResultRef]) -> dict[Span, list[ResultRef]]:
    by_span: dict[Span, list[ResultRef]] = {}
    for ref in refs:
        by_span.setdefault(ref.span, []).append(ref)
    return by_span
