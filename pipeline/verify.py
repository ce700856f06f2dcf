"""Is a run's output whole? Every file is read, hashed and opened, every row counted, against manifests and run.json.

Held at a time: the files of `CHECKERS` units, the names of all files, and what the rows of a few merged files answer.
Those files themselves are read piece by piece, an object store's from a copy in this machine's temporary folder.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from threading import Lock
from typing import Any

from fsspec import AbstractFileSystem

from pipeline import stopping
from pipeline.checking import Asked, BrokenError, Key, read_keys, row_problems
from pipeline.reading.shards import shard_slug
from pipeline.reading.storage import open_fs, retrying
from pipeline.recipe import SinkConfig
from pipeline.writing.baseline import FOLDER as BASELINES
from pipeline.writing.baseline import Baselines, Counted, baseline_path
from pipeline.writing.commit import Committed, CommittedShard, committed_shards
from pipeline.writing.files import get, is_temporary, local_copy
from pipeline.writing.lock import Claim, DriverLock
from pipeline.writing.manifest import KINDS, PARTS, FileRecord, Manifest, kind_of, manifest_path
from pipeline.writing.merged import OUTPUT, Merged, Slot
from pipeline.writing.repair import take_back
from pipeline.writing.run_record import RunRecord

log = logging.getLogger(__name__)

CHECKERS = 4  # units checked side by side
HELD = 4  # merged files whose rows are known at a time: data and quarantine, at the seam of two of each
FOLDERS = (*KINDS, PARTS, "_units", "_shards", OUTPUT, BASELINES)
MAX_FINDINGS = 1000  # kept; all are counted and repaired
SEEN_BY_EDIT = {"missing unit", "missing file", "wrong size", "not merged"}  # what `shardedit edit` does again unasked


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    # missing unit, missing file, wrong size, changed bytes, does not open, rows, manifest, not merged, stray file
    kind: str
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
    loose: int = 0  # files of units that are not merged
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
    if not repair:
        return _verify(sink, record, None)
    with stopping.orderly() as stop, DriverLock(sink, log.warning) as lock:
        stop.when_ended = partial(lock.__exit__, None, None, None)
        return _verify(sink, record, lock.claim)


def _verify(sink: SinkConfig, record: RunRecord, repairing: Claim | None) -> Verdict:
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()
    # Listed first: what is committed in the meantime is then no stray.
    there = {folder: _names(fs, root, folder) for folder in FOLDERS}
    asked = Asked.of(record)
    verdict, done, counted = Verdict(), Committed(), Counted()
    broken: set[str] = set()  # files of damaged units, and those of nobody
    known = {baseline_path(baseline.generation) for baseline in Baselines(fs, root).all}
    shards = {shard_slug(path): path for path, _, _ in record.input}
    with ThreadPoolExecutor(CHECKERS) as pool:
        merged = _MergedFiles(fs, root, asked, pool)
        known.add(merged.index_path)
        for shard, manifest, findings in _checked(fs, root, sink, asked, merged):
            stopping.check()
            verdict.units += 1
            known.update(shard.used)
            known.update(file.path for file in manifest.files)
            alone = [file for file in manifest.files if not merged.holds(file, manifest.unit)]
            verdict.files += len(alone)
            verdict.bytes += sum(file.size for file in alone)
            verdict.loose += len(alone)
            verdict.done += manifest.counts.ok
            verdict.failed += manifest.counts.failed
            for finding in findings:
                verdict.note(finding)
            done.add(manifest)
            if not findings:
                counted.add(manifest)
                continue
            own = (manifest_path(manifest.unit, manifest.generation), *(file.path for file in manifest.files))
            broken.update(path for path in own if any(path in names for names in there.values()))
            if not SEEN_BY_EDIT & {finding.kind for finding in findings}:
                verdict.needs_repair = True
        _note_merged(verdict, merged, known)
    missing = {slug: text for slug in shards if (text := _uncommitted(done, slug))}
    for slug, text in missing.items():
        verdict.note(Finding(kind="missing unit", path=shards[slug], text=text))
    if verdict.loose and not missing and record.recipe["sink"].get("shard_size"):
        text = f"{verdict.loose} file(s) of units stand in {PARTS}/ and are not merged yet"
        verdict.note(Finding(kind="not merged", path="data", text=text))
    for name in sorted(name for names in there.values() for name in names if name not in known):
        if is_temporary(name):  # left to `shardedit edit`, which removes it when it is old enough
            verdict.temporary += 1
            continue
        verdict.note(Finding(kind="stray file", path=name, text=_STRAYS.get(name.partition("/")[0], _NO_MANIFEST)))
        verdict.needs_repair = True
        broken.add(name)
    if repairing and verdict.needs_repair:
        take_back(counted, merged.damaged, sorted(broken), sink, repairing)
    return verdict


_NO_MANIFEST = "no manifest or index that counts lists it"
_STRAYS = {
    "_units": "is no manifest, or one that does not count",
    "_shards": "holds no manifest that counts, or none that is not elsewhere, too",
    BASELINES: "is no baseline, or one that a later driver's replaces",
}


def _note_merged(verdict: Verdict, merged: _MergedFiles, known: set[str]) -> None:
    """Add what was found in merged files."""
    for slot, findings in merged.all_findings():
        known.add(slot.contents)
        if slot.file is not None:
            known.add(slot.file.path)
            verdict.files += 1
            verdict.bytes += slot.file.size
        for finding in findings:
            verdict.note(finding)
            verdict.needs_repair |= finding.kind not in SEEN_BY_EDIT


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


class _MergedFiles:
    """Merged files, each read once: when the first of its units is checked, or at the end."""

    def __init__(self, fs: AbstractFileSystem, root: str, asked: Asked, pool: Executor) -> None:
        self._fs, self._root, self._asked, self._pool = fs, root, asked, pool
        self._merged = Merged(fs, root, trusted=False)
        self._lock = Lock()
        self._findings: dict[str, list[Finding]] = {}  # by path of the contents; of every slot that was read
        self._rows: dict[str, dict[str, list[Key]] | None] = {}  # of the last few: rows by unit; None: unreadable
        self.damaged: set[str] = set()  # paths of contents

    @property
    def index_path(self) -> str:
        """Of the index that counts; "" where there is none."""
        return self._merged.path

    def holds(self, file: FileRecord, unit: str) -> bool:
        """Whether a merged file holds what a unit's manifest lists."""
        return self._merged.find(file, unit) is not None

    def rows(self, file: FileRecord, unit: str) -> list[Key] | None:
        """A unit's rows; None where the merged file cannot be read, which is a finding of its own."""
        slot = self._merged.slot_of(kind_of(file.path), unit)
        assert slot is not None, "holds() comes first"
        with self._lock:
            if slot.contents not in self._rows:
                while len(self._rows) >= HELD:
                    del self._rows[next(iter(self._rows))]
                self._read(slot)
            rows = self._rows[slot.contents]
        return None if rows is None else rows.get(unit, [])

    def blame(self, file: FileRecord, unit: str) -> None:
        """A unit's rows are not those that it was asked for: the file that holds them is no good."""
        slot = self._merged.slot_of(kind_of(file.path), unit)
        if slot is not None:
            self.damaged.add(slot.contents)

    def all_findings(self) -> Iterator[tuple[Slot, list[Finding]]]:
        """Every merged file with what is wrong with it, apart from its units."""
        for kind in KINDS:
            for slot in self._merged.slots(kind):
                if slot.contents not in self._findings:
                    self._read(slot)
                yield slot, self._findings[slot.contents]

    def _read(self, slot: Slot) -> None:
        findings: list[Finding] = []
        self._rows[slot.contents] = None
        contents = self._merged.contents(slot)
        if slot.file is not None and contents is None:
            text = "what it holds cannot be told: its contents are missing or damaged"
            findings.append(Finding(kind="missing file", path=slot.contents, text=text))
        elif slot.file is not None and contents is not None:
            try:
                with local_copy(self._fs, f"{self._root}/{slot.file.path}") as path, open(path, "rb") as opened:
                    sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
                    findings += _byte_problems(slot.file, opened.tell(), sha256)
                    opened.seek(0)
                    rows = read_keys(slot.file.path, opened, self._asked, self._pool)
                if len(rows) != slot.file.rows:
                    text = f"has {len(rows)} row(s), the index says {slot.file.rows}"
                    findings.append(Finding(kind="rows", path=slot.file.path, text=text))
                self._rows[slot.contents] = {one.unit: rows[one.start : one.start + one.rows] for one in contents.units}
            except FileNotFoundError:
                findings.append(Finding(kind="missing file", path=slot.file.path, text="the index lists it"))
            except BrokenError as error:
                findings.append(Finding(kind="does not open", path=slot.file.path, text=str(error)))
        self._findings[slot.contents] = findings
        if findings:
            self.damaged.add(slot.contents)


