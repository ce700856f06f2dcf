"""A finished or half-finished run, read back through its manifests: figures first, pictures of chosen results only.

A data file without a manifest is noise (writing/commit.py) and is not looked at. Parquet gives single columns and row
groups, so that reading figures costs little; a tar is read whole.
"""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SinkError
from pipeline.evaluation.metrics import NAMES
from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.showing import public_url
from pipeline.writing.commit import committed_units, get, read_part
from pipeline.writing.manifest import Manifest
from pipeline.writing.run_record import check_schema

READERS = 8  # files read side by side
TEXTS = ("id", "edit", "method", "caption", "request")
FAILURE_COLUMNS = ("id", "edit", "method", "stage", "error_class", "message")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRef:
    """One result: where it stands, and its figures."""

    file: str  # relative to the run's folder
    row: int  # in that file, from 0
    id: str
    edit: str
    method: str
    figures: dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One result with its pictures, encoded as stored."""

    ref: ResultRef
    caption: str
    request: dict[str, Any]
    input: bytes  # the whole input where the run kept it, else its thumbnail
    mask: bytes | None  # None: the result has no region
    image: bytes


@dataclass(slots=True)
class Totals:
    """All committed units of a run, added up."""

    done: int = 0
    failed: int = 0
    images: int = 0
    unet_rows: int = 0
    output_bytes: int = 0
    files: dict[str, list[str]] = field(default_factory=dict)  # by folder, in the order of the units

    def add(self, manifest: Manifest) -> None:
        """Add a unit."""
        self.done += manifest.counts.ok
        self.failed += manifest.counts.failed
        self.images += manifest.counts.images
        self.unet_rows += manifest.measured.unet_rows
        for file in manifest.files:
            self.output_bytes += file.size
            self.files.setdefault(file.path.partition("/")[0], []).append(file.path)


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
        record = self._json("run.json")
        if record is None:
            raise SinkError(
                f"{public_url(self.sink.folder)} holds no run: run.json is missing. Give the folder that "
                "`shardedit edit` wrote to (sink.folder)"
            )
        check_schema(record, public_url(self.sink.folder))
        self.record = record
        self.summary = self._json("summary.json")
        self.totals = Totals()
        for manifest in committed_units(self.sink):  # drawn once, none is kept: a long run has a million
            self.totals.add(manifest)

    def _json(self, name: str) -> dict[str, Any] | None:
        data = get(self.fs, f"{self.root}/{name}")
        return None if data is None else json.loads(data)

    @property
    def name(self) -> str:
        """Last part of the folder's path."""
        return posixpath.basename(self.root.replace("\\", "/").rstrip("/")) or self.root

    def files(self, folder: str) -> list[str]:
        """Committed files below `data` or `quarantine`, in the order of their units."""
        return self.totals.files.get(folder, [])

    def figures(self, files: Sequence[str]) -> list[ResultRef]:
        """Every result of these data files, in their order, without pictures."""
        with ThreadPoolExecutor(READERS) as pool:
            return [ref for refs in pool.map(self._figures_of, files) for ref in refs]

    def load(self, refs: Sequence[ResultRef]) -> list[Result]:
        """These results with their pictures, in the order given; each file is opened once."""
        by_file: dict[str, list[ResultRef]] = {}
        for ref in refs:
            by_file.setdefault(ref.file, []).append(ref)
        with ThreadPoolExecutor(READERS) as pool:
            loaded = [result for results in pool.map(self._load, by_file.values()) for result in results]
        found = {(result.ref.file, result.ref.row): result for result in loaded}
        return [found[ref.file, ref.row] for ref in refs]

    def failures(self, files: Sequence[str]) -> Iterator[dict[str, str]]:
        """What failed, without its bytes: `FAILURE_COLUMNS` of every row of these quarantine files."""
        for file in files:
            yield from self._columns(file, FAILURE_COLUMNS)

    def _columns(self, file: str, names: Sequence[str]) -> list[dict[str, Any]]:
        path = f"{self.root}/{file}"
        table: pa.Table = read_part(self.fs, path, lambda opened: pq.read_table(opened, columns=list(names)))
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows

    def _figures_of(self, file: str) -> list[ResultRef]:
        if file.endswith(".tar"):
            rows = [json.loads(sample["json"]) for sample in self._samples(file)]
        else:
            rows = self._columns(file, ("id", "edit", "method", *NAMES))
        return [
            ResultRef(
                file=file,
                row=at,
                id=row["id"],
                edit=row["edit"],
                method=row["method"],
                figures={name: row.get(name) for name in NAMES},
            )
            for at, row in enumerate(rows)
        ]

    def _load(self, refs: Sequence[ResultRef]) -> list[Result]:
        file = refs[0].file
        wanted = {ref.row: ref for ref in refs}
        rows = self._rows_of_tar(file) if file.endswith(".tar") else self._rows_of_parquet(file, set(wanted))
        return [
            Result(
                ref=wanted[at],
                caption=row["caption"] or "",
                request=json.loads(row["request"]),
                input=row["input"],
                mask=row["mask"],
                image=row["image"],
            )
            for at, row in rows
            if at in wanted
        ]

    def _rows_of_parquet(self, file: str, wanted: set[int]) -> list[tuple[int, dict[str, Any]]]:
        return read_part(self.fs, f"{self.root}/{file}", lambda opened: list(_rows_of_groups(opened, wanted)))

    def _rows_of_tar(self, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for at, sample in enumerate(self._samples(file)):
            source = sample.get("input.png") or sample["thumbnail.jpg"]
            image = next(data for name, data in sample.items() if name.startswith("edited."))
            yield at, json.loads(sample["json"]) | {"input": source, "mask": sample.get("mask.png"), "image": image}

    def _samples(self, file: str) -> Iterator[dict[str, bytes]]:
        data = get(self.fs, f"{self.root}/{file}")
        if data is None:
            raise SinkError(f"{file} of {public_url(self.sink.folder)} vanished while it was read. Try again")
        yield from tar_samples(data)


def _rows_of_groups(opened: BinaryIO, wanted: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    parquet = pq.ParquetFile(opened)
    names = parquet.schema_arrow.names
    source = "input" if "input" in names else "input_thumbnail"
    start = 0
    for group in range(parquet.num_row_groups):
        stop = start + parquet.metadata.row_group(group).num_rows
        if here := sorted(at for at in wanted if start <= at < stop):
            table = parquet.read_row_group(group, columns=[*TEXTS, source, "mask", "image"])
            for at in here:
                (row,) = table.slice(at - start, 1).to_pylist()
                pictures = {"input": row[source], "mask": row["mask"], "image": row["image"]}
                yield at, row | {name: picture and picture["bytes"] for name, picture in pictures.items()}
        start = stop


def tar_samples(data: bytes) -> Iterator[dict[str, bytes]]:
    """Samples of a tar of ours, {member: bytes}. Ours are whole and in order: the standard library will do."""
    key = ""
    sample: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            opened = tar.extractfile(member)
            if opened is None:
                continue
            name, _, extension = member.name.partition(".")
            # A member that comes again begins a sample as well: a doubled row is two rows.
            if sample and (name != key or extension in sample):
                yield sample
                sample = {}
            key = name
            sample[extension] = opened.read()
    if sample:
        yield sample
