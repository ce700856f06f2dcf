"""Rows of a WebDataset tar: consecutive members with one key are a sample, the key ends at the first dot.

Members come from our own walk (tar.py). Each ends up in a sample or in a reported row, but for those that WebDataset's
rules leave out: directories, hidden files and `__meta__` names. Memory: one sample (three beside a damage), each of at
most `source.max_member_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from pipeline.reading.rows import (
    JSON_WEIGHT,
    MAX_JSON,
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
from pipeline.samples import ReadRow

GZIP = b"\x1f\x8b"
MAX_MEMBERS = 1000  # of a sample
LOOKAHEAD = 2  # samples at the edge of a damage that wait for one far from it


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
class _PendingSample:
    """The sample that is being collected."""

    key: str
    wanted: bool  # whether its content is kept
    after_damage: Damage | None
    names: list[str] = field(default_factory=list)  # extensions of its members, also of those that are not kept
    parts: dict[str, bytes] = field(default_factory=dict)  # content by extension
    size: int = 0  # bytes of its members
    held: int = 0  # bytes of those that a wanted sample keeps: what it adds to its unit
    problem: str = ""
    damages: list[Damage] = field(default_factory=list)  # seen since its last member

    @property
    def touched(self) -> Damage | None:
        """The damage beside it."""
        return self.damages[0] if self.damages else self.after_damage

    @property
    def is_undecided(self) -> bool:
        """Whether only a comparison with its neighbours can tell if it is whole."""
        return self.touched is not None and not self.problem


@dataclass
class _NumberedRow:
    """A row whose index and key are decided: a sample, or a message in place of one."""

    index: int
    key: str
    name: str  # the id's part after the shard
    repeated: bool
    pending: _PendingSample | None = None
    message: str = ""


class _Grouping:
    """Collects entries into rows. A row that nobody wants is None, so that the count stays."""

    def __init__(
        self, shard: str, source: SourceConfig, wants: Callable[[int], bool], sized: Callable[[int], None]
    ) -> None:
        self.shard = shard
        self.source = source
        self.wants = wants
        self.sized = sized
        self.index = 0
        self.names = Names()
        self.usual: set[str] | None = None  # extensions of the last sample far from any damage
        self.pending: _PendingSample | None = None
        self.last_damage: Damage | None = None  # directly before what comes next
        self.numbered: list[_NumberedRow] = []  # not handed out yet

    def entry(self, entry: Entry, walk: TarWalk) -> Iterator[ReadRow | None]:
        """Take one member; yields the rows that are complete by now."""
        if entry.oddity == "a directory" or (split := split_name(entry.name)) is None:
            return
        key, name = split
        if self.pending is not None and self.pending.key == key:
            if self.pending.damages and not self.pending.problem:
                first = self.pending.damages[0]
                self.pending.problem = f"the archive is damaged at byte {first.start}, inside this sample"
        else:
            self._close()
            yield from self.rows()
            self.pending = _PendingSample(key, self.wants(self.index), self.last_damage)
        self.last_damage = None
        self._add(self.pending, name, entry, walk)

    def damage(self, damage: Damage) -> Iterator[ReadRow | None]:
        """Take a damage. It is reported after the sample before it, which may go on behind it."""
        self.last_damage = damage
        if self.pending is None:
            self._number_damage(damage)
            yield from self.rows()
            return
        self.pending.damages.append(damage)
        if damage.inside_member and not self.pending.problem:
            self.pending.problem = damage.reason

    def end(self) -> Iterator[ReadRow | None]:
        """Finish what is left."""
        self._close()
        yield from self.rows(at_end=True)

    def rows(self, at_end: bool = False) -> Iterator[ReadRow | None]:
        """Hand out what is complete. A sample at the edge of a damage waits for a neighbour to be compared with."""
        undecided = [row for row in self.numbered if row.pending and row.pending.is_undecided]
        if self.usual is None and undecided and len(undecided) <= LOOKAHEAD and not at_end:
            return
        numbered, self.numbered = self.numbered, []
        for row in numbered:
            yield self._row(row) if self.wants(row.index) else None

    def _add(self, pending: _PendingSample, name: str, entry: Entry, walk: TarWalk) -> None:
        if len(pending.names) == MAX_MEMBERS:
            pending.problem = pending.problem or f"it has more than {MAX_MEMBERS} members"
            return
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
        elif name == "json" and entry.size > MAX_JSON:
            problem = f"member json has {entry.size} bytes, more than the {MAX_JSON} that are parsed"
        else:
            pending.held += entry.size * (JSON_WEIGHT if name == "json" else 1)
        if not problem and pending.wanted:
            content = walk.content()
            if len(content) == entry.size:  # a cut one is reported by the walk, next
                pending.parts[name] = content
        pending.size += entry.size
        pending.problem = pending.problem or problem
        if name and name not in pending.names:
            pending.names.append(name)

    def _close(self) -> None:
        """Number the pending sample, and the damages seen since."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        if pending.touched is None and not pending.problem:
            self.usual = set(pending.names)
        images = dotted_images(pending.names, self.source)
        if len(images) > 1 and choose_image(pending.names, self.source) is None:
            # Several images that were meant as samples of their own share a key: a row for each, none of them edited.
            for image in images:
                self._number(
                    pending.key,
                    message=f"file {pending.key}.{image}: a key ends at the first dot, so this file shares the key "
                    f"'{pending.key}' with {len(images) - 1} other(s): {no_image(images, self.source)}, or name files "
                    "without further dots",
                )
        else:
            self._number(pending.key, pending=pending)
        for damage in pending.damages:
            self._number_damage(damage)

    def _number(self, key: str, pending: _PendingSample | None = None, message: str = "") -> None:
        name, repeated = self.names.take(key, self.index)
        self.numbered.append(_NumberedRow(self.index, key, name, repeated, pending, message))
        self.index += 1
        self.sized(0 if pending is None else pending.held)

    def _number_damage(self, damage: Damage) -> None:
        span = f"bytes {damage.start} to {damage.stop} could not be read" if damage.stop > damage.start else "it ends"
        message = f"the shard is damaged at byte {damage.start}: {damage.reason}; {span}"
        self._number(f"@{damage.start}", message=message)

    def _row(self, row: _NumberedRow) -> ReadRow:
        pending = row.pending
        if pending is None:
            return damaged_row(self.shard, row.key, row.name, row.index, row.message)
        problem = pending.problem
        touched = pending.touched
        # A sample at the edge of a damage may have lost members in it, such as its edit request.
        if touched and not problem and (lost := sorted((self.usual or set()) - set(pending.names))):
            edge = f"it stands beside the damage at byte {touched.start}"
            problem = f"{edge} and lacks what its neighbours have: {listed(lost)}"
        if row.repeated and not problem:
            problem = "its key was there before: a sample's members must follow each other. Sort the archive by name"
        if problem and not pending.parts:
            return damaged_row(self.shard, row.key, row.name, row.index, problem)
        return build_sample(
            pending.parts,
            self.source,
            shard=self.shard,
            key=row.key,
            name=row.name,
            index=row.index,
            problem=problem,
        )


def is_packed(file: BinaryIO, url: str) -> bool:
    """Whether a tar is gzip-packed: by its first bytes, or by its name where the stream cannot go back."""
    if not file.seekable():
        return url.endswith((".gz", ".tgz"))
    magic = file.read(len(GZIP))
    file.seek(0)
    return magic == GZIP


def read_rows(
    file: BinaryIO,
    *,
    shard: str,
    url: str,
    size: int | None,
    source: SourceConfig,
    wants: Callable[[int], bool],
    sized: Callable[[int], None],
) -> Iterator[ReadRow | None]:
    """Every row of a tar in order; None for a row whose index nobody `wants`: its content is passed over.

    `sized` is told every row's bytes, before `wants` is asked about the next.

    Raises:
        OSError: the store broke off; another attempt from a fresh open may succeed.
    """
    walk = TarWalk(Stream(file, size, is_packed(file, url)))
    grouping = _Grouping(shard, source, wants, sized)
    for item in walk:
        yield from grouping.damage(item) if isinstance(item, Damage) else grouping.entry(item, walk)
    yield from grouping.end()
