"""One driver per run's folder: every driver raises a flag of its own, then looks who else has.

    _lock/<generation>-<owner>.json      the holder is alone with the highest generation; nobody else is alive beside it

To get in, a driver lists the flags, sees that every holder is dead or has released, raises its own with the next
generation, *and looks again*. Of two that raise theirs at once at least one then sees the other, whatever the order of
their requests: it takes its flag down, and tries again. This needs nothing of a store but that a listing shows what was
put before it began, as with local files, S3 and its like; where listings lag, `SETTLE_S` lets them catch up. No
conditional put is needed, and no clock. A released flag stays until the next holder removes it, so that generations
only grow: a driver that was paused, taken over, and wakes up finds a higher one, and stops.

A dead holder is known at once on its own machine, elsewhere by a heart that has not beaten for `EXPIRY_S`. That is
watched, not computed from timestamps: clocks of two machines may differ. A driver that is stopped for longer than that,
and elsewhere, is taken over though it lives. What it still writes between its last look at the lock and its next is
no row lost or doubled: units have fixed names, and are committed to the same bytes (writing/commit.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import posixpath
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import RunAborted, SinkError
from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.showing import describe, public_url
from pipeline.writing.files import get, list_folder, put, remove
from pipeline.writing.processes import started_at, this_host

log = logging.getLogger(__name__)

FOLDER = "_lock"
BEAT_S = 5.0
EXPIRY_S = 30.0  # several beats: one slow request is no death
SETTLE_S = 2.0  # on other stores than local files: longer than a put takes to show in a listing
PAUSE_S = 0.002
LOOKS = 10  # at others that raised their flags at the same time, before a driver takes its own down and begins anew
FLAG = re.compile(r"(\d{8,})-[0-9a-f]{16}\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """What a driver says of itself. The host is a hash: names of machines do not belong into shared folders."""

    state: Literal["trying", "holding", "released"]
    host: str
    pid: int
    started: str  # of the process, in ticks since boot: a pid may be given out again
    beat: int = 0
    beat_at: float = 0.0  # seconds since 1970 by the holder's clock; for people only

    def to_bytes(self) -> bytes:
        """As JSON."""
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()


class DriverLock:
    """Held from entering to leaving, as a context manager.

    Args:
        sink: the run's folder.
        on_lost: called once, with the reason, from the heartbeat's thread, should another driver have taken over.
        notify: told when there is something to wait for.
        beat_s: seconds between heartbeats.
        expiry_s: seconds without one after which a lock may be taken over.
        settle_s: see `SETTLE_S`.

    Raises:
        SinkError: on entering, another driver is at work, or the folder cannot be read or written.
    """

    def __init__(
        self,
        sink: SinkConfig,
        on_lost: Callable[[str], None],
        *,
        notify: Callable[[str], None] = log.warning,
        beat_s: float = BEAT_S,
        expiry_s: float = EXPIRY_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._sink, self._on_lost, self._notify = sink, on_lost, notify
        self._beat_s, self._expiry_s, self._settle_s = beat_s, expiry_s, settle_s
        self._owner = secrets.token_hex(8)
        self._me = Flag(state="trying", host=this_host(), pid=os.getpid(), started=started_at(os.getpid()) or "")
        self._name = ""
        self._dead: set[str] = set()  # flags on other machines whose hearts were watched, and did not beat
        self._lost = ""
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat_until_stopped, name="driver-lock", daemon=True)

    def look(self) -> None:
        """See whether a driver is at work, without a wait and without a write. Of another machine its clock is trusted.

        Raises:
            SinkError: one is.
        """
        self._fs, self._root = open_fs(self._sink.folder, self._sink.storage_options)
        for name, data in self._there().items():
            flag = parsed(data)
            if flag is None or self._state(name, data) != "holding":
                continue
            if flag.host == self._me.host:
                raise self._refusal(name, flag, f"process {flag.pid} on this machine")
            if time.time() - flag.beat_at < self._expiry_s:
                raise self._refusal(name, flag, "on another machine")

    def __enter__(self) -> DriverLock:
        self._fs, self._root = open_fs(self._sink.folder, self._sink.storage_options)
        if isinstance(self._fs, LocalFileSystem):
            self._settle_s = 0.0
        while not self._acquired():
            time.sleep((self._settle_s or PAUSE_S) * (0.5 + secrets.randbelow(100) / 50))  # another one is quicker
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heart.join()
        try:
            if self.claim.holds():
                self._put("released")
        except SinkError as failed:  # the next driver on this machine sees the dead process, others wait
            log.warning("the lock of %s was not released: %s", public_url(self._sink.folder), describe(failed))

    @property
    def claim(self) -> Claim:
        """For workers, who cannot hear the heartbeat's thread."""
        return Claim(self._sink, self._name)

    @property
    def lost(self) -> str:
        """Why this driver has to stop: another one has taken over; "" while the lock is held."""
        return self._lost

    def check(self) -> None:
        """See that the lock is held.

        Raises:
            RunAborted: another driver has taken over.
        """
        if self._lost:
            raise RunAborted(self._lost)

    def _acquired(self) -> bool:
        """Take the lock, if need be over; false where another driver is about to.

        Raises:
            SinkError: another driver is at work.
        """
        highest = self._highest_when_over()
        if highest is None:
            return False
        self._name = f"{highest + 1:08d}-{self._owner}.json"
        self._put("trying")
        try:
            if self._is_alone():
                self._put("holding")
                for name in flags(self._fs, self._root):
                    if generation(name) < generation(self._name):  # over, or it would not be lower
                        remove(self._fs, self._path(name))
                return True
        except BaseException:
            remove(self._fs, self._path(self._name))
            raise
        remove(self._fs, self._path(self._name))  # it was never held: no generation is lost with it
        return False

    def _is_alone(self) -> bool:
        """Whether, with our flag up, nobody else is alive, and no other generation is as high."""
        for _ in range(LOOKS):
            time.sleep(self._settle_s)
            states = {name: self._state(name, data) for name, data in self._there().items() if name != self._name}
            if any(
                state == "holding"
                or (state == "trying" and name > self._name)  # of two that try, the other sees ours and gives way
                or (state == "over" and generation(name) >= generation(self._name))  # came and went: ours is not new
                for name, state in states.items()
            ):
                return False
            if "trying" not in states.values():
                return True
            time.sleep(PAUSE_S)
        return False

    def _there(self) -> dict[str, bytes]:
        """Every flag that is up, by name. One that is taken down while they are read is left out: it was never held."""
        read = {name: get(self._fs, self._path(name)) for name in flags(self._fs, self._root)}
        return {name: data for name, data in read.items() if data is not None}

    def _state(self, name: str, data: bytes) -> Literal["trying", "holding", "over"]:
        """Of a flag at this moment. One of another machine is over where it is released, or has been watched."""
        flag = parsed(data)
        if name in self._dead or flag is None or flag.state == "released":
            return "over"
        if flag.host == self._me.host and started_at(flag.pid) != flag.started:
            return "over"
        return flag.state

    def _highest_when_over(self) -> int | None:
        """The highest generation, once every flag is over; None where another driver is about to take the lock.

        Raises:
            SinkError: a holder is alive.
        """
        there = self._there()
        watched: dict[str, bytes] = {}
        for name, data in there.items():
            flag = parsed(data)
            if flag is None or (state := self._state(name, data)) == "over":
                continue
            if flag.host != self._me.host:
                watched[name] = data
            elif state == "holding":
                raise self._refusal(name, flag, f"process {flag.pid} on this machine")
            else:
                return None
        if watched and not self._watched_to_death(watched):
            return None
        return max(map(generation, there), default=0)

    def _watched_to_death(self, watched: dict[str, bytes]) -> bool:
        """Whether no heart beat on another machine until it can be taken for dead; false where the flags have changed.

        Raises:
            SinkError: a holder is alive.
        """
        self._notify(
            f"{public_url(self._sink.folder)} is locked by a driver elsewhere. Watching its heartbeat for up to "
            f"{self._expiry_s:.0f} s"
        )
        until = time.monotonic() + self._expiry_s
        while time.monotonic() < until:
            time.sleep(min(1.0, self._beat_s))
            for name, first in watched.items():
                now = get(self._fs, self._path(name))
                if now == first:
                    continue
                if (flag := parsed(now)) is not None and flag.state == "holding":
                    raise self._refusal(name, flag, "on another machine")
                return False
        self._dead.update(watched)
        return True

    def _refusal(self, name: str, flag: Flag, where: str) -> SinkError:
        age = max(0.0, time.time() - flag.beat_at)
        return SinkError(
            f"{public_url(self._sink.folder)} is being written by another driver ({where}, owner {owner(name)}, last "
            f"heartbeat {age:.0f} s ago). Wait until it ends, or end it: the same command then goes on from what is "
            "committed. Nothing needs to be removed by hand"
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{FOLDER}/{name}"

    def _put(self, state: Literal["trying", "holding", "released"], beat: int = 0) -> None:
        data = replace(self._me, state=state, beat=beat, beat_at=time.time()).to_bytes()
        put(self._fs, self._path(self._name), data, durable=False)

    def _beat_until_stopped(self) -> None:
        beat = 0
        while not self._stop.wait(self._beat_s):
            try:
                if not self.claim.holds():
                    self._lost = (
                        f"{public_url(self._sink.folder)} was taken over by another driver, since this one could not "
                        f"be seen for {self._expiry_s:.0f} s. What is committed stays, and the other goes on"
                    )
                    self._on_lost(self._lost)
                    return
                beat += 1
                self._put("holding", beat)
            except SinkError as error:  # tried again with the next beat; a takeover shows as soon as the store answers
                log.warning("no heartbeat: %s", error)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a driver holds, in a form that travels to where its units are written."""

    sink: SinkConfig
    name: str  # of its flag

    @property
    def generation(self) -> int:
        """Higher than that of every driver that held the folder before."""
        return generation(self.name)

    def holds(self) -> bool:
        """Whether the lock is still that driver's. One request to an object store.

        Raises:
            SinkError: it cannot be read.
        """
        fs, root = open_fs(self.sink.folder, self.sink.storage_options)
        there = flags(fs, root)
        return self.name in there and max(map(generation, there)) == self.generation

    def check(self) -> None:
        """See that it is, now and not as of the last heartbeat.

        Raises:
            RunAborted: another driver has taken over.
            SinkError: the lock cannot be read.
        """
        if not self.holds():
            raise RunAborted(
                f"{public_url(self.sink.folder)} was taken over by another driver. What is committed stays, and the "
                "other goes on"
            )


@contextmanager
def no_empty_folder(sink: SinkConfig) -> Iterator[None]:
    """A run that is refused before it wrote anything leaves no new folder behind on a local disk, flags or not.

    Put around the lock: generations may then begin again, for nothing was written under the earlier ones.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    new = isinstance(fs, LocalFileSystem) and not os.path.exists(root)
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError, SinkError):
                _remove_if_only_locked(fs, root)
        raise


