"""Which row killed the process? A unit's attempts are noted before its rows reach the model: notes outlive a process.

    _attempts/UNIT-GENERATION.json     there while a unit is at work, and after its process died
    _attempts/GENERATION.stopped       that driver was told to stop, or ended by itself

A driver takes over the notes of earlier ones as it begins (writing/cleaning.py). Workers of theirs that still live
write notes under names of their own.

After two deaths a unit is done alone in its process, row by row, each row noted before it begins. A row that is noted
at a third death goes to quarantine and is not tried again; the other rows of the unit are kept. Every death counts,
since a killed process cannot say why it died: also the loss of a machine, three times with the same unit at work. An
exception is no death: it takes its attempt back. Nor is the orderly end of a driver: what its workers had at work
counts as not begun (`note_stop`). A worker that is told to end takes its own attempts back.
"""

from __future__ import annotations

import json
import posixpath
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import NamedTuple

from fsspec import AbstractFileSystem

from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.files import from_json, get, list_folder, put, remove
from pipeline.writing.manifest import split_generation, split_unit_id

FOLDER = "_attempts"
STOPPED = ".stopped"
ALONE_FROM = 3  # the attempt from which on a unit is done row by row


def note_path(unit_id: str, generation: int) -> str:
    """Where a unit's attempts are noted, relative to the run's folder."""
    return f"{FOLDER}/{unit_id}-{generation:08d}.json"


@dataclass(slots=True)
class _Noted:
    """What the file holds."""

    deaths: int = 0  # of processes that had this unit at work
    row: int | None = None  # index of the row at work; None where the whole unit is
    killers: list[int] = field(default_factory=list)  # indexes of rows that are not to be touched again
    generation: int = 0  # of the driver under which the latest attempt began

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()


class Attempt:
    """One attempt at a unit, as a context manager: noted on entering, forgotten when it is left alive.

    Costs an object store three requests per unit.

    Args:
        unit_id: of the unit.
        sink: the run's folder.
        generation: of the driver (writing/lock.py).

    Raises:
        SinkError: on entering, the sink cannot be read or written.
    """

    def __init__(self, unit_id: str, sink: SinkConfig, generation: int) -> None:
        self._unit_id, self._sink, self._generation = unit_id, sink, generation
        self._lock = threading.Lock()
        self._taken_back = False

    def __enter__(self) -> Attempt:
        self._fs, root = open_fs(self._sink.folder, self._sink.storage_options)
        self._path = f"{root}/{note_path(self._unit_id, self._generation)}"
        before = _parsed(get(self._fs, self._path))
        if before.deaths and get(self._fs, _stop_path(root, before.generation)) is not None:
            before.deaths, before.row = before.deaths - 1, None
        self._before = _Noted(before.deaths, None, before.killers + ([] if before.row is None else [before.row]))
        self._note(None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            remove(self._fs, self._path)
        else:
            self.take_back()

    def take_back(self) -> None:
        """Count the attempt as not begun: its process is about to end, and by no row's fault. From any thread.

        Raises:
            SinkError: the sink cannot be written.
        """
        with self._lock:
            self._taken_back = True
            if self._before.deaths:
                put(self._fs, self._path, self._before.to_bytes())
            else:
                remove(self._fs, self._path)

    @property
    def number(self) -> int:
        """From 1."""
        return self._before.deaths + 1

    @property
    def killers(self) -> list[int]:
        """Indexes of the rows that killed their process."""
        return self._before.killers

    def begin_row(self, index: int | None) -> None:
        """Note that one row alone is at work from now on, or that none is any more.

        Raises:
            SinkError: the sink cannot be written.
        """
        self._note(index)

    def _note(self, row: int | None) -> None:
        # As it shall read after a death, when nobody is left to count it.
        noted = _Noted(self.number, row, self._before.killers, self._generation)
        with self._lock:
            if not self._taken_back:
                put(self._fs, self._path, noted.to_bytes())


class Note(NamedTuple):
    """A unit's attempts, as noted under one driver."""

    unit: str
    generation: int


def notes_there(fs: AbstractFileSystem, root: str) -> list[Note]:
    """All notes in a run's folder.

    Raises:
        SinkError: they cannot be listed.
    """
    named = (split_generation(path) for path in list_folder(fs, f"{root}/{FOLDER}"))
    # What is not named like a unit's is not ours.
    return sorted(Note(*name) for name in named if name is not None and split_unit_id(name[0])[1].isdecimal())


def take_over(notes: Iterable[Note], sink: SinkConfig, generation: int) -> None:
    """Carry deaths that were noted under earlier drivers over to this one, from the latest note of each unit.

    Raises:
        SinkError: a note cannot be read or written.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    for unit, noted in dict(sorted(notes)).items():
        data = get(fs, f"{root}/{note_path(unit, noted)}")
        if data is not None and noted < generation:
            put(fs, f"{root}/{note_path(unit, generation)}", data)


def note_stop(sink: SinkConfig, generation: int) -> None:
    """Note that a driver ends: attempts that its workers have under way no longer count as deaths.

    Raises:
        SinkError: the sink cannot be written.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    put(fs, _stop_path(root, generation), b"")


def forget_stops(sink: SinkConfig) -> None:
    """Remove the notes that `note_stop` wrote, of drivers without attempts.

    Raises:
        SinkError: the sink cannot be read, or something cannot be removed.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()  # s3fs remembers listings
    there = list_folder(fs, f"{root}/{FOLDER}")
    stops = [path for path in there if path.endswith(STOPPED)]
    if not stops:
        return
    asked_for = {_parsed(get(fs, path)).generation for path in there if path.endswith(".json")}
    for path in stops:
        if posixpath.basename(path) not in {f"{generation:08d}{STOPPED}" for generation in asked_for}:
            remove(fs, path)


def _stop_path(root: str, generation: int) -> str:
    return f"{root}/{FOLDER}/{generation:08d}{STOPPED}"


def _parsed(data: bytes | None) -> _Noted:
    try:
        return _Noted(**from_json(data)) if data else _Noted()
    except (ValueError, TypeError):
        return _Noted()
