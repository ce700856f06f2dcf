"""What `shardedit verify` found wrong with a run, and what can be done about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

MAX_FINDINGS = 1000  # kept; all are counted and repaired
SEEN_BY_EDIT = {"missing unit", "missing file", "wrong size", "not merged"}  # what `shardedit edit` does again unasked
NOT_OF_OUTPUT = {"source", "run record"}  # what neither `edit` nor a repair can put right
STRAY = "stray file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    # missing unit, missing file, wrong size, changed bytes, does not open, rows, manifest, not merged, stray file,
    # summary, report, run record, source
    kind: str
    path: str  # relative to the run's folder; of a missing unit and the source, a shard
    text: str


@dataclass(slots=True, kw_only=True)
class Inspection:
    """What was looked at and found."""

    units: int = 0
    files: int = 0
    bytes: int = 0
    done: int = 0  # rows in data/
    rejected: int = 0  # rows in rejected/
    failed: int = 0  # rows in quarantine/
    loose: int = 0  # files of units that are not merged
    temporary: int = 0  # files of writes that a kill cut: no findings, since nothing reads them
    wrong: int = 0  # findings in all
    by_kind: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)  # the first `MAX_FINDINGS`
    needs_repair: bool = False  # another run alone would not put it right
    repairs: list[str] = field(default_factory=list)  # what `--repair` does, in words
    repaired: bool = False  # and has done
    source_was_listed: bool = False
    source_unreachable: str = ""  # why it could not be
    left_out: str = ""  # what the source holds beside its shards

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    @property
    def edit_repairs(self) -> bool:
        """Whether `shardedit edit` has something to put right."""
        return bool(self.by_kind.keys() - NOT_OF_OUTPUT)

    def note(self, finding: Finding) -> None:
        """Count a finding."""
        self.wrong += 1
        self.by_kind[finding.kind] = self.by_kind.get(finding.kind, 0) + 1
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"clean": self.clean, **asdict(self)}
