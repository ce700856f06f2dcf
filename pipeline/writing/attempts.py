"""Who killed the process? A unit's attempts, noted before its rows meet the model, outlive a process that dies there.

    _attempts/<unit>.json        there while a unit is at work, and after its process died

A unit whose process has died twice is done alone in its process, one row after the other, each noted before it begins.
A row that is found noted after yet another death is not touched again: it goes to quarantine, its unit mates are kept.
Deaths are counted whatever their cause, since a process that is killed cannot say why: a machine that is lost three
times with one and the same unit at work counts as well. An exception is no death, and takes its attempt back.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from types import TracebackType

from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.files import get, put, remove

FOLDER = "_attempts"
ALONE_FROM = 3  # the attempt from which on a unit is done row by row


@dataclass(slots=True)
class _Noted:
    """What the file holds."""

    deaths: int = 0  # of processes that had this unit at work
    row: int | None = None  # index of the row at work; None where the whole unit is
    killers: list[int] = field(default_factory=list)  # indexes of rows that are not to be touched again

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()


class Attempt:
    """One attempt at a unit, as a context manager: noted on entering, forgotten when it is left alive.

    Costs an object store three requests per unit.

    Raises:
        SinkError: on entering, the sink cannot be read or written.
    """

    def __init__(self, unit_id: str, sink: SinkConfig) -> None:
        self._unit_id, self._sink = unit_id, sink

    def __enter__(self) -> Attempt:
        self._fs, root = open_fs(self._sink.folder, self._sink.storage_options)
        self._path = f"{root}/{FOLDER}/{self._unit_id}.json"
        before = _parsed(get(self._fs, self._path))
        self._before = _Noted(before.deaths, None, before.killers + ([] if before.row is None else [before.row]))
        self._note(None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not self._before.deaths:
            remove(self._fs, self._path)
        else:
            put(self._fs, self._path, self._before.to_bytes())

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
        # As it is to be found after a death: nobody is left to count it then.
        put(self._fs, self._path, _Noted(self.number, row, self._before.killers).to_bytes())


def _parsed(data: bytes | None) -> _Noted:
    try:
        return _Noted(**json.loads(data)) if data else _Noted()
    except (ValueError, TypeError):
        return _Noted()
