"""The campaign: which cases there are, which are done, one process for each of the next ones, and the sums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import select
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pipeline
from benchmarks.faults import filesystems
from benchmarks.faults.cluster import Cluster, kept_cluster
from benchmarks.faults.kinds import KINDS as KINDS_OF_PROCESSES
from benchmarks.faults.kinds import Kind, Played
from benchmarks.faults.on_ray import RAY_KINDS
from benchmarks.faults.stage import DAMAGED, INPUTS, Calm, Stage, aside, calm_edit, calm_runs
from benchmarks.faults.stores import NAMES, ON_RAY, Store, stores
from tests.runs import write_shards

KINDS = (*KINDS_OF_PROCESSES, *RAY_KINDS)
LONGEST_S = 900.0  # that a case may take; it is then ended, and counted as one that hangs
LOG_KEPT = 6000  # characters of drivers' logs, of cases that went wrong


@dataclass(frozen=True)
class Case:
    """One of the campaign."""

    kind: Kind
    number: int
    what: dict[str, Any]

    @property
    def on_ray(self) -> bool:
        """Whether it needs a cluster."""
        return self.kind.store.startswith(ON_RAY)

    @property
    def id(self) -> str:
        """The same in every part of a campaign."""
        return f"{self.kind.name} | {self.kind.store} | {self.number} | {json.dumps(self.what, sort_keys=True)}"


def code_under_test() -> str:
    """A hash of the package: what was found of another one does not count for this one."""
    root = Path(pipeline.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".j2", ".css", ".js"))
    hashed = hashlib.sha256()
    for path in files:
        hashed.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()[:12]


class Results:
    """What came of every case that was played, one line each, kept over parts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "cases.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.done = {row["id"] for row in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        """Keep one."""
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self.done.add(row["id"])


def plan(kinds: Sequence[Kind], calm: dict[str, Calm], seed: int, share: float) -> list[Case]:
    """All cases, kinds in turn, so that a part of a campaign has some of each.

    Args:
        kinds: which.
        calm: by store.
        seed: of what is drawn.
        share: of each kind's cases.
    """
    by_kind: list[list[tuple[float, Case]]] = []
    for kind in kinds:
        rng = random.Random(f"{seed} {kind.name} {kind.store}")
        cases = [Case(kind, number, what) for number, what in enumerate(kind.cases(calm[kind.store], rng))]
        wanted = max(1, round(len(cases) * share)) if cases else 0
        order = rng.sample(cases, wanted)
        by_kind.append([((at + rng.random()) / len(order), case) for at, case in enumerate(order)])
    return [case for _, case in sorted((one for some in by_kind for one in some), key=lambda one: one[0])]


@dataclass
class _Running:
    """A case at work in a process group of its own."""

    case: Case
    pid: int
    reads: int
    begun: float = field(default_factory=time.monotonic)
    data: bytes = b""


class Campaign:
    """Plays cases, some side by side.

    Args:
        work: for everything that runs write; removed by whoever made it.
        results: where what came of them goes.
        at_once: cases side by side.
        cluster: for those that need one.
    """

    def __init__(self, work: Path, results: Results, at_once: int, cluster: Cluster | None = None) -> None:
        self._work, self._results, self._at_once, self._cluster = work, results, at_once, cluster
        self._running: dict[int, _Running] = {}

    def play(self, cases: Sequence[Case], made: dict[str, Store], calm: dict[str, Calm], until: float) -> None:
        """Play those that are not done yet, until a moment of `time.monotonic`."""
        try:
            self._play(cases, made, calm, until)
        finally:  # Ctrl-C, or an error of ours
            for one in self._running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one.pid, signal.SIGKILL)

    def _play(self, cases: Sequence[Case], made: dict[str, Store], calm: dict[str, Calm], until: float) -> None:
        left = iter([case for case in cases if case.id not in self._results.done])
        following = next(left, None)
        while following is not None or self._running:
            while following is not None and len(self._running) < self._at_once and time.monotonic() < until:
                self._begin(following, made[following.kind.store], calm[following.kind.store])
                following = next(left, None)
            if not self._running:
                return
            ready, _, _ = select.select(list(self._running), [], [], 1.0)
            for reads in ready:
                if data := os.read(reads, 1 << 20):
                    self._running[reads].data += data
                else:
                    self._end(self._running.pop(reads))
            for one in [one for one in self._running.values() if time.monotonic() > one.begun + LONGEST_S]:
                del self._running[one.reads]
                self._end(one)

    def _begin(self, case: Case, store: Store, calm: Calm) -> None:
        reads, writes = os.pipe()
        name = f"{case.kind.name.replace(' ', '-').replace(':', '').replace(',', '')}-{case.number}"
        stage = Stage(name, store, self._work / folder_of(store.name), calm, self._cluster)
        pid = os.fork()
        if pid == 0:
            os.close(reads)
            os.setsid()
            _play(case, stage, writes)
        os.close(writes)
        self._running[reads] = _Running(case, pid, reads)

    def _end(self, one: _Running) -> None:
        os.close(one.reads)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)  # drivers that hang are of its group
        os.waitpid(one.pid, 0)
        if one.data:
            played: dict[str, Any] = pickle.loads(one.data)
        else:
            played = {"faults": 1, "complaints": ["the case hung"], "hung": True}
        seconds = round(time.monotonic() - one.begun, 2)
        kind = one.case.kind
        row = {"id": one.case.id, "kind": kind.name, "store": kind.store, "what": one.case.what, "seconds": seconds}
        self._results.add({**row, **played})


def _play(case: Case, stage: Stage, writes: int) -> None:
    """In the case's process: never returns."""
    try:
        row = as_row(case.kind.play(stage, case.what))
    except BaseException as error:
        import traceback

        row = {"faults": 0, "complaints": [f"the bench failed: {error}"], "logs": [traceback.format_exc()]}
    try:
        stage.end()
    finally:
        with os.fdopen(writes, "wb") as pipe:
            pickle.dump(row, pipe)
        os._exit(0)


