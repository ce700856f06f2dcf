"""How far a run is, and whether its error budget is spent: counted from what units report as they are committed.

A bar on a terminal, elsewhere one line every 30 seconds.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.recipe import RunConfig
from pipeline.writing.manifest import Manifest

Display = Literal["auto", "bar", "lines", "off"]
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What has been committed since the run was started."""

    units: int = 0
    shards: int = 0  # finished
    images: int = 0
    asked: int = 0
    failed: int = 0
    verdict: str = ""  # why the run has to stop; "" as long as it may go on


class Tally:
    """Adds up units, in the order of their commits, and judges the error budgets.

    The share of failed results is judged from the moment that as many units are in as may fail in a row: one bad unit
    at the start is no verdict on a dataset.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._seen = Seen()
        self._in_a_row = 0
        self._lock = threading.Lock()

    def add(self, manifest: Manifest) -> str:
        """Count a committed unit. Returns why the run has to stop, or ""."""
        counts = manifest.counts
        with self._lock:
            seen = self._seen
            hopeless = counts.asked > 0 and counts.ok == 0
            self._in_a_row = self._in_a_row + 1 if hopeless else 0
            units, asked, failed = seen.units + 1, seen.asked + counts.asked, seen.failed + counts.failed
            self._seen = Seen(
                units=units,
                shards=seen.shards + manifest.is_last,
                images=seen.images + counts.images,
                asked=asked,
                failed=failed,
                verdict=seen.verdict or self._judge(units, asked, failed),
            )
            return self._seen.verdict

    def stop(self, reason: str) -> None:
        """Let the next commit end the run."""
        with self._lock:
            self._seen = replace(self._seen, verdict=self._seen.verdict or reason)

    def _judge(self, units: int, asked: int, failed: int) -> str:
        run = self._run
        if self._in_a_row >= run.max_consecutive_failed_units:
            return (
                f"{self._in_a_row} units in a row have no result at all. Look at stage and message in quarantine/; "
                "run.max_consecutive_failed_units sets how many may"
            )
        if units >= run.max_consecutive_failed_units and failed > run.max_failed_fraction * asked:
            return over_budget(run, asked, failed)
        return ""

    def seen(self) -> Seen:
        """The counts so far."""
        with self._lock:
            return self._seen


def over_budget(run: RunConfig, asked: int, failed: int) -> str:
    """Why too large a share of failed results is an error."""
    return (
        f"{failed} of {asked} results failed, more than run.max_failed_fraction {run.max_failed_fraction:g}. "
        "Look at stage and message in quarantine/, and raise the fraction if that is as it should be"
    )


class Watch:
    """Shows progress from a thread of its own, as a context manager. The last state is always shown."""

    def __init__(
        self,
        read: Callable[[], Seen],
        *,
        display: Display,
        units_before: int,
        units_known: int | None,
        shards_before: int,
        shards: int,
    ) -> None:
        self._read = read
        self._display = _resolved(display)
        self._units_before, self._units_known = units_before, units_known
        self._shards_before, self._shards = shards_before, shards
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._bar if self._display == "bar" else self._lines, daemon=True)

    def __enter__(self) -> Watch:
        if self._display != "off":
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._display != "off":
            self._thread.join()

    def line(self, seen: Seen) -> str:
        """The state of the run in one line."""
        units = self._units_before + seen.units
        of_units = "" if self._units_known is None else f" of {self._units_known}"
        seconds = time.monotonic() - self._started
        rate = seen.images / seconds if seconds > 0 else 0.0
        minutes, rest = divmod(int(seconds), 60)
        return (
            f"{units}{of_units} units, {self._shards_before + seen.shards} of {self._shards} shards, "
            f"{seen.images} images now, {rate:.2f} images/s, {seen.failed} results failed, {minutes}:{rest:02d}"
        )

    def _lines(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_LINES):
            print(self.line(self._read()), file=sys.stderr, flush=True)

    def _bar(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        total = self._units_known or self._shards
        with Progress(*columns, console=Console(stderr=True)) as bars:
            bar = bars.add_task("", total=total)
            over = False
            while not over:
                over = self._stop.wait(SECONDS_BETWEEN_LOOKS)
                seen = self._read()
                units, shards = self._units_before + seen.units, self._shards_before + seen.shards
                bars.update(
                    bar, description=self.line(seen), completed=units if self._units_known is not None else shards
                )


def _resolved(display: Display) -> Display:
    if display != "auto":
        return display
    return "bar" if sys.stderr.isatty() else "lines"
