"""What stands in a run's folder, against what an undisturbed run has left."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.looking.runs import find_run
from pipeline.looking.verify import verify
from pipeline.recipe import SinkConfig
from tests.runs import contents

KINDS = ("data", "quarantine")
Result = tuple[str, str, str]  # (id, edit, method)


@dataclass(frozen=True)
class State:
    """A run's folder."""

    files: dict[str, str]  # SHA-256 by path, of what must be equal in every run
    rows: dict[str, dict[Result, str]]  # by kind: a hash of everything that a row holds
    results: Counter[Result]  # over both kinds


@dataclass
class Verdict:
    """A folder against what it should be."""

    lost: int = 0
    doubled: int = 0
    contradictions: list[str] = field(default_factory=list)
    healthy_quarantined: int = 0
    bytes_equal: bool = True
    differing: list[str] = field(default_factory=list)
    noise: int = 0  # strays that `verify` names: what a zombie has left counts for nothing
    temporary: int = 0

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        wrong = self.lost or self.doubled or self.contradictions or self.healthy_quarantined
        return not wrong and self.bytes_equal

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def look(folder: Path) -> State:
    """Read a run's folder."""
    files = {}
    for name, what in contents(folder).items():
        data = what if isinstance(what, bytes) else json.dumps(what, sort_keys=True).encode()
        files[name] = hashlib.sha256(data).hexdigest()
    rows: dict[str, dict[Result, str]] = {kind: {} for kind in KINDS}
    results: Counter[Result] = Counter()
    for kind in KINDS:
        for path in sorted((folder / kind).glob("*.parquet")):  # what a reader of datasets finds
            for row in pq.read_table(path).to_pylist():
                result = (row["id"], row["edit"], row["method"])
                results[result] += 1
                rows[kind][result] = hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()
    return State(files, rows, results)


def judge(folder: Path, calm: State, *, by_rows: bool = False, noise: bool = False) -> Verdict:
    """Compare a folder with a calm run's.

    Args:
        folder: the run's, on this machine.
        calm: what it should be.
        by_rows: rows are to be equal, in whichever files: where units were done again, files begin as they first did.
        noise: strays are none of a contradiction: a zombie has just left them, and no run came after it.
    """
    state = look(folder)
    verdict = Verdict(
        lost=sum((calm.results - state.results).values()), doubled=sum((state.results - calm.results).values())
    )
    verdict.healthy_quarantined = len(state.rows["quarantine"].keys() - calm.rows["quarantine"].keys())
    names = {*calm.files, *state.files}
    differing = sorted(name for name in names if calm.files.get(name) != state.files.get(name))
    verdict.bytes_equal = calm.rows == state.rows if by_rows or noise else not differing
    verdict.differing = [] if verdict.bytes_equal else differing[:20]
    found = verify(SinkConfig(folder=str(folder)), find_run(str(folder)).record)
    verdict.temporary = found.temporary
    for finding in found.findings:
        if noise and finding.kind == "stray file":
            verdict.noise += 1
        else:
            verdict.contradictions.append(f"{finding.kind}: {finding.path}: {finding.text}")
    if not any(finding.path == "summary.json" for finding in found.findings):  # said already, above
        verdict.contradictions += _against_summary(folder, state)
    return verdict


def _against_summary(folder: Path, state: State) -> list[str]:
    """What summary.json says and the rows do not."""
    path = folder / "summary.json"
    if not path.exists():
        return ["summary: there is none"]
    summary = json.loads(path.read_text())
    says = {"done": len(state.rows["data"]), "failed": len(state.rows["quarantine"]), "complete": True}
    return [f"summary: {name} is {summary[name]}, not {is_}" for name, is_ in says.items() if summary[name] != is_]
