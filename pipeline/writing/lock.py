"""One driver per run's folder: a lock object, kept alive by a heartbeat.

    _lock/<generation>.json      the newest generation holds; a takeover is the creation of the next one

Where the store creates conditionally (local files, S3 with `If-None-Match`), two drivers cannot both create a
generation. Where it ignores the condition, which a probe finds out, the last writer wins, and a driver that reads
another's name after a settling time yields: there the lock is a lease that a badly delayed request may break. Even then
nothing is lost or doubled, since units have fixed names and are committed again to the same bytes (writing/commit.py).

A dead holder is known at once on its own machine, elsewhere by a heart that has not beaten for `EXPIRY_S`. That is
watched, not computed from timestamps: clocks of two machines may differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import posixpath
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import RunAborted, SinkError
from pipeline.reading.storage import open_fs, retrying
from pipeline.recipe import SinkConfig
from pipeline.showing import describe, public_url
from pipeline.writing.commit import get, list_folder, put, remove

log = logging.getLogger(__name__)

FOLDER = "_lock"
BEAT_S = 5.0
EXPIRY_S = 30.0  # several beats: one slow request is no death
SETTLE_S = 2.0  # longer than a put takes to show, where puts cannot be conditional


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lock. The host is a hash: names of machines do not belong into shared folders."""

    owner: str  # random
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
        self._me = Holder(
            owner=secrets.token_hex(8), host=this_host(), pid=os.getpid(), started=started_at(os.getpid()) or ""
        )
        self._generation = 0
        self._lost = ""
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat_until_stopped, name="driver-lock", daemon=True)

    def __enter__(self) -> DriverLock:
        self._fs, self._root = open_fs(self._sink.folder, self._sink.storage_options)
        self._new_folder = isinstance(self._fs, LocalFileSystem) and not Path(self._root).exists()
        self._conditional = creates_conditionally(self._fs, f"{self._root}/{FOLDER}/probe-{self._me.owner}")
        try:
            while not self._acquired():
                time.sleep(self._settle_s * (0.5 + secrets.randbelow(100) / 100))  # another driver was quicker
        except BaseException:
            self._remove_empty_folders()
            raise
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heart.join()
        try:
            if self._is_mine():
                remove(self._fs, self._path(self._generation))
        except SinkError as failed:  # the next driver on this machine sees the dead process, others wait
            log.warning("the lock of %s was not removed: %s", public_url(self._sink.folder), describe(failed))
        self._remove_empty_folders()

    @property
    def claim(self) -> Claim:
        """For workers, who cannot hear the heartbeat's thread."""
        return Claim(self._sink, self._generation, self._me.owner)

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

    def _path(self, generation: int) -> str:
        return lock_path(self._root, generation)

    def _generations(self) -> list[int]:
        return generations(self._fs, self._root)

    def _acquired(self) -> bool:
        """Take the lock, if need be over; false where another driver was quicker.

        Raises:
            SinkError: another driver is at work.
        """
        dead = self._generations()
        if dead:
            self._wait_for_death(dead[-1])
        generation = dead[-1] + 1 if dead else 1
        if not self._created(generation):
            return False
        if set(self._generations()) - set(dead) != {generation}:  # taken over, by another, while we looked
            remove(self._fs, self._path(generation))
            return False
        self._generation = generation
        for old in dead:
            remove(self._fs, self._path(old))
        return True

    def _created(self, generation: int) -> bool:
        me = replace(self._me, beat_at=time.time()).to_bytes()
        if self._conditional:
            return create(self._fs, self._path(generation), me)
        put(self._fs, self._path(generation), me)
        time.sleep(self._settle_s)
        return get(self._fs, self._path(generation)) == me

    def _wait_for_death(self, generation: int) -> None:
        """Return once the holder is known to be dead.

        Raises:
            SinkError: it is alive.
        """
        where = public_url(self._sink.folder)
        first = get(self._fs, self._path(generation))
        holder = parsed(first)
        if holder is not None and holder.host == self._me.host:
            if started_at(holder.pid) != holder.started:
                return
            raise self._refusal(holder, f"process {holder.pid} on this machine")
        self._notify(
            f"{where} is locked by a driver elsewhere. Watching its heartbeat for up to {self._expiry_s:.0f} s"
        )
        until = time.monotonic() + self._expiry_s
        while time.monotonic() < until:
            time.sleep(min(1.0, self._beat_s))
            now = get(self._fs, self._path(generation))
            if now is None:
                return  # it has just ended
            if now != first and (live := parsed(now)) is not None:
                raise self._refusal(live, "on another machine")

    def _refusal(self, holder: Holder, where: str) -> SinkError:
        age = max(0.0, time.time() - holder.beat_at)
        return SinkError(
            f"{public_url(self._sink.folder)} is being written by another driver ({where}, owner {holder.owner}, last "
            f"heartbeat {age:.0f} s ago). Wait until it ends, or end it: the same command then goes on from what is "
            "committed. Nothing needs to be removed by hand"
        )

    def _is_mine(self) -> bool:
        return self.claim.holds()

    def _beat_until_stopped(self) -> None:
        beat = 0
        while not self._stop.wait(self._beat_s):
            try:
                if not self._is_mine():
                    self._lost = (
                        f"{public_url(self._sink.folder)} was taken over by another driver, since this one could not "
                        f"be seen for {self._expiry_s:.0f} s. What is committed stays, and the other goes on"
                    )
                    self._on_lost(self._lost)
                    return
                beat += 1
                me = replace(self._me, beat=beat, beat_at=time.time())
                put(self._fs, self._path(self._generation), me.to_bytes())
            except SinkError as error:  # tried again with the next beat; a takeover shows as soon as the store answers
                log.warning("no heartbeat: %s", error)

    def _remove_empty_folders(self) -> None:
        """A run that was refused before it wrote anything leaves nothing behind."""
        if isinstance(self._fs, LocalFileSystem):
            with contextlib.suppress(OSError):
                os.rmdir(Path(self._root, FOLDER))
                if self._new_folder:
                    os.rmdir(self._root)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a driver holds, in a form that travels to where its units are written."""

    sink: SinkConfig
    generation: int
    owner: str

    def holds(self) -> bool:
        """Whether the lock is still that driver's. Two requests to an object store.

        Raises:
            SinkError: it cannot be read.
        """
        fs, root = open_fs(self.sink.folder, self.sink.storage_options)
        holder = parsed(get(fs, lock_path(root, self.generation)))
        return holder is not None and holder.owner == self.owner and generations(fs, root)[-1:] == [self.generation]

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


def lock_path(root: str, generation: int) -> str:
    """Where a generation's holder stands."""
    return f"{root}/{FOLDER}/{generation:08d}.json"


