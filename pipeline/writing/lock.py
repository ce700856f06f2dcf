"""One driver per partition of a run's folder: every driver raises a flag of its own, then looks who else has.

    _lock/<generation>-<owner>.json             of the whole run
    _lock/<generation>-<I>of<N>-<owner>.json    of one of its partitions

Two flags exclude each other where their partitions overlap; others do not see each other. To get in, a driver lists the
flags, sees that every holder beside it is dead or has released, raises its own with the next generation, *and looks
again*. Of two that raise theirs at once at least one then sees the other, whatever the order of their requests: it
takes its flag down, and tries again. This needs nothing of a store but that a listing shows what was put before it
began, as with local files, S3 and its like; where listings lag, `SETTLE_S` lets them catch up. No conditional put is
needed, and no clock.

Generations grow: a flag that was ever held is only removed by the holder of a higher one that covers its partition. So
for every driver that ever held a part, a flag at least as high and as wide stays up: nobody takes a generation that a
part has seen, and a driver that was paused, taken over, and wakes up finds a higher flag over its part, and stops. Nor
do drivers of disjoint partitions ever share one: modulo N, those of partition I of N are I.

A dead holder is known at once on its own machine, elsewhere by a heart that has not beaten for `EXPIRY_S`. That is
watched, not computed from timestamps: clocks of two machines may differ. A driver that is stopped for longer than that,
and elsewhere, is taken over though it lives. What it still writes between its last look at the lock and its next counts
for nothing: names carry its generation, or digits of what the files hold (writing/baseline.py).
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

from fsspec.implementations.local import LocalFileSystem

from pipeline.common.partition import WHOLE, Partition
from pipeline.common.showing import describe, public_url
from pipeline.errors import HeldError, RunAborted, SinkError
from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.files import get, put, remove
from pipeline.writing.flags import FOLDER, Flag, State, flag_name, flags, generation, owner, parsed, partition_of
from pipeline.writing.processes import started_at, this_host

log = logging.getLogger(__name__)

BEAT_S = 5.0
EXPIRY_S = 30.0  # several beats: one slow request is no death
SETTLE_S = 2.0  # on other stores than local files: longer than a put takes to show in a listing
PAUSE_S = 0.002
LOOKS = 10  # at others that raised their flags at the same time, before a driver takes its own down and begins anew


class DriverLock:
    """Held from entering to leaving, as a context manager.

    Args:
        sink: the run's folder.
        on_lost: called once, with the reason, from the heartbeat's thread, should another driver have taken over.
        partition: what of the run it is for.
        notify: told when there is something to wait for.
        beat_s: seconds between heartbeats.
        expiry_s: seconds without one after which a lock may be taken over.
        settle_s: see `SETTLE_S`.

    Raises:
        HeldError: on entering, another driver is at work on a part of it.
        SinkError: the folder cannot be read or written.
    """

    def __init__(
        self,
        sink: SinkConfig,
        on_lost: Callable[[str], None],
        *,
        partition: Partition = WHOLE,
        notify: Callable[[str], None] = log.warning,
        beat_s: float = BEAT_S,
        expiry_s: float = EXPIRY_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._sink, self._on_lost, self._notify, self._partition = sink, on_lost, notify, partition
        self._beat_s, self._expiry_s, self._settle_s = beat_s, expiry_s, settle_s
        self._me = Flag(state="trying", host=this_host(), pid=os.getpid(), started=started_at(os.getpid()) or "")
        self._name = ""
        self._dead: dict[str, bytes] = {}  # flags on other machines, as they stood while no heart beat
        self._lost = ""
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat_until_stopped, name="driver-lock", daemon=True)

    def look(self) -> None:
        """See whether a driver is at work, without waiting or writing. The clock of another machine is trusted.

        Raises:
            HeldError: one is.
        """
        self._fs, self._root = open_fs(self._sink.folder, self._sink.storage_options)
        for name, data in self._beside().items():
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
            if self._name in flags(self._fs, self._root):  # one that was taken over may still be up: it is over
                self._put("released")
        except SinkError as failed:  # the next driver on this machine sees the dead process, others wait
            log.warning("the lock of %s was not released: %s", public_url(self._sink.folder), describe(failed))

    @property
    def claim(self) -> Claim:
        """For workers, which do not see the heartbeat's thread."""
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
            HeldError: another driver is at work.
        """
        if not self._are_over():
            return False
        highest = max(map(generation, flags(self._fs, self._root)), default=0)
        self._name = flag_name(next_generation(highest, self._partition), self._partition, secrets.token_hex(8))
        self._put("trying")
        try:
            if (outranked := self._outranked_when_alone()) is not None:
                self._put("holding")
                if self.claim.holds():  # or it took so long to say so that another one took over
                    for name in outranked:
                        remove(self._fs, self._path(name))
                    return True
        except BaseException:
            remove(self._fs, self._path(self._name))
            raise
        remove(self._fs, self._path(self._name))  # nothing was done under it: no generation is lost with it
        return False

    def _outranked_when_alone(self) -> list[str] | None:
        """With our flag up and no other driver alive: the flags that ours outranks. None where another goes first."""
        mine = generation(self._name)
        for _ in range(LOOKS):
            time.sleep(self._settle_s)
            there = self._beside()
            states = {name: self._state(name, data) for name, data in there.items()}
            if any(
                state == "holding"
                or (state == "trying" and rank(name) > rank(self._name))  # it sees ours, which goes down
                or (state == "over" and generation(name) >= mine)  # came and went: ours is not new
                for name, state in states.items()
            ):
                return None
            if "trying" not in states.values():
                return [name for name in states if self._partition.covers(partition_of(name))]
            time.sleep(PAUSE_S)
        return None

    def _beside(self) -> dict[str, bytes]:
        """Every other flag that ours excludes, by name. One that is taken down while they are read is left out."""
        names = (name for name in flags(self._fs, self._root) if partition_of(name).overlaps(self._partition))
        read = {name: get(self._fs, self._path(name)) for name in names if name != self._name}
        return {name: data for name, data in read.items() if data is not None}

    def _state(self, name: str, data: bytes) -> Literal["trying", "holding", "over"]:
        """Of a flag, now. One of another machine is over where it was released, or watched until it seemed dead."""
        flag = parsed(data)
        if self._dead.get(name) == data or flag is None or flag.state == "released":
            return "over"
        if flag.host == self._me.host and started_at(flag.pid) != flag.started:
            return "over"
        return flag.state

    def _are_over(self) -> bool:
        """Whether all flags beside ours are over; false where another driver is about to take the lock.

        Raises:
            HeldError: a holder is alive.
        """
        there = self._beside()
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
                return False
        return not watched or self._watched_to_death(watched)

    def _watched_to_death(self, watched: dict[str, bytes]) -> bool:
        """Whether no heart beat on another machine until it can be taken for dead; false where the flags have changed.

        Raises:
            HeldError: a holder is alive.
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

    def _refusal(self, name: str, flag: Flag, where: str) -> HeldError:
        age = max(0.0, time.time() - flag.beat_at)
        held = partition_of(name)
        what = (
            public_url(self._sink.folder) if held == WHOLE else f"partition {held} of {public_url(self._sink.folder)}"
        )
        return HeldError(
            f"{what} is being written by another driver ({where}, owner {owner(name)}, last "
            f"heartbeat {age:.0f} s ago). Wait until it ends, or end it: the same command then goes on from what is "
            "committed. Nothing needs to be removed by hand"
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{FOLDER}/{name}"

    def _put(self, state: State, beat: int = 0) -> None:
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
        """Unique in a run's folder, and higher than that of every driver that held any part of the partition before."""
        return generation(self.name)

    def holds(self) -> bool:
        """Whether the lock is still that driver's. One request to an object store.

        Raises:
            SinkError: it cannot be read.
        """
        fs, root = open_fs(self.sink.folder, self.sink.storage_options)
        up, mine = flags(fs, root), partition_of(self.name)
        if self.name not in up:
            return False
        for name in up:
            if generation(name) > self.generation and partition_of(name).overlaps(mine):
                data = get(fs, f"{root}/{FOLDER}/{name}")
                if data is None:  # it gave way, or a higher one took its place
                    return self.holds()
                if (flag := parsed(data)) is None or flag.state != "trying":
                    return False
        return True

    def check(self) -> None:
        """See that the lock is held: now, not as of the last heartbeat.

        Raises:
            RunAborted: another driver has taken over.
            SinkError: the lock cannot be read.
        """
        if not self.holds():
            raise RunAborted(
                f"{public_url(self.sink.folder)} was taken over by another driver. What is committed stays, and the "
                "other goes on"
            )


def next_generation(highest: int, partition: Partition) -> int:
    """Higher than the highest, and never that of a partition which does not overlap this one."""
    return highest + 1 + (partition.index - highest - 1) % partition.count


def rank(name: str) -> tuple[int, str]:
    """Of two flags that are raised at the same time, the one that goes first has the higher one."""
    return generation(name), owner(name)
