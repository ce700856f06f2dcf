"""Is a run's output whole? Every file is read, hashed and opened, every row counted, against manifests and run.json;
and these against what derives from them, and against the source's listing (consistency.py).

Memory: the files of `CHECKERS` units (of large ones fewer), the names of all files, and which results the rows of a
few merged files are. Merged files are read piece by piece, an object store's from a copy in this machine's temporary
folder.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from threading import Lock

from pipeline.common import stopping
from pipeline.looking.checking import (
    OPENED,
    BrokenError,
    CheckedRow,
    Expected,
    checked_rows,
    manifest_problems,
    row_problems,
)
from pipeline.looking.consistency import REPORT_FILE, FromSource, look_at_source, summary_problem
from pipeline.looking.findings import SEEN_BY_EDIT, STRAY, Finding, Inspection
from pipeline.reading.shards import shard_slug
from pipeline.reading.storage import FileSystem, is_local, open_fs, retrying
from pipeline.recipe import SinkConfig, SourceConfig
from pipeline.writing.baseline import FOLDER as BASELINES
from pipeline.writing.baseline import Baseline, Baselines, Counted, baseline_path
from pipeline.writing.commit import Committed, CommittedShard, committed_shards
from pipeline.writing.files import NotAFileError, get, is_temporary, local_copy, size_of
from pipeline.writing.lock import Claim, DriverLock
from pipeline.writing.manifest import KINDS, PARTS, FileRecord, Manifest, kind_of, manifest_path
from pipeline.writing.merged import OUTPUT, Merged, Slot
from pipeline.writing.paths import refuse_links
from pipeline.writing.repair import take_back
from pipeline.writing.run_record import RUN_FILE, RunRecord
from pipeline.writing.summary import SUMMARY_FILE, Totals, write_summary

log = logging.getLogger(__name__)

CHECKERS = 4  # units checked side by side
HELD = 6  # merged files whose rows are known at a time: of each kind, at the seam of two
FOLDERS = (*KINDS, PARTS, "_units", "_shards", OUTPUT, BASELINES)
_Unit = tuple[CommittedShard, Manifest | None, Manifest]  # the second: the one before it, where there is one


def verify(
    sink: SinkConfig,
    record: RunRecord,
    *,
    repair: bool = False,
    source: SourceConfig | None = None,
    source_is_needed: bool = True,
) -> Inspection:
    """Check a run that is not at work: what it is writing meanwhile would look like strays.

    Args:
        sink: where it stands.
        record: its run.json.
        repair: take back the commits of damaged units and remove strays; the next `shardedit edit` makes them again.
            Where nothing else is wrong, write summary and report again.
        source: where the input is: what it lists is what the run should hold. None: it is not looked at.
        source_is_needed: a source that cannot be listed is a finding, not a note.

    Raises:
        SinkError: the folder cannot be read or, with `repair`, not be changed.
    """
    if repair:
        refuse_links(sink)
        with stopping.orderly() as stop, DriverLock(sink, log.warning) as lock:
            stop.when_ended = partial(lock.__exit__, None, None, None)
            inspection, ends = _verify(sink, record, lock.claim)
    else:
        inspection, ends = _verify(sink, record, None)
    if source is not None:
        _note_source(inspection, look_at_source(record, source), ends, source_is_needed)
    inspection.repaired = repair and bool(inspection.repairs)
    return inspection


def _verify(sink: SinkConfig, record: RunRecord, repairing: Claim | None) -> tuple[Inspection, dict[str, int]]:
    """The inspection; and of every shard that is done, the row after the last."""
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()
    # Listed first: what is committed in the meantime is then no stray.
    there = {folder: _names(fs, root, folder) for folder in FOLDERS}
    expected = Expected.of(record)
    inspection, done, counted = Inspection(), Committed(), Counted()
    broken: set[str] = set()  # files of damaged units, and those of nobody
    baselines = Baselines(fs, root).all
    known = {baseline_path(baseline.generation) for baseline in baselines}
    for text in record.problems():
        inspection.note(Finding(kind="run record", path=RUN_FILE, text=text))
    shards = {shard_slug(path): path for path, _, _ in record.input}
    ends: dict[str, int] = {}
    bad = 0  # units
    with ThreadPoolExecutor(CHECKERS) as pool:
        merged = _MergedFiles(fs, root, expected, pool)
        known.add(merged.index_path)
        for shard, manifest, findings in _checked(fs, root, sink, expected, merged):
            stopping.check()
            inspection.units += 1
            known.update(shard.used)
            known.update(file.path for file in manifest.files)
            alone = [file for file in manifest.files if not merged.holds(file, manifest.unit)]
            inspection.files += len(alone)
            inspection.bytes += sum(file.size for file in alone)
            inspection.loose += len(alone)
            inspection.done += manifest.counts.ok
            inspection.rejected += manifest.counts.rejected_rows
            inspection.failed += manifest.counts.failed
            for finding in findings:
                inspection.note(finding)
            done.add(manifest)
            merged.totals.add(manifest)
            if manifest.is_last:
                ends[manifest.shard] = manifest.stop
            if not findings:
                counted.add(manifest)
                continue
            bad += 1
            own = (manifest_path(manifest.unit, manifest.generation), *(file.path for file in manifest.files))
            broken.update(path for path in own if any(path in names for names in there.values()))
            if not SEEN_BY_EDIT & {finding.kind for finding in findings}:
                inspection.needs_repair = True
        _note_merged(inspection, merged, known)
    missing = {slug: text for slug in shards if (text := _uncommitted(done, slug))}
    for slug, text in missing.items():
        inspection.note(Finding(kind="missing unit", path=shards[slug], text=text))
    if inspection.loose and not missing and record.recipe["sink"].get("shard_size"):
        text = f"{inspection.loose} file(s) of units stand in {PARTS}/ and are not merged yet"
        inspection.note(Finding(kind="not merged", path="data", text=text))
    left = sorted(name for names in there.values() for name in names if name not in known)
    strays = [name for name in left if not is_temporary(name)]
    inspection.temporary = len(left) - len(strays)  # left to `shardedit edit`, which removes those that are old enough
    for name in strays:
        inspection.note(Finding(kind=STRAY, path=name, text=_about_stray(name)))
        inspection.needs_repair = True
        broken.add(name.rstrip("/"))
    if inspection.needs_repair:
        for number, text in (
            (bad, "take back {} damaged unit(s)"),
            (len(merged.damaged), "take back {} damaged merged file(s)"),
            (len(strays), "remove {} stray file(s)"),
        ):
            inspection.repairs += [text.format(number)] if number else []
        if repairing:  # what is in a folder goes before the folder
            take_back(counted, merged.damaged, sorted(broken, reverse=True), sink, repairing)
    if not inspection.edit_repairs:
        _note_derived(inspection, sink, record, merged.totals, baselines, repairing)
    return inspection, ends


def _about_stray(name: str) -> str:
    if name.endswith("/"):
        return "is a folder, where a file should be"
    if "/" not in name:
        return "is a file, where a folder should be"
    return _STRAYS.get(name.partition("/")[0], _NO_MANIFEST)


_NO_MANIFEST = "no manifest or index that counts lists it"
_STRAYS = {
    "_units": "is no manifest, or one that does not count",
    "_shards": "holds no manifest that counts, or none that is not elsewhere, too",
    BASELINES: "is no baseline, or one that a later driver's replaces",
}


def _note_derived(
    inspection: Inspection,
    sink: SinkConfig,
    record: RunRecord,
    totals: Totals,
    baselines: list[Baseline],
    repairing: Claim | None,
) -> None:
    """Summary and report of a run that is done, and in which nothing else is wrong."""
    fs, root = open_fs(sink.folder, sink.storage_options)
    latest = max((baseline.generation for baseline in baselines), default=0)
    budget = record.recipe["run"]["max_failed_fraction"]
    now = totals.summary(complete=True, units_now=0, max_failed_fraction=budget, generation=latest)
    kind, text = summary_problem(fs, root, now)
    if text:
        inspection.note(Finding(kind=kind, path=SUMMARY_FILE, text=text))
        inspection.repairs.append(f"write {SUMMARY_FILE}")
        if repairing:
            write_summary(replace(now, generation=repairing.generation), sink)
    if size_of(fs, f"{root}/{REPORT_FILE}") is None:
        inspection.note(Finding(kind="report", path=REPORT_FILE, text="is missing"))
        inspection.repairs.append(f"write {REPORT_FILE}")
        if repairing:
            from pipeline.looking.report.page import write_report  # which takes time to import

            write_report(sink)


def _note_source(inspection: Inspection, found: FromSource, ends: Mapping[str, int], is_needed: bool) -> None:
    """Add what the source's listing says of the run."""
    inspection.source_was_listed, inspection.source_unreachable = not found.unreachable, found.unreachable
    inspection.left_out = found.left_out
    if found.unreachable and is_needed:
        text = "cannot be listed: nothing tells whether it holds more than was edited. Without it: verify --no-source"
        inspection.note(Finding(kind="source", path="source.shards", text=text))
    for shard, problem in found.problems:
        inspection.note(Finding(kind="source", path=shard, text=f"{problem} since the run began"))
    for shard, rows in found.rows.items():
        if ends.get(shard, rows) != rows:
            text = f"has {rows} row(s), its units end after {ends[shard]}"
            inspection.note(Finding(kind="source", path=shard, text=text))


