"""What a run has done so far: counted from what workers report as results finish, and from units as they are committed.

From it come the progress that is shown, the time that is left, and whether an error budget is spent.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pipeline.recipe import RunConfig
from pipeline.writing.commit import Committed
from pipeline.writing.gate_counts import added, seen_in_words
from pipeline.writing.manifest import GateCounts, Manifest, split_unit_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How large a run is, and what of it earlier runs of the command have committed."""

    rows: int | None  # of all shards; None where only reading can tell, as with tar
    bytes: int  # of all shards
    shards: int
    committed: Committed = field(default_factory=Committed)
    images: Counter[str] = field(default_factory=Counter)  # committed, by the slug of a shard that is not finished
    whole_shards: int = 0  # finished
    whole_images: int = 0  # of these
    whole_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A unit that a worker has in hand."""

    unit: str
    images: int = 0  # finished, in whatever way
    failed: int = 0  # results
    rows: int = 0  # of the whole unit
    bytes: int = 0  # about what they take of their shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A run at one moment: its committed units, and the images of those at work."""

    units: int = 0  # committed since the run was started, as are the next three
    images: int = 0  # finished, not all of them committed yet
    asked: int = 0  # results of committed units
    failed: int = 0  # results, not all of them committed yet
    images_before: int = 0  # committed by earlier runs of the command
    images_left: float | None = None  # estimated where the source does not tell; None: not even that
    shards: int = 0  # of which every unit is committed, by whichever run
    of_shards: int = 0
    estimated: bool = True  # whether `images_left` is
    stop_reason: str = ""  # why the run has to stop; "" as long as it may go on
    load_error: str = ""  # why a worker could not load its model; "" where every one could


