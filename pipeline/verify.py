"""Is a run's output whole? Every file is read, hashed and opened, every row counted, against manifests and run.json.

Held at a time: the files of `CHECKERS` units, and the names of all files.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice, product
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from PIL import Image

from pipeline.evaluation.results import tar_samples
from pipeline.reading.shards import shard_slug
from pipeline.reading.storage import open_fs, retrying
from pipeline.recipe import SinkConfig
from pipeline.showing import describe
from pipeline.writing.commit import Committed, committed_units, get, is_temporary, remove
from pipeline.writing.lock import DriverLock
from pipeline.writing.manifest import FileRecord, Manifest, manifest_path, shard_path, split_unit_id
from pipeline.writing.replace import take_back
from pipeline.writing.run_record import RunRecord

log = logging.getLogger(__name__)

CHECKERS = 4  # units checked side by side
ROWS_AT_ONCE = 16  # of a Parquet file
MAX_FINDINGS = 1000  # kept; all are counted and repaired
SEEN_BY_EDIT = {"missing unit", "missing file", "wrong size"}  # what `shardedit edit` does again unasked


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    kind: str  # missing unit, missing file, wrong size, changed bytes, does not open, rows, manifest, stray file
    path: str  # relative to the run's folder; of a missing unit, the shard
    text: str


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What was looked at and found."""

    units: int = 0
    files: int = 0
    bytes: int = 0
    done: int = 0  # rows in data/
    failed: int = 0  # rows in quarantine/
    temporary: int = 0  # files of writes that a kill cut: no findings, since nothing reads them
    wrong: int = 0  # findings in all
    by_kind: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)  # the first `MAX_FINDINGS`
    needs_repair: bool = False  # another run alone would not put it right

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    def note(self, finding: Finding) -> None:
        """Count a finding."""
        self.wrong += 1
        self.by_kind[finding.kind] = self.by_kind.get(finding.kind, 0) + 1
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"clean": self.clean, **asdict(self)}


def verify(sink: SinkConfig, record: RunRecord, *, repair: bool = False) -> Verdict:
    """Check a run that is not at work: what it is writing meanwhile would look like strays.

    Args:
        sink: where it stands.
        record: its run.json.
        repair: take back the commits of damaged units and remove strays; the next `shardedit edit` makes them again.

    Raises:
        SinkError: the folder cannot be read or, with `repair`, not be changed.
    """
    with DriverLock(sink, log.warning) if repair else nullcontext():
        return _verify(sink, record, repair)


def _verify(sink: SinkConfig, record: RunRecord, repair: bool) -> Verdict:
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()
    # Listed first: what is committed in the meantime is then no stray.
    there = {folder: _names(fs, root, folder) for folder in ("data", "quarantine", "_units", "_shards")}
    asked = _Asked.of(record)
    verdict, done, known = Verdict(), Committed(), set[str]()
    shards = {shard_slug(path): path for path, _, _ in record.input}
    for manifest, findings in _checked(fs, root, sink, asked):
        verdict.units += 1
        known.update((manifest_path(manifest.unit), shard_path(split_unit_id(manifest.unit)[0])))
        known.update(file.path for file in manifest.files)
        verdict.files += len(manifest.files)
        verdict.bytes += sum(file.size for file in manifest.files)
        verdict.done += manifest.counts.ok
        verdict.failed += manifest.counts.failed
        for finding in findings:
            verdict.note(finding)
        done.add(manifest)
        if findings and repair:
            take_back(manifest, sink)
        elif findings and not SEEN_BY_EDIT & {finding.kind for finding in findings}:
            verdict.needs_repair = True
    for slug, path in shards.items():
        if text := _uncommitted(done, slug):
            verdict.note(Finding(kind="missing unit", path=path, text=text))
    for name in sorted(name for names in there.values() for name in names if name not in known):
        if is_temporary(name):  # left to `shardedit edit`, which removes it when it is old enough
            verdict.temporary += 1
            continue
        text = "no manifest lists it" if not name.startswith("_") else "is no manifest"
        verdict.note(Finding(kind="stray file", path=name, text=text))
        if repair:
            remove(fs, f"{root}/{name}")
        else:
            verdict.needs_repair = True
    return verdict


def _names(fs: AbstractFileSystem, root: str, folder: str) -> set[str]:
    """Files below a folder, as paths relative to the root."""
    if not fs.exists(f"{root}/{folder}"):
        return set()
    start = len(root.rstrip("/")) + 1
    return {path[start:] for path in retrying()(fs.find, f"{root}/{folder}")}


