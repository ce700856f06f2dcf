"""SIGINT, SIGTERM and SIGHUP: a run that is told to stop ends in order, soon, and says so.

An exception raised by a signal wherever the main thread happens to be is lost in the first `except:` of a library that
is being imported, or leaves a lock held that nobody can take again. So a signal only leaves a note: the run looks for
it where it can end (`check`). A thread hears signals as well, also while the main thread is in native code, and ends
the process of a command itself where no such point is reached in time. A second signal ends a command at once.

In a program of the user's, our handlers stand only while `driver.run` is at work, and only in place of Python's own;
that process is never ended. Nothing is imported here that takes time: the command listens before it imports the rest.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 25.0  # for a run at work, to take back what it has begun and to sum up; Slurm and Kubernetes kill after 30
GRACE_BEFORE_S = 2.0  # where nothing is at work yet, or any more: a model is being loaded, a folder listed
GIVE_BACK_S = 2.0  # for the lock, where the process is ended from outside of the main thread
CHILDREN_S = 0.5  # for child processes to end by themselves
GOES_ON = "What is committed stays: the same command goes on from there."


class Stopped(KeyboardInterrupt):
    """A signal has asked for the end. As an interrupt it is no error that anybody may handle on the way."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.exit_code = 128 + number  # as shells have it
        super().__init__(signal.Signals(number).name)


@dataclass(slots=True)
class Orderly:
    """A run that ends in order when it is told to."""

    thread: int = field(default_factory=threading.get_ident)
    when_told: Callable[[], None] | None = None  # at once, from a thread of its own
    when_ended: Callable[[], None] | None = None  # where the process ends without the run's doing
    grace_s: float = GRACE_BEFORE_S
    told: int | None = None
    raised: bool = False
    may_interrupt: bool = False


@dataclass(slots=True)
class _Process:
    """What is heard in this process."""

    is_command: bool = False  # ours: it may be ended
    outcome: str = ""  # what a command says of its end
    run: Orderly | None = None
    has_spoken: bool = False
    first: int | None = None  # signal
    heard: int = 0  # signals
    thread: threading.Thread | None = None
    until: float | None = None  # by the monotonic clock: then a command is ended
    pipe: int = -1  # the writing end


_process = _Process()


def sentence(number: int) -> str:
    """What a command that was stopped says."""
    return f"Stopped by {signal.Signals(number).name}. {_process.outcome}".rstrip()


