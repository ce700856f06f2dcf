"""The end of a run in numbers, computed from the manifests alone: what is not committed does not count."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Literal

from pipeline.reading.shards import Shard, shard_slug
from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.remote.pictures import Spent
from pipeline.remote.pictures import added as spent_by_both
from pipeline.writing.commit import Committed
from pipeline.writing.files import put
from pipeline.writing.gate_counts import added
from pipeline.writing.manifest import FileRecord, GateCounts, Manifest
from pipeline.writing.merged import Merged

SUMMARY_FILE = "summary.json"
RunOutcome = Literal[
    "complete", "complete with failures", "over the error budget", "stopped early", "partition complete"
]
EXIT_CODES: dict[RunOutcome, int] = {
    "complete": 0,
    "complete with failures": 0,  # within the budget: schedulers call a job with any other code a failed one
    "over the error budget": 1,
    "stopped early": 1,
    "partition complete": 0,  # of a command that works on a part of a run; never in summary.json
}
STRICT_EXIT_CODE = 3  # where there are failures within the budget, and the caller asked for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All of a run's committed units together, whichever run of the command made them.

    Results are counted per (image, edit, method). Where the run was stopped early, `complete` is false and `planned`
    counts what the committed units were asked for.
    """

    planned: int  # results asked for
    done: int  # results in data/
    failed: int  # results in quarantine/
    complete: bool  # every unit of every shard is committed
    units: int
    units_now: int  # of these, committed by this run of the command
    images: int
    rows: int  # in data/; what `done` counts
    images_per_second: float  # of all workers together, while they worked
    seconds: float  # workers' time, over the number of workers
    worker_seconds: float
    busy_seconds: float  # of these, in which the models had calls to work on
    network_rows: int
    output_bytes: int  # of data, rejected and quarantine
    failed_by_stage: dict[str, int]
    failed_by_class: dict[str, int]
    outcome: RunOutcome
    exit_code: int  # of the command
    generation: int  # of the driver that added it up; an earlier driver's summary is stale
    rejected: int = 0  # results of which no row passed the gates; they stand in rejected/
    rejected_rows: int = 0  # in rejected/
    gates: dict[str, GateCounts] = field(default_factory=dict)  # rows at each gate; quartiles are means over units
    spent: dict[str, Spent] = field(default_factory=dict)  # what servers took, by method; empty: none was asked


def summarise(
    manifests: Iterable[Manifest],
    shards: Iterable[Shard],
    *,
    units_now: int,
    max_failed_fraction: float,
    generation: int = 0,
    strict: bool = False,
    merged: Merged | None = None,
) -> Summary:
    """Add manifests up.

    Args:
        manifests: of all committed units; drawn once, none is kept.
        shards: the input. The run is complete where each has all of its units committed.
        units_now: units that this run of the command has committed.
        max_failed_fraction: of all results asked for; more is over the error budget.
        generation: of the driver.
        strict: any failed result gives another exit code than 0.
        merged: where the units' files are instead, for the bytes that they take.
    """
    committed, totals = Committed(), Totals(merged)
    for manifest in manifests:
        committed.add(manifest)
        totals.add(manifest)
    complete = all(committed.has_whole_shard(shard_slug(shard.path)) for shard in shards)
    return totals.summary(
        complete=complete,
        units_now=units_now,
        max_failed_fraction=max_failed_fraction,
        generation=generation,
        strict=strict,
    )


class Totals:
    """Sums over manifests; none is kept.

    Args:
        merged: where the units' files are instead, for the bytes that they take.
    """

    def __init__(self, merged: Merged | None = None) -> None:
        self._merged = merged
        self._sums: Counter[str] = Counter()
        self._stages: Counter[str] = Counter()
        self._classes: Counter[str] = Counter()
        self._gates: dict[str, GateCounts] = {}
        self._spent: dict[str, Spent] = {}
        self._seconds = self._worker_seconds = self._busy_seconds = 0.0

    @property
    def asked(self) -> int:
        """Results asked for."""
        return self._sums["asked"]

    def add(self, manifest: Manifest) -> None:
        """Add a unit."""
        counts, measured = manifest.counts, manifest.measured
        self._sums.update(
            units=1,
            images=counts.images,
            asked=counts.asked,
            ok=counts.ok,
            failed=counts.failed,
            rejected=counts.rejected,
            rejected_rows=counts.rejected_rows,
            network_rows=measured.network_rows,
            bytes=sum(file.size for file in manifest.files if not self._is_merged(file, manifest.unit)),
        )
        self._stages.update(counts.failed_by_stage)
        self._classes.update(counts.failed_by_class)
        self._gates = added(self._gates, counts.gates)
        self._spent = spent_by_both(self._spent, counts.spent)
        self._worker_seconds += measured.worker_seconds
        self._busy_seconds += measured.busy_seconds
        self._seconds += measured.worker_seconds / measured.workers

    def _is_merged(self, file: FileRecord, unit: str) -> bool:
        return self._merged is not None and self._merged.find(file, unit) is not None

    def summary(
        self,
        *,
        complete: bool,
        units_now: int,
        max_failed_fraction: float,
        generation: int = 0,
        strict: bool = False,
        part_complete: bool = False,
    ) -> Summary:
        """What was added, as a summary. `part_complete`: the shards that are left are those of other partitions."""
        sums, seconds = self._sums, self._seconds
        outcome: RunOutcome = "complete with failures" if sums["failed"] else "complete"
        if sums["failed"] > max_failed_fraction * sums["asked"]:
            outcome = "over the error budget"
        if not complete:
            outcome = "partition complete" if part_complete else "stopped early"
        failed = outcome in ("complete with failures", "partition complete") and sums["failed"] > 0
        return Summary(
            planned=sums["asked"],
            done=sums["ok"],
            failed=sums["failed"],
            rejected=sums["rejected"],
            rejected_rows=sums["rejected_rows"],
            gates=dict(sorted(self._gates.items())),
            spent=self._spent,
            complete=complete,
            units=sums["units"],
            units_now=units_now,
            images=sums["images"],
            rows=sums["ok"],
            images_per_second=round(sums["images"] / seconds, 4) if seconds else 0.0,
            seconds=round(seconds, 3),
            worker_seconds=round(self._worker_seconds, 3),
            busy_seconds=round(self._busy_seconds, 3),
            network_rows=sums["network_rows"],
            output_bytes=sums["bytes"] + (self._merged.size if self._merged else 0),
            failed_by_stage=dict(sorted(self._stages.items())),
            failed_by_class=dict(sorted(self._classes.items())),
            outcome=outcome,
            exit_code=STRICT_EXIT_CODE if strict and failed else EXIT_CODES[outcome],
            generation=generation,
        )


def write_summary(summary: Summary, sink: SinkConfig) -> None:
    """Write summary.json."""
    fs, root = open_fs(sink.folder, sink.storage_options)
    put(fs, f"{root}/{SUMMARY_FILE}", (json.dumps(asdict(summary), indent=1) + "\n").encode())