def _note_merged(inspection: Inspection, merged: _MergedFiles, known: set[str]) -> None:
    """Add what was found in merged files."""
    for slot, findings in merged.all_findings():
        known.add(slot.contents)
        if slot.file is not None:
            known.add(slot.file.path)
            inspection.files += 1
            inspection.bytes += slot.file.size
        for finding in findings:
            inspection.note(finding)
            inspection.needs_repair |= finding.kind not in SEEN_BY_EDIT


def _names(fs: FileSystem, root: str, folder: str) -> set[str]:
    """Files below a folder, as paths relative to the root."""
    if not fs.exists(f"{root}/{folder}"):
        return set()
    start = len(root.rstrip("/")) + 1
    names = {path[start:] for path in retrying()(fs.find, f"{root}/{folder}")}
    if is_local(fs):  # other stores have no folders
        for above, folders, _ in os.walk(f"{root}/{folder}"):
            names.update(f"{above}/{name}/"[start:] for name in folders if name.endswith((".json", ".parquet", ".tar")))
    return names


def _uncommitted(done: Committed, slug: str) -> str:
    """Which chunks of a shard are missing, in words; "" where none is."""
    if done.has_whole_shard(slug):
        return ""
    chunks = done.chunks.get(slug, 0)
    if not chunks:
        return "none of its units is committed"
    count = chunks.bit_length() - chunks.bit_count()
    gaps = list(islice((chunk for chunk in range(chunks.bit_length()) if not chunks >> chunk & 1), 10))
    named = ", ".join(map(str, gaps)) + (f" and {count - 10} more" if count > 10 else "")
    parts = [f"chunk {named} not committed"] if gaps else []
    if slug not in done.last:
        parts.append(f"nothing after chunk {chunks.bit_length() - 1} is committed")
    return "; ".join(parts)