def _checked(
    fs: AbstractFileSystem, root: str, sink: SinkConfig, asked: Asked, merged: _MergedFiles
) -> Iterator[tuple[CommittedShard, Manifest, list[Finding]]]:
    units = ((shard, manifest) for shard in committed_shards(sink, trusted=False) for manifest in shard.manifests)
    with ThreadPoolExecutor(CHECKERS) as pool:
        while window := list(islice(units, CHECKERS)):
            found = pool.map(lambda unit: _check_unit(fs, root, unit[1], asked, merged), window)
            yield from ((shard, manifest, findings) for (shard, manifest), findings in zip(window, found, strict=True))


def _check_unit(
    fs: AbstractFileSystem, root: str, manifest: Manifest, asked: Asked, merged: _MergedFiles
) -> list[Finding]:
    findings = [
        Finding(kind="manifest", path=manifest_path(manifest.unit, manifest.generation), text=text)
        for text in _manifest_problems(manifest, asked)
    ]
    rows: list[Key] = []
    readable = True
    for file in manifest.files:
        if merged.holds(file, manifest.unit):
            some = merged.rows(file, manifest.unit)
            readable = readable and some is not None
            rows += some or []
            continue
        data = get(fs, f"{root}/{file.path}")
        if data is None:
            findings.append(Finding(kind="missing file", path=file.path, text=f"unit {manifest.unit} lists it"))
            readable = False
            continue
        findings += _byte_problems(file, len(data), hashlib.sha256(data).hexdigest())
        try:
            rows += read_keys(file.path, io.BytesIO(data), asked)
        except BrokenError as error:
            findings.append(Finding(kind="does not open", path=file.path, text=str(error)))
            readable = False
    if readable and (problems := list(row_problems(manifest, rows, asked))):
        where = manifest.files[0].path if manifest.files else manifest_path(manifest.unit, manifest.generation)
        findings += [Finding(kind="rows", path=where, text=text) for text in problems]
        for file in manifest.files:
            if merged.holds(file, manifest.unit):
                merged.blame(file, manifest.unit)
    return findings


def _manifest_problems(manifest: Manifest, asked: Asked) -> Iterator[str]:
    if asked.shards.get(shard_slug(manifest.shard)) != manifest.shard:
        yield f"its shard {manifest.shard} is not in run.json's input"
    if manifest.start != manifest.chunk * asked.unit_size or manifest.stop - manifest.start > asked.unit_size:
        yield f"rows {manifest.start} to {manifest.stop} are not those of chunk {manifest.chunk}"
    for name in ("recipe_hash", "model_digest", "call_size"):
        if getattr(manifest, name) != getattr(asked, name):
            yield f"{name} is {getattr(manifest, name)}, run.json says {getattr(asked, name)}"


def _byte_problems(file: FileRecord, size: int, sha256: str) -> Iterator[Finding]:
    if size != file.size:
        yield Finding(kind="wrong size", path=file.path, text=f"has {size} bytes, {file.size} were written")
    elif sha256 != file.sha256:
        yield Finding(kind="changed bytes", path=file.path, text="its SHA-256 is not that of what was written")
