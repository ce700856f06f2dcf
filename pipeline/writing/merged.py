"""Where a unit's rows stand once units are merged into files of their own size: the index, and how it is read.

    _output/index-GENERATION.json   every file that counts, in their order; put in one piece, the highest decides
    _output/KIND/NAME.json          the contents of one of them: its units, and where in the file their rows are

A unit's file that its manifest lists is in a merged file where that file is there with the indexed size and its
contents hold the unit with the listed hash; else it stands by itself, as before (writing/manifest.py). So a unit that
was done again counts by its own file until the next merging, and every reader sees every unit once.
"""

from __future__ import annotations

import logging
import posixpath
import re
from bisect import bisect_right
from dataclasses import dataclass
from threading import Lock
from typing import Literal

from fsspec import AbstractFileSystem
from pydantic import ValidationError, model_validator

from pipeline.common.showing import public_url
from pipeline.errors import SinkError
from pipeline.writing.baseline import LOOKS
from pipeline.writing.files import NotAFileError, get, list_folder
from pipeline.writing.manifest import KINDS, FileRecord, Manifest, Stored, kind_of, split_unit_id
from pipeline.writing.paths import (
    ContentsPath,
    Generation,
    MergedPath,
    NonNegative,
    Sha256,
    UnitId,
    first_problem,
    is_merged,
)

log = logging.getLogger(__name__)

OUTPUT = "_output"
INDEX = re.compile(r"index-(\d{8,})\.json")
CACHED = 32  # contents held at a time; units come in the order of the files


class MergedUnit(Stored):
    """Where one unit's rows are."""

    unit: UnitId
    sha256: Sha256  # of the unit's own file, as its manifest lists it
    rows: NonNegative
    start: NonNegative  # first row in the merged file
    begin: NonNegative = 0  # of a tar: its first byte in the merged file
    end: NonNegative = 0  # of a tar: the byte after its last


def contents_path(path: str) -> str:
    """Where the contents of a merged file stand."""
    return f"{OUTPUT}/{posixpath.splitext(path)[0]}.json"


class Contents(Stored):
    """What one merged file holds, in its order."""

    file: FileRecord
    units: tuple[MergedUnit, ...]

    @model_validator(mode="after")
    def _fills_its_file(self) -> Contents:
        row = byte = 0
        for one in self.units:
            if one.start != row or not byte == one.begin <= one.end:
                raise ValueError(f"unit {one.unit} does not begin where the one before it ends")
            row, byte = one.start + one.rows, one.end
        if not is_merged(self.file.path) or row != self.file.rows or byte > self.file.size:
            raise ValueError(f"{self.file.path} is no merged file of these units")
        return self


class Slot(Stored):
    """One merged file of the index. Its units are those from `first` up to the next slot's; the first slot has all
    before, too."""

    first: UnitId
    file: FileRecord | None  # None: it was damaged and taken back; its units are done again
    contents: ContentsPath

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Slot:
        if self.file and not (is_merged(self.file.path) and self.contents == contents_path(self.file.path)):
            raise ValueError(f"{self.file.path} is no merged file with contents in {self.contents}")
        return self


