"""Processes that read what strangers wrote, and may be killed: each does one job at a time, under limits of its own.

Pillow, its libraries and pyarrow believe what bytes claim: a few kilobytes may ask for gigabytes, or for hours. So they
run in a process that knows neither the model nor a credential, whose memory and CPU time the kernel bounds, and which
talks in JSON and bytes (reading/channel.py). CPU time, not the clock: a busy machine makes no image a bad one.

Cost: a third of a second of one core to start, beside whatever else begins then; 30 MiB; see docs/benchmarks.md for
what an image costs. An idle process is kept for the next job, ends by itself after a while, and with its parent.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import ClusterError
from pipeline.reading.channel import Channel, ClosedError, LateError

if TYPE_CHECKING:
    from pipeline.recipe import SourceConfig

WALL = 10  # times its CPU time that a job may take by the clock: only what neither computes nor ends takes so long
START_S = 600.0  # to import numpy and Pillow, on a machine that is busy with a model
END_S = 10.0  # to end, once its pipes are closed
IDLE_S = 60.0  # an idle process waits so long for another job, and ends; it gets none in the second half
ATTEMPTS = 2  # the second in a fresh process: the first may have died of something else
MAX_ANSWER = 8 << 30  # bytes of an answer: its sender's own memory bounds it, below this
# What the process may know of this one's surroundings: not the credentials.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "TZ", "VIRTUAL_ENV", "PYTHONHOME")

Answered = TypeVar("Answered")


class BreachError(Exception):
    """A job broke a limit, or its process; says how, after "it". Where it `may_pass`, another attempt may succeed."""

    def __init__(self, message: str, *, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one job."""

    memory: int  # bytes beside what the idle process has
    seconds: int  # of CPU time
    memory_setting: str  # that a user may raise

    @classmethod
    def for_pictures(cls, source: SourceConfig) -> Limits:
        """What decoding one image or mask may take."""
        return cls(source.decode_memory, source.decode_seconds, "source.decode_memory")

    @classmethod
    def for_parquet(cls, source: SourceConfig) -> Limits:
        """What reading a few rows of a Parquet file may take."""
        return cls(source.read_memory, source.decode_seconds, "source.read_memory")

    @property
    def wall_seconds(self) -> float:
        """What a job may take by the clock."""
        return float(WALL * self.seconds)

    def too_long(self) -> BreachError:
        """The job took too long."""
        return BreachError(f"took longer than {self.seconds} s (source.decode_seconds)", may_pass=False)

    def too_much(self, *, may_pass: bool) -> BreachError:
        """The job took too much memory."""
        message = f"needed more than {size_text(self.memory)} of memory ({self.memory_setting})"
        return BreachError(message, may_pass=may_pass)


