"""Inside a driver: count its operations on the run's folder, and let something happen at one of them.

On files an operation is whatever Python's audit hooks tell of a path below the folder, so that this does not depend on
how the code under test writes: files opened for writing, renames, links, removals, new folders; and every `fsync`. On
S3 it is a request that changes something. Reads are none: before and after one, the folder is the same.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES_PATH = {"os.rename": 1, "os.link": 1, "os.symlink": 1, "os.remove": 0, "os.rmdir": 0, "os.truncate": 0}
"""Audit events that change a folder, and which of their arguments is the path that counts."""
READS = ("get_", "head_", "list_")  # of S3's methods
LOCK = "/_lock/"


@dataclass(frozen=True, slots=True)
class Strike:
    """What happens where.

    what: "kill" and "stop" are signals that nobody catches, so are the names of others sent from inside; "full" lets
        this operation and all after it fail for want of space, "full once" this one alone; "count" nothing.
    at: before the operation of this number, from 1.
    of: "store", operations on the store; "work", those without the lock's, whose heartbeats come when they come;
        "results", the moments when a result leaves the model.
    """

    what: str
    at: int
    of: str = "store"


class Operations:
    """Counts, and strikes; told of every operation from whichever thread."""

    def __init__(self, strike: Strike, folder: str, notes: Path) -> None:
        self._strike, self._folder, self._notes = strike, folder, notes
        self._lock = threading.Lock()
        self.counts = Counter[str]()  # by what is counted; see `Strike`
        self._full = False

    def happens(self, of: str, where: str) -> None:
        """Note one, and strike where it is the one.

        Raises:
            OSError: the disk is full.
        """
        counted = {of, "work"} if of == "store" and LOCK not in where else {of}
        with self._lock:
            self.counts.update(counted)
            ours = self._strike.of in counted
            hit = ours and self.counts[self._strike.of] == self._strike.at and self._strike.what != "count"
            if hit:
                self._full = self._strike.what == "full"
        if hit:
            self._note(where)
        if not ours:
            return
        if self._full or (hit and self._strike.what == "full once"):
            raise OSError(errno.ENOSPC, "No space left on device", where)
        if hit:
            self._signal()

    def _note(self, where: str) -> None:
        handle = os.open(f"{self._notes}.struck", os.O_CREAT | os.O_WRONLY)
        os.write(handle, json.dumps([self._strike.what, self._strike.at, where]).encode())
        os.close(handle)

    def _signal(self) -> None:
        which = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(self._strike.what)
        if which is None:
            os.kill(os.getpid(), signal.Signals[self._strike.what])
            return
        # To this thread: it is to go no further, not even by one instruction.
        signal.pthread_kill(threading.get_ident(), which)
        time.sleep(0.01)

    def watch(self) -> None:
        """Begin to count, for good."""
        if self._folder.startswith("s3://"):
            self._watch_s3()
        else:
            self._watch_files()
        self._watch_results()

    def _watch_files(self) -> None:
        inside = self._folder.rstrip("/") + "/"

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, _, flags = arguments
                changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            elif event in CHANGES_PATH:
                path, changes = arguments[CHANGES_PATH[event]], True
            elif event == "os.mkdir":
                path, changes = arguments[0], True
            else:
                return
            if changes and isinstance(path, str | os.PathLike):
                where = os.fspath(path)
                if isinstance(where, str) and (where + "/").startswith(inside):
                    if event == "os.mkdir" and os.path.isdir(where):
                        return
                    self.happens("store", where)

        sys.addaudithook(hook)
        fsync = os.fsync

        def counted(file: int) -> None:
            where = os.readlink(f"/proc/self/fd/{file}")
            if (where + "/").startswith(inside):
                self.happens("store", where + "/")  # a folder's too: of `_lock` itself
            fsync(file)

        os.fsync = counted

    def _watch_s3(self) -> None:
        import s3fs

        asks: Callable[..., Any] = s3fs.S3FileSystem._call_s3
        bucket, _, prefix = self._folder.removeprefix("s3://").partition("/")

        async def counted(fs: Any, method: str, *options: Any, **named: Any) -> Any:
            asked = {name: value for some in (*options, named) for name, value in some.items()}
            keys = [one["Key"] for one in asked.get("Delete", {}).get("Objects", ())]
            key = next((one for one in (asked.get("Key", ""), *keys) if one.startswith(prefix)), "")
            if key and not method.startswith(READS):
                self.happens("store", f"{bucket}/{key}")
            return await asks(fs, method, *options, **named)

        s3fs.S3FileSystem._call_s3 = counted

    def _watch_results(self) -> None:
        import pipeline.flow

        outcome_of = pipeline.flow.outcome_of

        def counted(*arguments: Any) -> Any:
            self.happens("results", "")
            return outcome_of(*arguments)

        pipeline.flow.outcome_of = counted
