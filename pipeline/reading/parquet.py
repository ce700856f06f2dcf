"""Parquet files, read in a process that may be killed: their footers, dictionaries and pages may claim anything.

That process (reading/parquet_rows.py) gets a file that asks this one for its bytes, piece by piece: it knows neither
the store nor its credentials. Rows come back as JSON and bytes.

Memory: beside `source.read_memory` of that process, one row here and one piece of the file.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipeline.reading.channel import ClosedError, LateError
from pipeline.reading.guarded import BreachError, Guarded, Limits, borrowed, done_by_guarded
from pipeline.reading.rows import damaged_row
from pipeline.reading.rows_as_json import Labels, unpack_row
from pipeline.reading.shards import DamagedFileError, NoImageColumnError
from pipeline.recipe import SourceConfig
from pipeline.samples import ReadRow

BATCH_ROWS = 16  # decoded at a time: bounds memory
PIECE = 8 << 20  # bytes of the file that are sent at once
TAIL = 64 << 10  # bytes of a file's end that are fetched at first: most footers are shorter
MAX_FOOTER = 64 << 20  # bytes; real ones have a few megabytes
PARSERS = 2  # footers that are parsed side by side

_parsers = threading.Semaphore(PARSERS)


class _DamagedGroupError(Exception):
    """A part of the file cannot be read."""


@dataclass(frozen=True, slots=True)
class Footer:
    """What a footer says of a file's size."""

    row_groups: tuple[int, ...]  # rows of each
    row_bytes: int  # of a row on average, unpacked, in the row group where that is most


def read_footer(file: BinaryIO, source: SourceConfig) -> Footer:
    """What the footer of a file says.

    Raises:
        NoImageColumnError: lists the columns that there are.
        DamagedFileError: it is no Parquet, is cut, contradicts itself, or takes too much to read.
        OSError: the store broke off.
    """
    size = file.seek(0, 2)
    tail = _tail_of(file, size)

    def parsed(guarded: Guarded) -> dict[str, Any]:
        conversation = _Conversation(guarded, file, size)
        conversation.ask({"job": "footer", **_question(source, size, tail)}, tail)
        return conversation.answer()[0]

    try:
        with _parsers:
            head = done_by_guarded(Limits.for_parquet(source), parsed)
    except BreachError as breach:
        raise DamagedFileError(f"reading its footer {breach}") from None
    if "no_image" in head:
        raise NoImageColumnError(head["no_image"])
    if "damaged" in head:
        raise DamagedFileError(head["damaged"])
    return Footer(tuple(head["row_groups"]), head["row_bytes"])


def read_rows(
    open_file: Callable[[], BinaryIO],
    *,
    shard: str,
    start: int,
    stop: int | None,
    source: SourceConfig,
    wants: Callable[[int], bool],
) -> Iterator[ReadRow | None]:
    """Rows [start, stop) in order; None for a row whose index nobody `wants`.

    A file that cannot be read at all gives one Unreadable. A page that is damaged, or takes too much to read, gives one
    for every row that it costs: but first the damaged one is read again from a fresh open, the other one row by row.

    Raises:
        OSError: the store broke off; another attempt may succeed.
    """
    position, failed_at, batch = start, -1, BATCH_ROWS
    while True:
        while stop is not None and position < stop and not wants(position):
            yield None
            position += 1
        if position == stop and position > start:
            return
        reader = _FileReader(shard, source, position, stop, batch)
        try:
            for row in reader.rows(open_file):
                yield row if wants(position) else None
                position += 1
            return
        except (DamagedFileError, _DamagedGroupError, BreachError) as error:
            if failed_at != position:
                failed_at = position
                batch = 1 if isinstance(error, BreachError) else batch
                continue
            problem = f"it {error}" if isinstance(error, BreachError) else f"{error}"
            if not reader.row_groups:
                lost, message = position + 1 if stop is None else stop, f"the shard cannot be read: {problem}"
            else:
                group, first, lost = _group_at(reader.row_groups, position)
                part = f"row group {group} of the shard (rows {first} to {lost - 1})"
                what = f"{error}" if isinstance(error, BreachError) else f"is damaged: {error}"
                message = f"{part} {what}"
            while position < (lost if stop is None else min(lost, stop)):
                row = damaged_row(shard, f"@{position}", f"@{position}", position, message)
                yield row if wants(position) else None
                position += 1
            if not reader.row_groups or position == sum(reader.row_groups):
                return
            batch = BATCH_ROWS


