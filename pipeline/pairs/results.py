"""Rows of finished runs by where they stand, for an export: read by row groups, each result marked as edited."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

import pipeline
from pipeline.common.showing import public_url
from pipeline.errors import EncodeError, SinkError
from pipeline.looking.results import RunFolder
from pipeline.pairs.marks import marked, packet
from pipeline.writing.files import read_part
from pipeline.writing.manifest import kind_of

Row = Mapping[str, Any]
"""A result under our own names, pictures as {bytes, path}; `figures` has its numbers."""
TEXTS = ("id", "edit", "method", "caption", "instruction", "source_prompt", "target_prompt")
MADE_BY = ("model", "model_revision", "model_digest", "recipe_hash", "seed", "concepts")
PICTURES = ("image", "mask", "input")
OF_GATES = (  # of runs that have gates or try several times
    *("attempt", "chosen", "reject_reasons"),
    "instruction_given",  # before a judge rewrote it
)
KEPT_GROUPS = 4  # row groups in memory: two runs are read side by side, each at two places
ACCEPTED, REJECTED = "data", "rejected"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands."""

    run: int  # which of the runs
    path: str  # of the file, relative to the run's folder
    row: int  # in the file


class Results:
    """The rows of some runs.

    Args:
        runs: opened.
    """

    def __init__(self, runs: Sequence[RunFolder]) -> None:
        self.runs = tuple(runs)
        self._starts: dict[tuple[int, str], list[int]] = {}
        self._figures: dict[tuple[int, str], tuple[str, ...]] = {}
        self._groups: OrderedDict[tuple[int, str, int], pa.Table] = OrderedDict()

    def places(self, kinds: Sequence[str]) -> Iterator[Place]:
        """Where the rows of these kinds stand, in the order of runs, units and rows."""
        for number, run in enumerate(self.runs):
            for kind in kinds:
                for span in run.spans(kind):
                    for at in range(span.rows):
                        yield Place(number, span.path, span.start + at)

    def figures(self) -> set[str]:
        """Names of the numbers that rows of these runs have."""
        found: set[str] = set()
        for number, run in enumerate(self.runs):
            for span in [*run.spans(ACCEPTED)[:1], *run.spans(REJECTED)[:1]]:
                self._starts_of(Place(number, span.path, 0))
                found.update(self._figures[number, span.path])
        return found

    def read(self, place: Place) -> dict[str, Any]:
        """A row as it stands, its figures under "figures".

        Raises:
            SinkError: its file cannot be read.
        """
        run = self.runs[place.run]
        starts = self._starts_of(place)
        group = bisect_right(starts, place.row) - 1
        key = (place.run, place.path, group)
        if key not in self._groups:
            while len(self._groups) >= KEPT_GROUPS:
                self._groups.popitem(last=False)
            self._groups[key] = self._group(place, group)
        self._groups.move_to_end(key)
        (found,) = self._groups[key].slice(place.row - starts[group], 1).to_pylist()
        own = {run.column_names.get(name, name): name for name in (*TEXTS, *MADE_BY, *PICTURES)}
        row = {own.get(column, column): value for column, value in found.items()}
        figures = self._figures[place.run, place.path]
        return {
            **{name: row.get(name) for name in (*TEXTS, *MADE_BY, *PICTURES, *OF_GATES)},
            "figures": {name: row[name] for name in figures},
        }

    def shown(self, place: Place) -> dict[str, Any]:
        """A row whose result says in its metadata that it was edited.

        Raises:
            SinkError: as `read` and `mark`.
        """
        return self.mark(place, self.read(place))

    def mark(self, place: Place, row: Row) -> dict[str, Any]:
        """A row as it stands, made so that its result says in its metadata that it was edited.

        Raises:
            SinkError: the result is no whole picture.
        """
        try:
            image = {**row["image"], "bytes": marked(row["image"]["bytes"], packet_of(row))}
        except EncodeError as error:
            where = f"{public_url(self.runs[place.run].sink.folder)}/{place.path}"
            raise SinkError(
                f"{where}, row {place.row} ({name_of(row)}): {error}. To look for damage: shardedit verify"
            ) from error
        return {**row, "image": image}

    def _starts_of(self, place: Place) -> list[int]:
        key = (place.run, place.path)
        if key not in self._starts:
            run = self.runs[place.run]
            metadata = read_part(run.fs, f"{run.root}/{place.path}", pq.read_metadata)
            sizes = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
            self._starts[key] = list(accumulate(sizes, initial=0))[:-1]
            schema = metadata.schema.to_arrow_schema()
            self._figures[key] = tuple(field.name for field in schema if field.type == pa.float64())
        return self._starts[key]

    def _group(self, place: Place, group: int) -> pa.Table:
        run = self.runs[place.run]
        names = [run.column_names.get(name, name) for name in (*TEXTS, *MADE_BY, *PICTURES)]
        columns = [*names, *OF_GATES, *self._figures[place.run, place.path]]
        return read_part(run.fs, f"{run.root}/{place.path}", partial(_read, group=group, columns=columns))


def _read(file: BinaryIO, group: int, columns: list[str]) -> pa.Table:
    opened = pq.ParquetFile(file)
    there = set(opened.schema_arrow.names)
    return opened.read_row_group(group, columns=[name for name in columns if name in there])


def is_accepted(place: Place, row: Row) -> bool:
    """Whether a row passed its run's gates and, of several attempts, is the one that was chosen."""
    return kind_of(place.path) == ACCEPTED and row["chosen"] is not False


def name_of(row: Row) -> str:
    """Tells a result from the others of its run."""
    return f"{row['id']}~{row['edit']}~{row['method']}{of_attempt(row)}"


def of_attempt(row: Row) -> str:
    """What a name ends in where a run tried several times."""
    return f"~{row['attempt']}" if row["attempt"] else ""


def packet_of(row: Row) -> bytes:
    """What a result's metadata says."""
    return packet(
        {
            "Method": row["method"] or "",
            "RecipeHash": row["recipe_hash"] or "",
            "ModelDigest": row["model_digest"] or "",
        },
        tool=f"shardedit {pipeline.__version__}",
        model=row["model"] or "",
        version=row["model_revision"] or "",
    )