def _uncommitted(done: Committed, slug: str) -> str:
    """Which chunks of a shard are missing, in words; "" where none is."""
    if done.has_whole_shard(slug):
        return ""
    chunks = done.chunks.get(slug, 0)
    if not chunks:
        return "none of its units is committed"
    gaps = [chunk for chunk in range(chunks.bit_length()) if not chunks >> chunk & 1]
    named = ", ".join(map(str, gaps[:10])) + (f" and {len(gaps) - 10} more" if len(gaps) > 10 else "")
    parts = [f"chunk {named} not committed"] if gaps else []
    if slug not in done.last:
        parts.append(f"nothing after chunk {chunks.bit_length() - 1} is committed")
    return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What run.json says of every unit."""

    methods: tuple[str, ...]
    unit_size: int
    recipe_hash: str
    model_digest: str
    call_size: int
    shards: Mapping[str, str]  # path by slug

    @staticmethod
    def of(record: RunRecord) -> _Asked:
        recipe = record.recipe
        return _Asked(
            methods=tuple(recipe["methods"]) or (recipe["editing"]["method"],),
            unit_size=recipe["run"]["unit_size"],
            recipe_hash=record.recipe_hash,
            model_digest=record.model["digest"],
            call_size=record.call_size,
            shards={shard_slug(path): path for path, _, _ in record.input},
        )


def _checked(
    fs: AbstractFileSystem, root: str, sink: SinkConfig, asked: _Asked
) -> Iterator[tuple[Manifest, list[Finding]]]:
    manifests = committed_units(sink, trusted=False)
    with ThreadPoolExecutor(CHECKERS) as pool:
        while window := list(islice(manifests, CHECKERS)):
            found = pool.map(lambda manifest: _check_unit(fs, root, manifest, asked), window)
            yield from zip(window, found, strict=True)


def _check_unit(fs: AbstractFileSystem, root: str, manifest: Manifest, asked: _Asked) -> list[Finding]:
    findings = [
        Finding(kind="manifest", path=manifest_path(manifest.unit), text=text)
        for text in _manifest_problems(manifest, asked)
    ]
    rows: list[_Key] = []
    readable = True
    for file in manifest.files:
        data = get(fs, f"{root}/{file.path}")
        if data is None:
            findings.append(Finding(kind="missing file", path=file.path, text=f"unit {manifest.unit} lists it"))
            readable = False
            continue
        findings += _byte_problems(file, data)
        try:
            rows += _read(file.path, data)
        except _BrokenError as error:
            findings.append(Finding(kind="does not open", path=file.path, text=str(error)))
            readable = False
    if readable:
        where = manifest.files[0].path if manifest.files else manifest_path(manifest.unit)
        findings += [Finding(kind="rows", path=where, text=text) for text in _row_problems(manifest, rows, asked)]
    return findings


def _manifest_problems(manifest: Manifest, asked: _Asked) -> Iterator[str]:
    if asked.shards.get(shard_slug(manifest.shard)) != manifest.shard:
        yield f"its shard {manifest.shard} is not in run.json's input"
    if manifest.start != manifest.chunk * asked.unit_size or manifest.stop - manifest.start > asked.unit_size:
        yield f"rows {manifest.start} to {manifest.stop} are not those of chunk {manifest.chunk}"
    for name in ("recipe_hash", "model_digest", "call_size"):
        if getattr(manifest, name) != getattr(asked, name):
            yield f"{name} is {getattr(manifest, name)}, run.json says {getattr(asked, name)}"


def _byte_problems(file: FileRecord, data: bytes) -> Iterator[Finding]:
    if len(data) != file.size:
        text = f"has {len(data)} bytes, its manifest says {file.size}"
        yield Finding(kind="wrong size", path=file.path, text=text)
    elif hashlib.sha256(data).hexdigest() != file.sha256:
        yield Finding(kind="changed bytes", path=file.path, text="its SHA-256 is not that of its manifest")


@dataclass(frozen=True, slots=True)
class _Key:
    """What a row answers, and where it stands."""

    shard: str
    index: int
    id: str
    edit: str
    method: str
    ok: bool  # in data/

    def text(self) -> str:
        return f"({self.id}, {self.edit}, {self.method})"


class _BrokenError(Exception):
    """A file or one of its pictures does not open."""


def _read(path: str, data: bytes) -> list[_Key]:
    """Every row of a file, its pictures decoded.

    Raises:
        _BrokenError: says what does not open.
    """
    is_data = path.startswith("data/")
    keys = []
    try:
        for row, pictures in _tar_rows(data) if path.endswith(".tar") else _parquet_rows(data, is_data):
            key = _Key(row["shard"], row["index"], row["id"], row["edit"], row["method"], is_data)
            _check_pictures(key, pictures, has_mask=row.get("mask_share") is not None)
            keys.append(key)
    except (pa.ArrowException, tarfile.TarError, OSError, ValueError, KeyError) as error:
        raise _BrokenError(describe(error)) from error
    return keys


def _parquet_rows(data: bytes, is_data: bool) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    parquet = pq.ParquetFile(io.BytesIO(data))
    for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE):
        for row in batch.to_pylist():
            names = [name for name in ("image", "mask", "input", "input_thumbnail") if is_data and name in row]
            stored = {name: row[name] for name in names}
            stored |= {f"mask.{at}": mask for at, mask in enumerate(row.get("masks", ()))}
            yield row, {name: picture["bytes"] for name, picture in stored.items() if picture is not None}


def _tar_rows(data: bytes) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    for sample in tar_samples(data):
        pictures = {
            "image" if name.startswith("edited.") else name.removesuffix(".png").removesuffix(".jpg"): member
            for name, member in sample.items()
            if name.startswith(("edited.", "mask.", "input.", "thumbnail."))
        }
        yield json.loads(sample["json"]), pictures


def _check_pictures(key: _Key, pictures: Mapping[str, bytes], *, has_mask: bool) -> None:
    """Decode every picture of a row.

    Raises:
        _BrokenError: one is not there or does not decode, or a mask does not fit its image.
    """
    if not key.ok:
        return
    if "image" not in pictures:
        raise _BrokenError(f"{key.text()} has no image")
    if ("mask" in pictures) != has_mask:
        raise _BrokenError(f"{key.text()} has {'no mask' if has_mask else 'a mask'}, which its mask_share contradicts")
    sizes = {}
    for name, data in pictures.items():
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                sizes[name] = image.size
        except Exception as error:  # decoders raise what they like
            raise _BrokenError(f"{name} of {key.text()} does not decode: {describe(error)}") from error
    for name, size in sizes.items():
        if name.startswith("mask") and size != sizes["image"]:
            raise _BrokenError(f"{name} of {key.text()} is {size[0]} x {size[1]}, its image is not")


def _row_problems(manifest: Manifest, rows: list[_Key], asked: _Asked) -> Iterator[str]:
    """Whether data and quarantine together hold what the unit was asked for, once each."""
    counts = manifest.counts
    for name, says, found in (
        ("data/", counts.ok, sum(row.ok for row in rows)),
        ("quarantine/", counts.failed, sum(not row.ok for row in rows)),
    ):
        if says != found:
            yield f"{found} row(s) of unit {manifest.unit} in {name}, its manifest says {says}"
    if counts.asked != counts.ok + counts.failed:
        yield f"the manifest of unit {manifest.unit} asks for {counts.asked}, and has {counts.ok} + {counts.failed}"
    for row, count in Counter((row.index, row.edit, row.method) for row in rows).items():
        if count > 1:
            twice = next(one for one in rows if (one.index, one.edit, one.method) == row)
            yield f"{twice.text()} is there {count} times"
    edits: dict[int, set[tuple[str, str]]] = {}
    ids: dict[int, set[str]] = {}
    for one in rows:
        if one.shard != manifest.shard or not manifest.start <= one.index < manifest.stop:
            yield f"{one.text()} belongs to another unit"
            continue
        edits.setdefault(one.index, set()).add((one.edit, one.method))
        ids.setdefault(one.index, set()).add(one.id)
    for index in range(manifest.start, manifest.stop):
        pairs = edits.get(index, set())
        if not pairs:
            yield f"row {index} of {manifest.shard} is missing"
        for edit, method in sorted(set(product({edit for edit, _ in pairs}, asked.methods)) - pairs):
            yield f"({next(iter(ids[index]))}, {edit}, {method}) is missing"
        if len(ids.get(index, ())) > 1:
            yield f"row {index} of {manifest.shard} has several ids"