class _MergedFiles:
    """Merged files, each read once: when the first of its units is checked, or at the end."""

    def __init__(self, fs: FileSystem, root: str, expected: Expected, pool: Executor) -> None:
        self._fs, self._root, self._expected, self._pool = fs, root, expected, pool
        self._merged = Merged(fs, root, trusted=False)
        self.totals = Totals(self._merged)  # of the units, whose files may be merged
        self._lock = Lock()
        self._findings: dict[str, list[Finding]] = {}  # by path of the contents; of every slot that was read
        self._rows: dict[str, dict[str, list[CheckedRow]] | None] = {}  # of the last few, by unit; None: unreadable
        self.damaged: set[str] = set()  # paths of contents

    @property
    def index_path(self) -> str:
        """Of the index that counts; "" where there is none."""
        return self._merged.path

    def holds(self, file: FileRecord, unit: str) -> bool:
        """Whether a merged file holds what a unit's manifest lists."""
        return self._merged.find(file, unit) is not None

    def rows(self, file: FileRecord, unit: str) -> list[CheckedRow] | None:
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
        """Note that a unit's rows are not those that it was asked for: the file that holds them is damaged."""
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
                    rows = checked_rows(slot.file.path, opened, self._expected, self._pool)
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
    fs: FileSystem, root: str, sink: SinkConfig, expected: Expected, merged: _MergedFiles
) -> Iterator[tuple[CommittedShard, Manifest, list[Finding]]]:
    shards = committed_shards(sink, trusted=False)
    pairs = ((shard, zip((None, *shard.manifests), shard.manifests, strict=False)) for shard in shards)
    units = ((shard, before, manifest) for shard, some in pairs for before, manifest in some)

    def check(unit: _Unit) -> list[Finding]:
        with OPENED.taken(sum(file.size for file in unit[2].files)):
            return _check_unit(fs, root, unit, expected, merged)

    with ThreadPoolExecutor(CHECKERS) as pool:
        while window := list(islice(units, CHECKERS)):
            found = pool.map(check, window)
            yield from ((shard, one, findings) for (shard, _, one), findings in zip(window, found, strict=True))


