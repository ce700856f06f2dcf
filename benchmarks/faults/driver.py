"""A driver: one process that runs a command of ours, forked from one that has imported everything.

Nothing waits but for what a fault needs: leases are a few tenths of a second, and so are the waits between attempts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.strike import Operations, Strike

PATIENCE_S = 240.0  # a command that takes longer hangs; calm and alone it takes one, on S3 three
# Of a lease where another machine is to take over: a healthy driver that gets no processor for longer stops as well.
SHORT_S = 0.9
BEATS = 6  # of a heart in the time of a lease
FOLD_FROM = 2  # units of a shard: so few are folded, since here no shard has more
HANGS = 1000  # exit code of what hung
COMMANDS = {
    "edit": ("edit", "{recipe}"),
    "retry": ("edit", "{recipe}", "--retry-failed"),
    "repair": ("verify", "{recipe}", "--repair"),
}


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What a process is to do, and what is wrong with it."""

    recipe: Path
    folder: str  # the run's
    notes: Path  # begin of the names of what it leaves for us: NOTES.log, NOTES.struck, NOTES.count
    command: str = "edit"
    overrides: tuple[str, ...] = ()
    strike: Strike | None = None
    host: str = ""  # another machine's name; "": this one's
    clock_s: float = 0.0  # by which its clock is ahead
    failing: tuple[str, ...] = ()  # keys of images whose results fail here, as on a machine that is broken
    lease_s: float = 30.0
    settle_s: float = 0.1
    ray: tuple[str, str] | None = None  # a cluster's address, and where its workers note what they begin
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self) -> Process:
        """Fork it."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _run(self)
        return Process(pid, self.notes)


@dataclass
class Process:
    """A driver at work, or one that has ended."""

    pid: int
    notes: Path
    code: int | None = None  # as a shell's: minus the signal that ended it

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Its exit code, or `HANGS`; then it is ended."""
        if not _until(lambda: self.ended(), seconds):
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.code = HANGS
        assert self.code is not None
        return self.code

    def ended(self) -> bool:
        """Whether it has."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def stopped(self, seconds: float = PATIENCE_S) -> bool:
        """Wait until it has stopped itself; false where it has ended first."""
        return _until(lambda: self.ended() or _state(self.pid) == "T", seconds) and self.code is None

    def begun(self, seconds: float = PATIENCE_S) -> bool:
        """Wait until its command begins; what comes before is ours, and knows nothing of signals."""
        return _until(lambda: Path(f"{self.notes}.begun").exists() or self.ended(), seconds)

    def signal(self, which: signal.Signals) -> None:
        """Send a signal, where it is still alive."""
        if not self.ended():
            os.kill(self.pid, which)

    @property
    def struck(self) -> str:
        """Where its strike has hit; "" where it has not."""
        path = Path(f"{self.notes}.struck")
        return json.loads(path.read_bytes())[2] or "model" if path.exists() else ""

    @property
    def operations(self) -> dict[str, int]:
        """How many it has counted; only of one that ended by itself. See `Strike.of`."""
        counts: dict[str, int] = json.loads(Path(f"{self.notes}.count").read_text())
        return counts

    @property
    def log(self) -> str:
        """What it has printed."""
        return Path(f"{self.notes}.log").read_text(errors="replace")


def _until(happened: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _run(driver: Driver) -> None:
    """In the forked process: never returns."""
    code = 1
    counted: Operations | None = None
    try:
        log = os.open(f"{driver.notes}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(driver.environment)
        # As in a shell of its own: a campaign in the background may have been started with some of them ignored.
        for which in (signal.SIGHUP, signal.SIGTERM):
            signal.signal(which, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare(driver)
        if driver.strike is not None:
            counted = Operations(driver.strike, driver.folder, driver.notes)
            counted.watch()
        if driver.ray is not None:
            from benchmarks.faults.on_ray import connected

            connected(*driver.ray, {**driver.environment})
        from pipeline import entry

        Path(f"{driver.notes}.begun").touch()
        arguments = [part.format(recipe=driver.recipe) for part in COMMANDS[driver.command]]
        entry.main([*arguments, *driver.overrides])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 99
    finally:
        if counted is not None:
            Path(f"{driver.notes}.count").write_text(json.dumps(counted.counts))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def prepare(driver: Driver) -> None:
    """Shorten what waits, and spoil what is to be wrong."""
    import pipeline.flow
    import pipeline.reading.storage
    import pipeline.writing.folding
    from pipeline.writing import lock

    lease = {"beat_s": driver.lease_s / BEATS, "expiry_s": driver.lease_s, "settle_s": driver.settle_s}
    lock.DriverLock.__init__.__kwdefaults__.update(lease)  # type: ignore[attr-defined]
    pipeline.reading.storage.FIRST_WAIT = 0.02
    pipeline.writing.folding.FOLD_FROM = FOLD_FROM
    if driver.host:
        lock.this_host = lambda: driver.host  # type: ignore[assignment]
    if driver.clock_s:
        now = time.time
        time.time = lambda: now() + driver.clock_s
    if driver.failing:
        pipeline.flow.outcome_of = _failing(pipeline.flow.outcome_of, driver.failing)


def _failing(outcome_of: Callable[..., Any], keys: tuple[str, ...]) -> Callable[..., Any]:
    from pipeline.one_image import rejected

    def some(result: Any, *others: Any) -> Any:
        prepared = getattr(result, "prepared", None)
        if prepared is None or prepared.sample.key not in keys:
            return outcome_of(result, *others)
        return rejected(prepared.sample, result.edit, result.method, "encode", ValueError("a broken machine"))

    return some
