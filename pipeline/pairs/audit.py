"""`shardedit audit FOLDER`: every pair of a set is read and looked at; findings become rows, counts and a page.

tasks      the folder's rows, some at a time, here or on Ray
seen       what is kept of a pair; shard by shard, since neighbours tell what slipped
findings   of rows, of shards, of the whole
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common import stopping
from pipeline.pairs.audit_page import Example, page_of
from pipeline.pairs.checks import Look
from pipeline.pairs.layouts import PairLayout
from pipeline.pairs.reading import PairSet, PairTask, count_pairs, open_pairs, pairs_of
from pipeline.pairs.records import SEVERITIES, Finding, Pair, Seen
from pipeline.pairs.whole import Whole, whole
from pipeline.reading.decoder import Decoder
from pipeline.reading.storage import open_fs
from pipeline.settings.sections import RunConfig, WorkerRange
from pipeline.writing.files import put

Engine = Literal["auto", "local", "ray"]
MOST_WORKERS = 4096  # on Ray, one per CPU
EXAMPLES = 6  # of each finding, on the page
ROWS_PER_FILE = 100_000
NAMED = 20  # orphans
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("index", pa.int64()),
        ("finding", pa.string()),
        ("severity", pa.string()),
        ("detail", pa.string()),
        *(
            (f"align_{name}", pa.float64())
            for name in ("dx", "dy", "sx", "sy", "rotation", "corner_px", "error_px", "correlation")
        ),
        ("align_verdict", pa.string()),
        *((name, pa.float64()) for name in ("mask_share", "change_inside", "change_outside", "change_missed")),
    ]
)
"""A row per finding; a pair without any has one row with an empty finding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """What to look at, and how."""

    url: str
    out: str = "audit"
    layout: PairLayout | None = None  # None: told from the names of columns
    sample: int | None = None  # pairs to look at, about; None: all
    engine: Engine = "auto"
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was found."""

    layout: str
    rows: int  # looked at
    whole: int  # of the set
    pictures: int  # decoded
    findings: tuple[Finding, ...]
    verdicts: Mapping[str, int]  # of the alignment
    alignment: Mapping[str, float] | None  # middle shift and scale

    @property
    def counts(self) -> dict[str, int]:
        """Findings by kind, the worst kind first."""
        counts = Counter(one.finding for one in self.findings)
        return {kind: counts[kind] for kind in SEVERITIES if counts[kind]}

    @property
    def failed(self) -> int:
        """Pairs and shards with an error."""
        return len({(one.shard, one.index) for one in self.findings if one.severity == "error"})

    @property
    def exit_code(self) -> int:
        """3 where there is an error."""
        return 3 if self.failed else 0

    def as_dict(self) -> dict[str, Any]:
        """As `audit.json`; no time, so that a second look gives the same bytes."""
        return {
            "layout": self.layout,
            "rows": self.rows,
            "rows_of_the_set": self.whole,
            "rows_with_errors": self.failed,
            "findings": {
                kind: {
                    "severity": worst(one.severity for one in self.findings if one.finding == kind),
                    "count": count,
                    "share": count / max(1, self.rows),
                    "interval": wilson(count, self.rows) if self.rows < self.whole else None,
                }
                for kind, count in self.counts.items()
            },
            "shards": [asdict(one) for one in self.findings if one.finding == "off_by_one"],
            "alignment": {"verdicts": dict(self.verdicts), "middle": self.alignment},
        }


def audit(config: AuditConfig, say: Callable[[str], None] = lambda _: None) -> Audit:
    """Look at a set and write `rows-*.parquet`, `audit.json` and `index.html`.

    Raises:
        SourceError: the set cannot be read, or its layout is unknown.
        SinkError: nothing can be written.
        ClusterError, Stopped: as `driver.run`.
    """
    pairs = open_pairs(config.url, config.layout, config.storage_options)
    count = count_pairs(pairs)
    share = 1.0 if config.sample is None or config.sample >= count else config.sample / max(1, count)
    fs, root = open_fs(config.out, config.storage_options)
    say(f"{config.url}: layout {pairs.layout.name}, {count:,} rows in {len(pairs.tasks):,} tasks")
    together, rows, verdicts, pictures = Whole(), _Rows(fs, root), Counter[str](), 0
    found: list[Finding] = []
    seen_rows = 0
    for number, shard in enumerate(_by_shard(_looked(pairs, share, config.engine)), 1):
        together.add(shard)
        for pair in shard:
            some = [_finding(pair, kind, detail) for kind, detail in pair.findings]
            found += some
            rows.add(pair, some)
            seen_rows += not pair.part
            pictures += bool(pair.source_thumb) + bool(pair.edited_thumb)
            if verdict := pair.figures.get("align_verdict"):
                verdicts[str(verdict)] += 1
        say(f"looked at shard {number}: {seen_rows:,} rows")
    late = [*together.findings(), *_orphans(pairs)]
    rows.add_late(late)
    result = Audit(
        layout=pairs.layout.name,
        rows=seen_rows,
        whole=count,
        pictures=pictures,
        findings=(*found, *late),
        verdicts=dict(sorted(verdicts.items())),
        alignment=together.alignment(),
    )
    rows.close()
    examples = list(_examples(pairs, result.findings))
    put(fs, f"{root}/index.html", page_of(result, config.url, examples).encode())
    put(fs, f"{root}/audit.json", json.dumps(result.as_dict(), indent=1, ensure_ascii=False).encode())
    return result


class Auditing:
    """Looks at a task's pairs: built once per worker."""

    def __init__(self, pairs: PairSet, share: float) -> None:
        self._pairs = replace(pairs, tasks=(), orphans=())
        self._share = share
        self._look = Look(Decoder(pairs.source))

    def __call__(self, task: PairTask) -> tuple[PairTask, list[Seen]]:
        """What is kept of them, in their order."""
        return task, [self._look(pair) for pair in pairs_of(self._pairs, task) if is_sampled(pair, self._share)]