class Tally:
    """Adds up units, in the order of their commits, and judges the error budgets.

    The share of failed results is judged once as many units are in as may fail in a row: one bad unit at the start says
    nothing about a dataset.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._extent = Extent(rows=None, bytes=0, shards=0)
        self._units = self._images = self._asked = self._failed = self._in_a_row = 0
        self._has_passed = False
        self._at_gates: dict[str, GateCounts] = {}  # of the units in a row without a result that passed
        self._images_before = 0
        self._living = 1
        self._stop_reason = self._load_error = ""
        self._in_flight: dict[str, InFlight] = {}
        self._sampled_rows = self._sampled_bytes = 0  # what units took of their shards
        self._lock = threading.Lock()

    def begin(self, extent: Extent) -> None:
        """Say how large the run is. Before the first unit."""
        with self._lock:
            self._extent = extent
            self._images_before = extent.whole_images + extent.images.total()

    def committed(self) -> Committed:
        """What is committed by now, by this run of the command or earlier ones."""
        with self._lock:
            committed = self._extent.committed
            return Committed(dict(committed.chunks), dict(committed.last))

    def advance(self, report: InFlight) -> None:
        """Note how far a unit is. Reports may be lost, or come again from the start when a worker has died."""
        with self._lock:
            if not self._extent.committed.has(report.unit):  # a report that was overtaken by the commit
                self._in_flight[report.unit] = report

    def add(self, manifest: Manifest) -> str:
        """Count a committed unit. Returns why the run has to stop, or ""."""
        with self._lock:
            if self._extent.committed.has(manifest.unit):  # written twice, after a node was lost
                return self._stop_reason
            if (report := self._in_flight.pop(manifest.unit, None)) is not None:
                self._sampled_rows += report.rows
                self._sampled_bytes += report.bytes
            self._count(manifest)
            self._stop_reason = self._stop_reason or self._judge()
            return self._stop_reason

    def _count(self, manifest: Manifest) -> None:
        counts = manifest.counts
        self._has_passed = self._has_passed or counts.ok > 0
        # Where anything has passed the gates, units that they reject altogether are bad luck, and no wrong bounds.
        hopeless = counts.asked > 0 and counts.ok == 0 and not (counts.rejected and self._has_passed)
        self._in_a_row = self._in_a_row + 1 if hopeless else 0
        self._at_gates = added(self._at_gates, counts.gates) if hopeless else {}
        self._units += 1
        self._images += counts.images
        self._asked += counts.asked
        self._failed += counts.failed
        self._count_shard(manifest)

    def _count_shard(self, manifest: Manifest) -> None:
        extent, (slug, _) = self._extent, split_unit_id(manifest.unit)
        extent.committed.add(manifest)
        extent.images[slug] += manifest.counts.images
        if extent.committed.has_whole_shard(slug):
            self._extent = replace(
                extent,
                whole_shards=extent.whole_shards + 1,
                whole_images=extent.whole_images + extent.images.pop(slug),
                whole_bytes=extent.whole_bytes + manifest.shard_size,
            )

    def resize(self, workers: int) -> None:
        """Note how many workers live."""
        with self._lock:
            self._living = workers

    def workers(self) -> int:
        """How many workers share the run at the moment; at least 1."""
        with self._lock:
            return max(1, self._living)

    def cannot_load(self, why: str) -> None:
        """Note that a worker could not load its model: Ray passes on only text of an actor that fails to start."""
        with self._lock:
            self._load_error = self._load_error or why

    def stop(self, reason: str) -> None:
        """Let the next commit end the run."""
        with self._lock:
            self._stop_reason = self._stop_reason or reason

    def _judge(self) -> str:
        run = self._run
        if self._in_a_row >= run.max_consecutive_failed_units:
            if text := rejecting_everything(self._at_gates, self._in_a_row):
                return text
            return (
                f"{self._in_a_row} units in a row have no result at all. Look at stage and message in quarantine/; "
                "run.max_consecutive_failed_units sets how many may"
            )
        if self._units >= run.max_consecutive_failed_units and self._failed > run.max_failed_fraction * self._asked:
            return over_budget(run, self._asked, self._failed)
        return ""

    def seen(self) -> Seen:
        """The counts so far."""
        with self._lock:
            at_work = self._in_flight.values()
            return Seen(
                units=self._units,
                images=self._images + sum(report.images for report in at_work),
                asked=self._asked,
                failed=self._failed + sum(report.failed for report in at_work),
                images_before=self._images_before,
                images_left=self._images_left(),
                estimated=self._extent.rows is None,
                shards=self._extent.whole_shards,
                of_shards=self._extent.shards,
                stop_reason=self._stop_reason,
                load_error=self._load_error,
            )

    def _images_left(self) -> float | None:
        extent = self._extent
        at_work = sum(report.images for report in self._in_flight.values())
        begun = extent.images.total() + at_work
        if extent.rows is not None:
            return max(0.0, extent.rows - extent.whole_images - begun)
        # A tar tells its rows only in the end: those that are left are taken to be as large as those that were seen.
        if extent.whole_bytes:
            density = extent.whole_images / extent.whole_bytes
        else:
            taken = self._sampled_bytes + sum(report.bytes for report in self._in_flight.values())
            if not taken:
                return None
            density = (self._sampled_rows + sum(report.rows for report in self._in_flight.values())) / taken
        return max(0.0, density * (extent.bytes - extent.whole_bytes) - begun)


def rejecting_everything(gates: Mapping[str, GateCounts], units: int) -> str:
    """Why gates that let nothing pass are an error, with what they saw; "" where they rejected nothing."""
    lines = [
        f"  {name} rejected {gate.rejected} ({gate.alone} alone); seen {seen_in_words(gate)}"
        for name, gate in sorted(gates.items(), key=lambda item: -item[1].rejected)
        if gate.rejected
    ]
    if not lines:
        return ""
    head = f"the gates let no result of the first {units} units pass:"
    foot = "Loosen bounds in the recipe's gates, turn one off with null, or look at the pictures in report.html"
    return "\n".join([head, *lines, foot])


def over_budget(run: RunConfig, asked: int, failed: int) -> str:
    """Why too large a share of failed results is an error."""
    return (
        f"{failed} of {asked} results failed, more than run.max_failed_fraction {run.max_failed_fraction:g}. "
        "Look at stage and message in quarantine/, and raise the fraction if that is as it should be"
    )