class _FileReader:
    """One attempt to read rows from a position on."""

    def __init__(self, shard: str, source: SourceConfig, start: int, stop: int | None, batch: int) -> None:
        self._source = source
        self._about = {"job": "rows", "shard": shard, "start": start, "stop": stop, "batch": batch}
        self._labels: Labels = {}
        self.row_groups: tuple[int, ...] = ()  # once they are known

    def rows(self, open_file: Callable[[], BinaryIO]) -> Iterator[ReadRow]:
        with open_file() as file:
            size = file.seek(0, 2)
            tail = _tail_of(file, size)
            with borrowed(Limits.for_parquet(self._source)) as guarded:
                conversation = _Conversation(guarded, file, size)
                conversation.ask(self._about | _question(self._source, size, tail), tail)
                while True:
                    head, blobs = conversation.answer()
                    if "row" in head:
                        yield unpack_row(head["row"], [bytes(blob) for blob in blobs], self._labels)
                    elif "row_groups" in head:
                        self.row_groups = tuple(head["row_groups"])
                        self._labels = {name: tuple(classes) for name, classes in head["labels"].items()}
                    else:
                        break
        if "damaged" in head or "no_image" in head:
            problem = head.get("damaged") or head["no_image"]
            raise _DamagedGroupError(problem) if self.row_groups else DamagedFileError(problem)


class _Conversation:
    """Questions to, and answers from, a process that reads a file for us."""

    def __init__(self, guarded: Guarded, file: BinaryIO, size: int) -> None:
        self._guarded, self._file, self._size = guarded, file, size

    def ask(self, question: dict[str, Any], tail: bytes) -> None:
        """Send a job."""
        with self._breaches():
            self._guarded.channel.send(question, [tail], seconds=self._guarded.limits.wall_seconds)

    def answer(self) -> tuple[dict[str, Any], list[bytearray]]:
        """The next message that is no request for bytes of the file; those are served.

        Raises:
            BreachError: the process broke a limit.
            OSError: the store broke off.
        """
        while True:
            with self._breaches():
                head, blobs = self._guarded.channel.receive(seconds=self._guarded.limits.wall_seconds)
                if "memory" in head:
                    raise MemoryError
            if "fault" in head:
                raise RuntimeError(f"the reader has a fault:\n{head['fault']}")
            if "read" not in head:
                return head, blobs
            data = self._piece(*head["read"])
            with self._breaches():
                self._guarded.channel.send({}, [data], seconds=self._guarded.limits.wall_seconds)

    def _piece(self, start: int, count: int) -> bytes:
        count = max(0, min(count, PIECE, self._size - start))
        return _read_exactly(self._file, start, count)

    @contextmanager
    def _breaches(self) -> Iterator[None]:
        """Turn the end of the process into an error that names the limit it broke."""
        try:
            yield
        except (ClosedError, LateError, MemoryError) as error:
            raise self._guarded.breach(error) from None


def _question(source: SourceConfig, size: int, tail: bytes) -> dict[str, Any]:
    known = source.model_dump(mode="json", exclude={"storage_options", "shards"})
    return {"source": {**known, "shards": ["unused"]}, "size": size, "tail": size - len(tail)}


def _tail_of(file: BinaryIO, size: int) -> bytes:
    """The end of a file, with its footer.

    Raises:
        DamagedFileError: the footer claims to be longer than any real one.
    """
    tail = _read_exactly(file, max(0, size - TAIL), min(size, TAIL))
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != b"PAR1" or not len(tail) < length <= size:
        return tail  # holds the whole footer; or it is damaged, as the reader will say
    if length > MAX_FOOTER:
        raise DamagedFileError(f"its footer claims {length} bytes, more than the {MAX_FOOTER} that are read")
    return _read_exactly(file, size - length, length)


def _read_exactly(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    data = file.read(count)
    if len(data) != count:
        raise OSError(errno.EIO, f"the store sent {len(data)} of {count} bytes")
    return data


def _group_at(row_groups: tuple[int, ...], position: int) -> tuple[int, int, int]:
    """Row group that holds a row, its first row, and the index after its last row."""
    after = 0
    for group, count in enumerate(row_groups):
        first, after = after, after + count
        if position < after:
            return group, first, after
    raise IndexError(position)