def as_row(played: Played) -> dict[str, Any]:
    """For a line of the results."""
    verdicts = played.verdicts
    row: dict[str, Any] = {
        "faults": played.faults,
        "codes": played.codes,
        "complaints": played.complaints,
        "lost": sum(verdict.lost for verdict in verdicts),
        "doubled": sum(verdict.doubled for verdict in verdicts),
        "contradictions": [text for verdict in verdicts for text in verdict.contradictions],
        "healthy_quarantined": sum(verdict.healthy_quarantined for verdict in verdicts),
        "bytes_equal": all(verdict.bytes_equal for verdict in verdicts),
        "differing": [name for verdict in verdicts for name in verdict.differing],
        "noise": sum(verdict.noise for verdict in verdicts),
    }
    if played.complaints or not all(verdict.whole for verdict in verdicts):
        row["logs"] = [log[-LOG_KEPT:] for log in played.logs]
    return row


def run_part(
    work: Path, results: Results, *, kinds: Sequence[Kind], seed: int, share: float, until: float, at_once: int
) -> list[str]:
    """Play a part of the campaign; returns lines on what this machine does not allow."""
    for name, (shards, rows) in INPUTS.items():
        write_shards(work / "inputs" / name, shards=shards, rows=rows, damaged=DAMAGED)
    notes = []
    if not filesystems.possible():
        left = [kind.name for kind in kinds if kind.name.endswith("a real one")]
        kinds = [kind for kind in kinds if kind.name not in left]
        notes = [f"left out, since this machine mounts nothing for us: {', '.join(left)}"] if left else []
    names = dict.fromkeys(kind.store for kind in kinds)
    with stores(names, work, work / "inputs", aside) as made:
        calm = {}
        for name, store in made.items():
            calm[name] = aside(calm_runs if name in NAMES else calm_edit, store, work / folder_of(name))
        cases = plan(kinds, calm, seed, share)
        Campaign(work, results, at_once).play([case for case in cases if not case.on_ray], made, calm, until)
        left = [case for case in cases if case.on_ray and case.id not in results.done]
        if left and time.monotonic() < until:
            with kept_cluster(work) as cluster:
                Campaign(work, results, 1, cluster).play(left, made, calm, until)
    return notes


def folder_of(store: str) -> str:
    """Name of the folder of what is noted of runs on a store."""
    return store.replace(" ", "-").replace(",", "")


def chosen(text: str) -> list[Kind]:
    """The kinds whose name or store holds a text."""
    return [kind for kind in KINDS if text in f"{kind.name} on {kind.store}"]


FIGURES = ("faults", "lost", "doubled", "contradictions", "healthy_quarantined", "bytes_equal", "disorderly", "cases")


def sums(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of some cases together. `disorderly` are cases with a driver that did not end as it should."""
    contradictions = Counter(text.partition(":")[0] for row in rows for text in row.get("contradictions", ()))
    return {
        "faults": sum(row["faults"] for row in rows),
        "lost": sum(row.get("lost", 0) for row in rows),
        "doubled": sum(row.get("doubled", 0) for row in rows),
        "contradictions": contradictions.total(),
        "healthy_quarantined": sum(row.get("healthy_quarantined", 0) for row in rows),
        "bytes_equal": all(row.get("bytes_equal", False) for row in rows),
        "disorderly": sum(bool(row["complaints"]) for row in rows),
        "cases": len(rows),
    }


def by_kind(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows of each kind, in the order of `KINDS`."""
    names = {f"{row['kind']} on {row['store']}": [] for row in rows}
    for row in rows:
        names[f"{row['kind']} on {row['store']}"].append(row)
    order = {f"{kind.name} on {kind.store}": at for at, kind in enumerate(KINDS)}
    yield from sorted(names.items(), key=lambda item: order.get(item[0], len(order)))