@dataclass(slots=True, eq=False)
class Guarded:
    """A process under limits. Use `borrowed`."""

    limits: Limits
    process: subprocess.Popen[bytes]
    channel: Channel
    started: bool = False
    used: bool = False  # by an earlier job: its memory may be in pieces
    idle_since: float = math.inf  # by the monotonic clock

    def wait_until_started(self) -> None:
        """Let it import what it needs.

        Raises:
            ClosedError: it ended, as one does that was idle for long.
            LateError: it is not there after ten minutes.
        """
        if not self.started:
            self.channel.receive(seconds=START_S)
            self.started = True

    def breach(self, error: ClosedError | LateError | MemoryError) -> BreachError:
        """End it, and say what it broke."""
        if isinstance(error, LateError):
            self.end()
            return self.limits.too_long()
        if isinstance(error, MemoryError):
            self.end()
            return self.limits.too_much(may_pass=self.used)
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:  # it closed its pipes and lives on
            code = 0
        self.end()
        if code == -signal.SIGXCPU:
            return self.limits.too_long()
        how = signal.Signals(-code).name if code < 0 else "of itself"
        return BreachError(f"ended the process that read it ({how})", may_pass=True)

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@dataclass(slots=True)
class _Idle:
    """Processes that wait for a job. Of this process alone: a fork begins with none."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    by_limits: dict[Limits, list[Future[Guarded]]] = field(default_factory=dict)
    # Whoever starts a process must outlive it: the kernel ends a child when its parent's *thread* ends.
    keeper: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="guarded"))

    def forget(self) -> None:
        """After a fork."""
        self.__init__()  # type: ignore[misc]


_idle = _Idle()
os.register_at_fork(after_in_child=_idle.forget)


def warm_up(limits: Limits) -> None:
    """Begin to start a process, so that the first job finds it ready."""
    with _idle.lock:
        waiting = _idle.by_limits.setdefault(limits, [])
        if not waiting:
            waiting.append(_idle.keeper.submit(_start, limits))


@contextmanager
def borrowed(limits: Limits) -> Iterator[Guarded]:
    """A process for one job. It is kept for the next one unless the block raises.

    Raises:
        ClusterError: none can be started, which is no row's fault.
    """
    guarded = _started(limits)
    kept = False
    try:
        yield guarded
        kept = True
    finally:
        if kept:
            guarded.used, guarded.idle_since = True, time.monotonic()
            with _idle.lock:
                _idle.by_limits.setdefault(limits, []).append(_done(guarded))
        else:
            guarded.end()


def done_by_guarded(limits: Limits, job: Callable[[Guarded], Answered]) -> Answered:
    """What a job comes to in a process of its own; a second time where the first breach may pass.

    Raises:
        BreachError: it broke a limit.
        ClusterError: no process can be started.
    """
    for attempt in range(ATTEMPTS):
        try:
            with borrowed(limits) as guarded:
                return job(guarded)
        except BreachError as breach:
            if attempt + 1 == ATTEMPTS or not breach.may_pass:
                raise
    raise AssertionError("the last attempt ends with a result or an error")


def _started(limits: Limits) -> Guarded:
    """One that waits for a job; what waited for long may have ended by now."""
    while True:
        with _idle.lock:
            waiting = _idle.by_limits.setdefault(limits, [])
            future = waiting.pop() if waiting else None
        try:
            guarded = (future or _idle.keeper.submit(_start, limits)).result()
            try:
                guarded.wait_until_started()
            except (ClosedError, LateError):
                guarded.end()
                if future is None:
                    raise
                continue
        except (OSError, ClosedError, LateError) as error:
            raise ClusterError(
                f"no process can be started to read images in ({type(error).__name__}). See that the machine has "
                "memory and processes left, and that this Python can import the package"
            ) from error
        # One that has waited for long may be about to end: it would take the job with it.
        if guarded.process.poll() is None and time.monotonic() - guarded.idle_since < IDLE_S / 2:
            return guarded
        guarded.end()


def _done(guarded: Guarded) -> Future[Guarded]:
    future: Future[Guarded] = Future()
    future.set_result(guarded)
    return future


def _start(limits: Limits) -> Guarded:
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    # This process's own path: on a cluster the package may come with the job.
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # One thread, one heap: what threads and their heaps reserve would count as memory taken.
    environment |= {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    process = subprocess.Popen(
        # -P: a file of the user's in the working directory is no module of ours.
        [sys.executable, "-P", "-m", "pipeline.reading.child"]
        + [str(number) for number in (os.getpid(), limits.memory, limits.seconds, int(IDLE_S))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # libtiff's warnings
        env=environment,
        start_new_session=True,  # Ctrl-C is for the parent alone
        bufsize=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    return Guarded(limits, process, Channel(process.stdout.fileno(), process.stdin.fileno(), MAX_ANSWER))


def size_text(size: int) -> str:
    """Bytes for a message."""
    return f"{size / 2**30:g} GiB" if size >= 2**30 else f"{size / 2**20:g} MiB"
