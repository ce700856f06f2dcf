"""Rows as they are read, and the units that they come in.

Apart from what may be asked of a row (records.py), which knows of rewards and so of torch: the processes that read what
strangers wrote (reading/guarded.py) have no use for a quarter of a gigabyte of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row of the source as read: nothing decoded, nothing checked."""

    id: str  # shard path relative to the source, "/" and the key; "#index" follows where a shard repeats a key
    shard: str  # shard path relative to the source
    key: str  # the row's label; unique within its shard only
    index: int  # ordinal of the sample in its shard, from 0
    image: bytes  # encoded, as stored
    image_name: str = ""  # member or column that held the image, e.g. "png"
    image_path: str = ""  # name of the image's file, as the source tells it; "" where it tells none
    caption: str = ""
    mask: bytes | None = None  # encoded user mask, where the row brings one
    edits: Any = None  # the row's own edit request(s), unparsed; None: the job's edits apply
    columns: Mapping[str, Any] = field(default_factory=dict)  # JSON-able source columns
    members: Mapping[str, bytes] = field(default_factory=dict)  # other binary members of the sample
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # columns that are numbers of classes: names
    set_id: str = ""  # noise derives from it where it is one of several rows of a set; "": from the row's own id
    blank: bool = False  # there is no image: a grey canvas of the model's size stands for it

    @property
    def noise_id(self) -> str:
        """What the noise of its results derives from."""
        return self.set_id or self.id

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory, about."""
        return len(self.image) + len(self.mask or b"") + sum(map(len, self.members.values())) + len(self.caption)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A row that stands in the source but could not be read: its sample holds what is known, mostly coordinates."""

    sample: Sample
    error_class: str
    message: str  # without addresses, times and hosts; names the offset where a shard is damaged


ReadRow = Sample | Unreadable
"""A row as it was read, or why it could not be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A fixed chunk of one input shard: what is planned, edited and committed as a whole."""

    id: str  # safe as a file name; derives from the shard's relative path and the chunk alone
    shard: str  # path relative to the source
    chunk: int  # from 0
    start: int  # index of its first row in the shard
    stop: int  # index after its last row
    is_last: bool  # whether it is the shard's last unit


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitInput:
    """A unit and its rows, in the order of the shard."""

    unit: Unit
    shard_size: int  # bytes of the shard, as listed
    shard_etag: str  # version of the shard as the store tells it; "" where it tells none
    rows: tuple[ReadRow, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that its rows take in memory, about."""
        return sum(row.nbytes for row in self.rows if isinstance(row, Sample))