def listen(*, goes_on: bool) -> None:
    """Hear signals from now on, in the process of a command. One that is ignored (nohup, &) stays ignored.

    Args:
        goes_on: the same command goes on from where this one ends.
    """
    _process.is_command = True
    _process.outcome = GOES_ON if goes_on else ""
    _start_thread()
    os.set_blocking(_process.pipe, False)
    signal.set_wakeup_fd(_process.pipe, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def orderly() -> Iterator[Orderly]:
    """A run that looks for signals by `check`, and is given `Orderly.grace_s` to end.

    Whatever it raises once it has been told to stop is a consequence, and comes out as `Stopped`. In a program of the
    user's the handlers come back afterwards, and a signal other than SIGINT is raised again: what ends such a program
    by default still ends it. Outside of the main thread no signal can be heard.

    Raises:
        Stopped: a signal came.
    """
    run = Orderly()
    if _process.run is not None or threading.current_thread() is not threading.main_thread():
        yield run
        return
    before = {} if _process.is_command else _take_over()
    _process.run = run
    try:
        if _process.first is not None:  # before there was a run to stop
            run.told = _process.first
        yield run
    except BaseException as error:
        _put_back(before)
        if run.told is None:
            raise
        raise _end_of(run.told) from error
    else:
        _put_back(before)
        if run.told is not None:
            raise _end_of(run.told)


def at_work(when_told: Callable[[], None] | None = None) -> None:
    """From now on the run has something to bring to an end; `when_told`: what to do at once when it is told to."""
    if _process.run is not None:
        _process.run.grace_s = GRACE_S
        _process.run.when_told = when_told


def check() -> None:
    """A point where the run may end.

    Raises:
        Stopped: once, in the thread of the run, if a signal has come.
    """
    run = _process.run
    if run is not None and run.told is not None and not run.raised and run.thread == threading.get_ident():
        run.raised = True
        raise Stopped(run.told)


@contextmanager
def interruptible() -> Iterator[None]:
    """A long call that can be left anywhere: the signal itself raises `Stopped` in it."""
    run = _process.run or Orderly()
    run.may_interrupt = True
    try:
        check()
        yield
    finally:
        run.may_interrupt = False


def last_words(stopped: Stopped) -> str:
    """What a command says, which then says no more."""
    _process.has_spoken = True
    return sentence(stopped.number)


@contextmanager
def unchanged() -> Iterator[None]:
    """Handlers of a run that hears signals stay, whatever a library sets in here, in Python or in native code."""
    real, ours = signal.signal, [number for number in SIGNALS if signal.getsignal(number) is _on_signal]
    if ours:
        signal.signal = lambda number, handler: (  # type: ignore[assignment]
            signal.getsignal(number) if number in ours else real(number, handler)
        )
    try:
        yield
    finally:
        signal.signal = real
        for number in ours:
            signal.signal(number, _on_signal)


def overhear(number: int, call: Callable[[], None]) -> None:
    """Call from a thread, once, when a signal comes that somebody else's handler handles. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        return
    heard, pipe = os.pipe()
    os.set_blocking(pipe, False)
    signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)

    def listen() -> None:
        while number not in os.read(heard, 64):
            pass
        call()

    threading.Thread(target=listen, name="signals", daemon=True).start()


def note_committed(images: int) -> None:
    """What there is to be said in the end."""
    _process.outcome = f"Committed so far: {images:,} images. The same command goes on from there."


def leave() -> None:
    """End the process of a command that was stopped, now that it has said so; of any other, do nothing.

    Not by way of the interpreter's own end, which waits for threads and calls what native libraries left behind.
    """
    if _process.is_command and _process.first is not None:
        _exit(_process.first)


def _on_signal(number: int, frame: Any) -> None:
    """Python's handler, in the main thread, between two of its steps."""
    run = _process.run
    if run is None:
        return
    if not _process.is_command:
        is_second = run.told is not None  # asked first: the thread that hears of this one may set it at once
        os.write(_process.pipe, bytes([number]))
        if is_second:  # the program's own
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
    _process.first = run.told = run.told or number
    if run.may_interrupt:
        check()


def _start_thread() -> None:
    heard, _process.pipe = os.pipe()
    _process.thread = threading.Thread(target=_hear, args=(heard,), name="signals", daemon=True)
    _process.thread.start()


def _hear(heard: int) -> None:
    """Until the pipe is closed."""
    while True:
        wait = None if _process.until is None else max(0.0, _process.until - time.monotonic())
        ready, _, _ = select.select([heard], [], [], wait)
        numbers = os.read(heard, 64) if ready else b""
        if ready and not numbers:
            os.close(heard)
            return
        for number in numbers:
            if number in SIGNALS:
                _heard(number)
        if _process.until is not None and time.monotonic() >= _process.until:
            _end(_process.first or signal.SIGTERM)


def _heard(number: int) -> None:
    run, again = _process.run, _process.heard > 0
    _process.heard += 1
    _process.first = _process.first or number
    if _process.is_command and (again or run is None):
        _end(_process.first)
    if run is None or again:
        return
    run.told = run.told or number
    if _process.is_command:
        _process.until = time.monotonic() + run.grace_s
    if run.when_told is not None:
        _aside(run.when_told)


def _aside(call: Callable[[], None]) -> threading.Thread:
    """Call in a thread: a store that does not answer keeps nobody from hearing the next signal."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            call()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    return thread


def _end(number: int) -> None:
    """End a command from outside of its main thread."""
    run = _process.run
    if run is not None and run.when_ended is not None:
        _aside(run.when_ended).join(GIVE_BACK_S)
    try:
        error = sys.stderr.fileno()
        shown_again = b"\x1b[?25h\n" if os.isatty(error) else b""  # the cursor, which a progress bar hides
        if not _process.has_spoken:
            os.write(error, shown_again + sentence(number).encode() + b"\n")
    except (OSError, ValueError, AttributeError):
        pass  # the terminal has gone
    _exit(number)


def _exit(number: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    _end_children()
    os._exit(128 + number)


def _end_children() -> None:
    """They would outlive a process that ends like this."""
    for number, patience in ((signal.SIGTERM, CHILDREN_S), (signal.SIGKILL, 0.0)):
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        until = time.monotonic() + patience
        while _children() and time.monotonic() < until:
            time.sleep(0.01)


def _children() -> list[int]:
    """Child processes that have not ended; none where there is no /proc."""
    tasks = "/proc/self/task"
    with contextlib.suppress(OSError):
        pids = [pid for task in os.listdir(tasks) for pid in _read(f"{tasks}/{task}/children").split()]
        return [int(pid) for pid in pids if _state(pid) not in "ZX"]
    return []


def _state(pid: str) -> str:
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[0] if fields else "X"


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path) as file:
        return file.read()
    return ""


def _take_over() -> dict[int, Any]:
    """Hear signals in a program of the user's; returns the handlers that were there. Those of the program's own
    stay."""
    defaults = {signal.SIGINT: signal.default_int_handler}
    ours = [number for number in SIGNALS if signal.getsignal(number) == defaults.get(number, signal.SIG_DFL)]
    _process.first, _process.outcome, _process.heard = None, GOES_ON, 0
    _start_thread()
    return {number: signal.signal(number, _on_signal) for number in ours}


def _put_back(before: dict[int, Any]) -> None:
    _process.run = None
    if _process.is_command:
        if _process.until is not None:  # the rest is a line to print
            _process.until = min(_process.until, time.monotonic() + GRACE_BEFORE_S)
        return
    for number, handler in before.items():
        signal.signal(number, handler)
    os.close(_process.pipe)
    if _process.thread is not None:
        _process.thread.join()


def _end_of(number: int) -> Stopped:
    """What a run that was told to stop ends with."""
    if not _process.is_command and number != signal.SIGINT:
        signal.raise_signal(number)
    return Stopped(number)


def _forget() -> None:
    """A forked child is no command: it shares the pipe, and would tell its parent of its own signals."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _process.is_command, _process.run = False, None