def _check_unit(fs: FileSystem, root: str, unit: _Unit, expected: Expected, merged: _MergedFiles) -> list[Finding]:
    shard, before, manifest = unit
    problems = [*manifest_problems(manifest, expected)]
    if before is not None and before.chunk == manifest.chunk - 1 and before.stop != manifest.start:
        problems.append(f"it begins with row {manifest.start}, the unit before it ends before row {before.stop}")
    if manifest.is_last and manifest.chunk != shard.manifests[-1].chunk:
        problems.append("it says that it is the last of its shard, and later ones are committed")
    stands = manifest_path(manifest.unit, manifest.generation)
    findings = [Finding(kind="manifest", path=stands, text=text) for text in problems]
    rows: list[CheckedRow] = []
    readable = True
    for file in manifest.files:
        if merged.holds(file, manifest.unit):
            some = merged.rows(file, manifest.unit)
            readable = readable and some is not None
            rows += some or []
            if some is not None and len(some) != file.rows:
                text = f"has {len(some)} row(s) of unit {manifest.unit}, which lists {file.rows}"
                findings.append(Finding(kind="rows", path=file.path, text=text))
            continue
        data, text = None, f"unit {manifest.unit} lists it"
        try:
            data = get(fs, f"{root}/{file.path}")
        except NotAFileError as error:
            text = str(error)
        if data is None:
            findings.append(Finding(kind="missing file", path=file.path, text=text))
            readable = False
            continue
        findings += _byte_problems(file, len(data), hashlib.sha256(data).hexdigest())
        try:
            found = checked_rows(file.path, io.BytesIO(data), expected)
            rows += found
            if len(found) != file.rows:
                text = f"has {len(found)} row(s), unit {manifest.unit} lists {file.rows}"
                findings.append(Finding(kind="rows", path=file.path, text=text))
        except BrokenError as error:
            findings.append(Finding(kind="does not open", path=file.path, text=str(error)))
            readable = False
    if readable and (problems := list(row_problems(manifest, rows, expected))):
        where = manifest.files[0].path if manifest.files else manifest_path(manifest.unit, manifest.generation)
        findings += [Finding(kind="rows", path=where, text=text) for text in problems]
        for file in manifest.files:
            if merged.holds(file, manifest.unit):
                merged.blame(file, manifest.unit)
    return findings


def _byte_problems(file: FileRecord, size: int, sha256: str) -> Iterator[Finding]:
    if size != file.size:
        yield Finding(kind="wrong size", path=file.path, text=f"has {size} bytes, {file.size} were written")
    elif sha256 != file.sha256:
        yield Finding(kind="changed bytes", path=file.path, text="its SHA-256 is not that of what was written")