def generations(fs: AbstractFileSystem, root: str) -> list[int]:
    """Every generation that is there, ascending.

    Raises:
        SinkError: the folder cannot be listed.
    """
    fs.invalidate_cache()  # s3fs remembers listings
    stems = (posixpath.splitext(posixpath.basename(path)) for path in list_folder(fs, f"{root}/{FOLDER}"))
    return sorted(int(stem) for stem, suffix in stems if suffix == ".json" and stem.isdigit())


def create(fs: AbstractFileSystem, path: str, data: bytes) -> bool:
    """Write a file that must not exist yet; false where it does. Stores without conditions overwrite it.

    Raises:
        SinkError: the file cannot be written.
    """
    if isinstance(fs, LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        retrying()(fs.pipe_file, path, data, mode="create")
        return True
    except Exception as error:
        # A retried put may meet what its own first attempt wrote; the caller reads back who holds.
        if isinstance(error, FileExistsError) or _condition_failed(error):
            return get(fs, path) == data
        raise SinkError(
            f"{public_url(path)} cannot be written: {describe(error)}. Check sink.folder and its permissions"
        ) from error


def _condition_failed(error: Exception) -> bool:
    """S3-like servers differ in how they answer a failed condition; s3fs names only one way FileExistsError."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("Error", {}).get("Code") in {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}


def creates_conditionally(fs: AbstractFileSystem, path: str) -> bool:
    """Whether the store refuses to create what is there: tried on a file of its own, which is removed."""
    try:
        create(fs, path, b"first")
        return not create(fs, path, b"second")
    except SinkError as error:
        if isinstance(error.__cause__, TypeError):  # no such argument: a store that knows no conditions
            return False
        raise
    finally:
        with contextlib.suppress(Exception):
            fs.rm_file(path)


def parsed(data: bytes | None) -> Holder | None:
    """A holder as stored; None where it is absent or half written."""
    try:
        return Holder(**json.loads(data or b""))
    except (ValueError, TypeError):
        return None


def this_host() -> str:
    """A hash that two processes share exactly where each can see whether the other is alive."""
    parts = [platform.node()]
    if sys.platform == "linux":
        # Containers may share a kernel and a name, yet not their process ids; a reboot gives ids out anew.
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def started_at(pid: int) -> str | None:
    """When a process of this machine was started, in the kernel's ticks; None where it is dead."""
    if sys.platform == "linux":
        try:
            # After the name, which may hold anything and ends at the last ")": the state is field 3, the start 22.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""  # alive; its start is not known here
