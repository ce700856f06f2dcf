"""Rows of a WebDataset tar: consecutive members with one key are a sample, the key ends at the first dot.

Our own walk stands below it (see tar.py). Every member ends in a sample, in a reported row, or is no sample's by
WebDataset's rules: directories, hidden files and `__meta__` names. Memory: one sample, at most
`source.max_member_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from pipeline.reading.rows import (
    Names,
    build_sample,
    choose_image,
    damaged_row,
    dotted_images,
    extension,
    listed,
    no_image,
)
from pipeline.reading.tar import Damage, Entry, Stream, TarWalk
from pipeline.recipe import SourceConfig
from pipeline.records import Sample, Unreadable

Row = Sample | Unreadable
GZIP = b"\x1f\x8b"


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension by WebDataset's rule, split at the first dot after the last slash; None: no sample's member."""
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    if base.startswith(".") or any(part.startswith("__") and part.endswith("__") for part in name.split("/")):
        return None
    stem, _, rest = base.partition(".")
    return folder + slash + stem, extension(rest)


@dataclass
class _Pending:
    """The sample that is being collected."""

    key: str
    wanted: bool  # whether its content is kept
    after_damage: Damage | None
    names: list[str] = field(default_factory=list)  # extensions of its members, also of those that are not kept
    parts: dict[str, bytes] = field(default_factory=dict)  # content by extension
    size: int = 0
    problem: str = ""
    damages: list[Damage] = field(default_factory=list)  # seen since its last member


class _Grouping:
    """Collects entries into rows. A row that nobody wants is None, so that the count stays."""

    def __init__(self, shard: str, source: SourceConfig, wants: Callable[[int], bool]) -> None:
        self.shard = shard
        self.source = source
        self.wants = wants
        self.index = 0
        self.names = Names()
        self.usual: set[str] = set()  # extensions of the last sample far from any damage
        self.pending: _Pending | None = None
        self.last_damage: Damage | None = None  # directly before what comes next

    def entry(self, entry: Entry, walk: TarWalk) -> Iterator[Row | None]:
        """Take one member; yields the rows that are complete by now."""
        if entry.oddity == "a directory" or (split := split_name(entry.name)) is None:
            return
        key, name = split
        if self.pending is not None and self.pending.key == key:
            if self.pending.damages and not self.pending.problem:
                first = self.pending.damages[0]
                self.pending.problem = f"the archive is damaged at byte {first.start}, inside this sample"
        else:
            yield from self.flush()
            self.pending = _Pending(key, self.wants(self.index), self.last_damage)
        self.last_damage = None
        self._add(self.pending, name, entry, walk)

    def damage(self, damage: Damage) -> Iterator[Row | None]:
        """Take a damage. It is reported behind the sample it follows, which may go on after it."""
        self.last_damage = damage
        if self.pending is None:
            yield self._damaged(damage)
            return
        self.pending.damages.append(damage)
        if damage.inside_member and not self.pending.problem:
            self.pending.problem = damage.reason

    def flush(self) -> Iterator[Row | None]:
        """Finish the pending sample and what is reported behind it."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        self._compare_with_neighbours(pending)
        images = dotted_images(pending.names, self.source)
        if len(images) > 1 and choose_image(pending.names, self.source) is None:
            yield from self._merged(pending, images)
        else:
            yield self._row(pending)
        for damage in pending.damages:
            yield self._damaged(damage)

    def _add(self, pending: _Pending, name: str, entry: Entry, walk: TarWalk) -> None:
        limit = self.source.max_member_bytes
        problem = ""
        if entry.oddity:
            problem = f"member {entry.name} is {entry.oddity}, not a file: only files are read"
        elif not name:
            problem = f"member {entry.name} has no extension, so it cannot be told what it holds"
        elif name in pending.names:
            problem = f"member {name} is there twice"
        elif entry.size > limit:
            problem = f"member {name} has {entry.size} bytes, more than source.max_member_bytes ({limit})"
        elif pending.size + entry.size > limit:
            problem = f"its members together have more bytes than source.max_member_bytes ({limit}) allows"
        elif pending.wanted:
            content = walk.content()
            if len(content) == entry.size:  # a cut one is reported by the walk, next
                pending.parts[name] = content
        pending.size += entry.size
        pending.problem = pending.problem or problem
        if name and name not in pending.names:
            pending.names.append(name)

    def _compare_with_neighbours(self, pending: _Pending) -> None:
        """A sample at the edge of a damage may have lost members in it, such as its edit request: then it has fewer
        than its neighbours, and is reported."""
        touched = pending.damages[0] if pending.damages else pending.after_damage
        if touched is None:
            if not pending.problem:
                self.usual = set(pending.names)
        elif not pending.problem and (lost := sorted(self.usual - set(pending.names))):
            pending.problem = f"it stands beside the damage at byte {touched.start} and lacks what its neighbours have: {listed(lost)}"

    def _row(self, pending: _Pending) -> Row | None:
        name, repeated = self.names.take(pending.key, self.index)
        index, self.index = self.index, self.index + 1
        if not pending.wanted:
            return None
        problem = pending.problem
        if repeated and not problem:
            problem = "its key was there before: a sample's members must follow each other. Sort the archive by name"
        if problem and not pending.parts:
            return damaged_row(self.shard, pending.key, name, index, problem)
        return build_sample(
            pending.parts, self.source, shard=self.shard, key=pending.key, name=name, index=index, problem=problem
        )

    def _merged(self, pending: _Pending, images: list[str]) -> Iterator[Row | None]:
        """Several images that were meant as samples of their own share a key: one row for each, none of them edited."""
        reason = no_image(images, self.source)
        for image in images:
            name, _ = self.names.take(pending.key, self.index)
            index, self.index = self.index, self.index + 1
            message = (
                f"file {pending.key}.{image}: a key ends at the first dot, so this file shares the key "
                f"'{pending.key}' with {len(images) - 1} other(s): {reason}, or name files without further dots"
            )
            yield damaged_row(self.shard, pending.key, name, index, message) if self.wants(index) else None

    def _damaged(self, damage: Damage) -> Row | None:
        key = f"@{damage.start}"
        name, _ = self.names.take(key, self.index)
        index, self.index = self.index, self.index + 1
        span = f"bytes {damage.start} to {damage.stop} could not be read" if damage.stop > damage.start else "it ends"
        message = f"the shard is damaged at byte {damage.start}: {damage.reason}; {span}"
        return damaged_row(self.shard, key, name, index, message) if self.wants(index) else None


def is_packed(file: BinaryIO, url: str) -> bool:
    """Whether a tar is gzip-packed: by its first bytes, or by its name where the stream cannot go back."""
    if not file.seekable():
        return url.endswith((".gz", ".tgz"))
    magic = file.read(len(GZIP))
    file.seek(0)
    return magic == GZIP


def read_rows(
    file: BinaryIO, *, shard: str, url: str, size: int | None, source: SourceConfig, wants: Callable[[int], bool]
) -> Iterator[Row | None]:
    """Every row of a tar in order; None for a row whose index nobody `wants`: its content is passed over.

    Raises:
        OSError: the store broke off; another attempt from a fresh open may succeed.
    """
    walk = TarWalk(Stream(file, size, is_packed(file, url)))
    grouping = _Grouping(shard, source, wants)
    for item in walk:
        yield from grouping.damage(item) if isinstance(item, Damage) else grouping.entry(item, walk)
    yield from grouping.flush()
