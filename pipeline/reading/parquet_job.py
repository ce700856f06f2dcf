"""The guarded process's side of reading Parquet: a file whose bytes come on request, and rows as messages."""

from __future__ import annotations

import io
import json
from typing import Any, BinaryIO, Protocol, cast

import pyarrow as pa
from typing_extensions import override

from pipeline.common.showing import describe
from pipeline.reading.channel import Answer, Channel
from pipeline.reading.parquet_rows import (
    Builder,
    is_damage,
    layout_of,
    names_of_repeated_keys,
    open_parquet,
    rows_of,
)
from pipeline.reading.rows import damaged_row
from pipeline.reading.rows_as_json import pack_row
from pipeline.reading.shards import DamagedFileError, NoImageColumnError
from pipeline.samples import ReadRow, Unreadable
from pipeline.settings.sections import SourceConfig

MAX_TEXT = 16 << 20  # bytes of JSON that all but a row's pictures and members may become
KEYS_TIMES = 10  # the CPU time of some rows that all keys of a file may take


class Allow(Protocol):
    """Gives more CPU time from now on."""

    def __call__(self, times: int = 1) -> None:
        """So many times what some rows may take."""


def answer(channel: Channel, head: dict[str, Any], tail: bytes, allow: Allow) -> Answer:
    """Do one job; rows are sent on the way, and the last message is what is returned."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    source = SourceConfig.model_validate(head["source"])
    file = RemoteFile(channel, head["size"], head["tail"], tail)
    try:
        opened = open_parquet(cast(BinaryIO, file), head["size"])
        layout = layout_of(opened, source)
        if head["job"] == "footer":
            return {"row_groups": layout.row_groups, "row_bytes": layout.row_bytes}, []
        allow(KEYS_TIMES)
        names = names_of_repeated_keys(opened, layout)
        channel.send({"row_groups": layout.row_groups, "labels": layout.labels})
        allow()
        stop = sum(layout.row_groups) if head["stop"] is None else head["stop"]
        builder = Builder(head["shard"], source, layout, names)
        for row in rows_of(opened, layout, range(head["start"], stop), builder, head["batch"]):
            channel.send(*_packed(row))
            allow()
    except NoImageColumnError as error:
        return {"no_image": str(error)}, []
    except Exception as error:
        if not is_damage(error):
            raise
        return {"damaged": str(error) if isinstance(error, DamagedFileError) else describe(error)}, []
    return {"done": True}, []


def _packed(row: ReadRow) -> Answer:
    blobs: list[bytes] = []
    text = json.dumps(pack_row(row, blobs), default=str)
    if len(text) <= MAX_TEXT:
        return {"row": json.loads(text)}, blobs
    sample = row.sample if isinstance(row, Unreadable) else row
    name, problem = f"@{sample.index}", f"its columns hold more than {MAX_TEXT} bytes of text and numbers"
    return {"row": pack_row(damaged_row(sample.shard, name, name, sample.index, problem), blobs := [])}, blobs


class RemoteFile(io.RawIOBase):
    """A file of the other process: its end is here, the rest is asked for."""

    def __init__(self, channel: Channel, size: int, tail_at: int, tail: bytes) -> None:
        super().__init__()
        self._channel, self._size, self._tail_at, self._tail = channel, size, tail_at, tail
        self._at = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._at

    @override
    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + {0: 0, 1: self._at, 2: self._size}[whence]
        return self._at

    @override
    def read(self, count: int | None = -1) -> bytes:
        """As many bytes as are asked for, if the file has them: no claim of it reserves more than that."""
        left = max(0, self._size - self._at)
        data = bytearray(left if count is None or count < 0 else min(count, left))
        with memoryview(data) as view:
            done = 0
            while done < len(data):
                done += self._piece(view[done:])
        return cast(bytes, data)  # no copy: pyarrow takes any buffer

    @override
    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer).cast("B") as view:
            return self._piece(view) if len(view) and self._at < self._size else 0

    def _piece(self, view: memoryview) -> int:
        if self._at >= self._tail_at:
            piece: bytes | bytearray = self._tail[self._at - self._tail_at :][: len(view)]
        else:
            self._channel.send({"read": [self._at, min(len(view), self._tail_at - self._at)]})
            _, (piece,) = self._channel.receive()
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