def is_sampled(pair: Pair, share: float) -> bool:
    """Whether a pair is looked at, by its place alone: the same in every run."""
    if share >= 1:
        return True
    digest = hashlib.blake2b(f"{pair.shard}\0{pair.index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _looked(pairs: PairSet, share: float, engine: Engine) -> Iterator[tuple[PairTask, list[Seen]]]:
    make = partial(Auditing, pairs, share)
    if engine == "ray" or (engine == "auto" and os.environ.get("RAY_ADDRESS")):
        from pipeline.running.on_ray.spreading import spread

        everywhere = RunConfig(gpus_per_worker=0, workers=WorkerRange(min=1, max=MOST_WORKERS))
        yield from spread(make, pairs.tasks, everywhere)
        return
    auditing = make()
    for task in pairs.tasks:
        stopping.check()
        yield auditing(task)


def _by_shard(done: Iterable[tuple[PairTask, list[Seen]]]) -> Iterator[list[Seen]]:
    """Whole shards, in the order in which they become complete, each with its rows in order."""
    waiting: dict[str, dict[int, list[Seen]]] = {}
    for task, seen in done:
        parts = waiting.setdefault(task.shard, {})
        parts[task.number] = seen
        if len(parts) == task.of:
            del waiting[task.shard]
            yield [pair for number in range(task.of) for pair in parts[number]]


def _finding(pair: Seen, kind: str, detail: str) -> Finding:
    severity = SEVERITIES[kind]
    if kind == "size_differs" and pair.figures.get("align_corner_px") is not None:
        severity = "warning"
    name = f"{pair.id} ({pair.part})" if pair.part else pair.id
    return Finding(id=name, shard=pair.shard, index=pair.index, finding=kind, detail=detail, severity=severity)


def _orphans(pairs: PairSet) -> Iterator[Finding]:
    if pairs.orphans:
        shown = ", ".join(pairs.orphans[:NAMED]) + (" ..." if len(pairs.orphans) > NAMED else "")
        yield whole("orphan", f"{len(pairs.orphans)} picture(s) that no row names: {shown}")


class _Rows:
    """`rows-*.parquet`, written as rows come."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs, self._root = fs, root
        self._held: list[dict[str, Any]] = []
        self._files = 0

    def add(self, pair: Seen, findings: Sequence[Finding]) -> None:
        figures = {name: pair.figures.get(name) for name in SCHEMA.names if name in pair.figures}
        for one in findings or [Finding(id=pair.id, shard=pair.shard, index=pair.index, finding="", severity="note")]:
            self._held.append({**_row(one), **figures})
        self._flush(ROWS_PER_FILE)

    def add_late(self, findings: Sequence[Finding]) -> None:
        self._held += [_row(one) for one in findings]

    def close(self) -> None:
        self._flush(0)
        if not self._files:
            self._write([])

    def _flush(self, most: int) -> None:
        while len(self._held) > most:
            self._write(self._held[:ROWS_PER_FILE])
            del self._held[:ROWS_PER_FILE]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, compression="zstd")
        put(self._fs, f"{self._root}/rows-{self._files:05d}.parquet", buffer.getvalue())
        self._files += 1


def _row(one: Finding) -> dict[str, Any]:
    return {
        "key": one.id,
        "shard": one.shard,
        "index": one.index,
        "finding": one.finding,
        "severity": one.severity if one.finding else "",
        "detail": one.detail,
    }


def _examples(pairs: PairSet, findings: Sequence[Finding]) -> Iterator[Example]:
    """Some pairs of each finding, read once more for their pictures."""
    taken: Counter[str] = Counter()
    wanted: dict[tuple[str, int], list[Finding]] = {}
    for one in findings:
        if one.index >= 0 and taken[one.finding] < EXAMPLES:
            taken[one.finding] += 1
            wanted.setdefault((one.shard, one.index), []).append(one)
    for task in pairs.tasks:
        if not any(shard == task.shard for shard, _ in wanted):
            continue
        for pair in pairs_of(pairs, task):
            for one in wanted.get((pair.shard, pair.index), []) if not pair.part else []:
                yield Example(one, pair)


def worst(severities: Iterable[str]) -> str:
    """The worst of some."""
    return min(severities, key=("error", "warning", "note").index)


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    middle = (count + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(count * (n - count) / n + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)