def _remove_if_only_locked(fs: AbstractFileSystem, root: str) -> None:
    folder = Path(root, FOLDER)
    there = [path.name for path in folder.iterdir()]
    up = (parsed(get(fs, f"{root}/{FOLDER}/{name}")) for name in there)
    if [path.name for path in Path(root).iterdir()] == [FOLDER] and all(
        flag and flag.state == "released" for flag in up
    ):
        for name in there:
            remove(fs, f"{root}/{FOLDER}/{name}")
        folder.rmdir()  # refused by the system where another driver has come in the meantime
        Path(root).rmdir()


def flags(fs: AbstractFileSystem, root: str) -> list[str]:
    """Names of all flags that are up, ascending.

    Raises:
        SinkError: the folder cannot be listed.
    """
    fs.invalidate_cache()  # s3fs remembers listings
    names = (posixpath.basename(path) for path in list_folder(fs, f"{root}/{FOLDER}"))
    return sorted(name for name in names if FLAG.fullmatch(name))


def generation(name: str) -> int:
    """Of a flag, by its name."""
    return int(name.partition("-")[0])


def owner(name: str) -> str:
    """Of a flag, by its name."""
    return name.partition("-")[2].removesuffix(".json")


def parsed(data: bytes | None) -> Flag | None:
    """A flag as stored; None where it is absent or none."""
    try:
        return Flag(**json.loads(data or b""))
    except (ValueError, TypeError):
        return None