class Index(Stored):
    """Every merged file that counts, by kind."""

    schema_version: Literal[2] = 2
    generation: Generation  # of the driver that wrote it
    slots: dict[str, tuple[Slot, ...]]
    # Files that its driver, or an earlier one, may still be removing: no later driver uses these names.
    dying: tuple[MergedPath, ...] = ()

    @model_validator(mode="after")
    def _has_files_of_its_kinds(self) -> Index:
        for kind, slots in self.slots.items():
            others = [slot.file.path for slot in slots if slot.file and kind_of(slot.file.path) != kind]
            if kind not in KINDS or others:
                raise ValueError(f"{kind} is no kind of files, or not that of {', '.join(others)}")
        return self

    def to_bytes(self) -> bytes:
        """JSON in one fixed spelling."""
        return (self.model_dump_json(indent=1) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one unit and kind: a part of a file, or all of it."""

    path: str  # relative to the run's folder
    unit: str
    rows: int
    start: int = 0  # first row in the file
    begin: int = 0  # of a tar: its first byte in the file
    end: int | None = None  # of a tar: the byte after its last; None: the file's end
    size: int = 0  # bytes of the unit's own file, in which the rows stood first

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return kind_of(self.path)


def order(unit_id: str) -> tuple[str, int]:
    """Sort key of units: the order in which manifests are read, and rows stand in merged files."""
    slug, chunk = split_unit_id(unit_id)
    return slug, int(chunk)


class Merged:
    """The index of a run's folder, opened for reading.

    Args:
        fs: the file system.
        root: of the run's folder in it.
        trusted: a file that is missing or of another size does not count.
    """

    def __init__(self, fs: AbstractFileSystem, root: str, *, trusted: bool = True) -> None:
        self._fs, self._root, self._trusted = fs, root, trusted
        self._lock = Lock()
        self.reload()

    def reload(self) -> None:
        """Read the index anew: it may have been written in the meantime."""
        with self._lock:
            self._cache: dict[str, tuple[Contents, dict[str, MergedUnit]] | None] = {}
            self.path, self._data = _highest(self._fs, self._root)
            self.index = _parsed(self.path, self._data)
            self._sizes: dict[str, int] = {}
            if self.index and self._trusted:
                for kind in KINDS:
                    there = list_folder(self._fs, f"{self._root}/{kind}")
                    self._sizes |= {f"{kind}/{posixpath.basename(path)}": size for path, size in there.items()}
            self._firsts = {kind: [order(slot.first) for slot in self.slots(kind)] for kind in KINDS}

    @property
    def changed(self) -> bool:
        """Whether the index is another than when it was read."""
        return _highest(self._fs, self._root) != (self.path, self._data)

    def slots(self, kind: str) -> tuple[Slot, ...]:
        """The files of a kind, in their order."""
        return self.index.slots.get(kind, ()) if self.index else ()

    def counts(self, slot: Slot) -> bool:
        """Whether a slot's file is there."""
        if slot.file is None:
            return False
        return not self._trusted or self._sizes.get(slot.file.path) == slot.file.size

    @property
    def size(self) -> int:
        """Bytes of all files that count."""
        slots = [slot for kind in KINDS for slot in self.slots(kind)]
        return sum(slot.file.size for slot in slots if slot.file and self.counts(slot))

    def slot_of(self, kind: str, unit: str) -> Slot | None:
        """The slot in whose range a unit is, whether or not its file holds the unit."""
        slots = self.slots(kind)
        return slots[max(0, bisect_right(self._firsts[kind], order(unit)) - 1)] if slots else None

    def contents(self, slot: Slot) -> Contents | None:
        """What a slot's file holds; None where that is not known."""
        found = self._contents(slot)
        return found[0] if found else None

    def find(self, file: FileRecord, unit: str) -> Span | None:
        """Where a merged file holds what a unit's manifest lists; None where none does."""
        slot = self.slot_of(kind_of(file.path), unit)
        if slot is None or slot.file is None or not self.counts(slot):
            return None
        found = self._contents(slot)
        if found is None or (there := found[1].get(unit)) is None or there.sha256 != file.sha256:
            return None
        end = there.end if slot.file.path.endswith(".tar") else None
        return Span(slot.file.path, unit, there.rows, there.start, there.begin, end, file.size)

    def spans(self, manifest: Manifest) -> list[Span]:
        """Where the rows of a committed unit stand: one span per kind that it has."""
        unit = manifest.unit
        return [self.find(file, unit) or Span(file.path, unit, file.rows, size=file.size) for file in manifest.files]

    def _contents(self, slot: Slot) -> tuple[Contents, dict[str, MergedUnit]] | None:
        with self._lock:
            if slot.contents not in self._cache:
                while len(self._cache) >= CACHED:
                    del self._cache[next(iter(self._cache))]
                contents = read_contents(self._fs, self._root, slot.contents)
                if contents is not None and contents.file != slot.file:
                    contents = None
                by_unit = {one.unit: one for one in contents.units} if contents else {}
                self._cache[slot.contents] = (contents, by_unit) if contents else None
            return self._cache[slot.contents]


def read_contents(fs: AbstractFileSystem, root: str, path: str) -> Contents | None:
    """The contents of a merged file; None where they cannot be told.

    Raises:
        SinkError: the store cannot be read.
    """
    data = _get(fs, f"{root}/{path}")
    if data is None:
        return None
    try:
        return Contents.model_validate_json(data)
    except ValidationError as error:
        log.warning("%s is damaged, its units are done again: %s", path, first_problem(error))
        return None


def _get(fs: AbstractFileSystem, path: str) -> bytes | None:
    try:
        return get(fs, path)
    except NotAFileError as error:
        log.warning("%s", error)
        return None


def index_path(generation: int) -> str:
    """Where a driver's index stands, relative to the run's folder."""
    return f"{OUTPUT}/index-{generation:08d}.json"


def index_paths(fs: AbstractFileSystem, root: str) -> list[str]:
    """All indexes, relative to the run's folder, ascending: the last one counts.

    Raises:
        SinkError: they cannot be listed.
    """
    names = sorted(posixpath.basename(path) for path in list_folder(fs, f"{root}/{OUTPUT}"))
    return [f"{OUTPUT}/{name}" for name in names if INDEX.fullmatch(name)]


def _highest(fs: AbstractFileSystem, root: str) -> tuple[str, bytes | None]:
    """The index that counts, and its path; "" where there is none."""
    for _ in range(LOOKS):
        fs.invalidate_cache()
        paths = index_paths(fs, root)
        if not paths:
            return "", None
        try:
            data = get(fs, f"{root}/{paths[-1]}")
        except NotAFileError:
            data = b""
        if data is not None:
            return paths[-1], data
    raise SinkError(f"{public_url(f'{root}/{OUTPUT}')} changes all the time. Run the same command again")


def _parsed(path: str, data: bytes | None) -> Index | None:
    if data is None:
        return None
    try:
        index = Index.model_validate_json(data)
    except ValidationError as error:
        log.warning("%s is damaged, its units are done again: %s", path, first_problem(error))
        return None
    if path != index_path(index.generation):
        log.warning("%s is another driver's, its units are done again", path)
        return None
    return index
