"""Walk a tar front to back over a stream: every member's header, and every place where the archive is damaged.

Used instead of `tarfile` and webdataset's reader: in stream mode both take a damaged header for the end of the archive
and lose the rest silently. Header blocks are still parsed by `tarfile`.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from errno import EIO
from typing import BinaryIO, NamedTuple

BLOCK = 512
ZEROS = bytes(BLOCK)
SCAN = 1 << 20  # bytes per read while skipping
MAX_EXTENSION = 1 << 20  # bytes of a long name or of pax records; real ones have a few hundred

KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A member as its header describes it."""

    name: str  # a label only: nothing is ever extracted to it
    offset: int  # byte of its (first) header in the unpacked archive
    size: int  # bytes of its content
    oddity: str = ""  # what it is instead of a file, e.g. "a symbolic link"


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes [start, stop) of the unpacked archive hold no members that can be read."""

    start: int
    stop: int
    reason: str
    inside_member: bool = False  # whether the last entry's own content is cut


class Stream:
    """Bytes of a file in order, with their offset. Seeks past what nobody wants where that is cheap."""

    def __init__(self, file: BinaryIO, size: int | None, packed: bool) -> None:
        """Read from `file`, which holds `size` bytes as announced (None: not known), gzip-packed or not."""
        self._raw = file
        self._size = size
        self._unpacked = gzip.GzipFile(fileobj=file) if packed else None
        self._may_seek = size is not None and not packed and file.seekable()
        self.offset = 0  # in the unpacked stream
        self.broken = ""  # why a packed stream cannot be read on

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer only at the end of the data.

        Raises:
            OSError: the store broke off before the announced size; another attempt may succeed.
        """
        parts, missing = [], count
        while missing and not self.broken:
            part = self._read_some(min(missing, 16 * SCAN))
            if not part:
                break
            parts.append(part)
            missing -= len(part)
            self.offset += len(part)
        return b"".join(parts) if len(parts) != 1 else parts[0]

    def skip(self, count: int) -> int:
        """Pass over `count` bytes; returns how many there were."""
        if self._may_seek and self._size is not None and count > SCAN // 4:
            passed = max(0, min(count, self._size - self.offset))
            self.offset = self._raw.seek(self.offset + passed)
            return passed
        start = self.offset
        while (missing := count - (self.offset - start)) > 0 and self.read(min(missing, SCAN)):
            pass
        return self.offset - start

    def _read_some(self, count: int) -> bytes:
        if self._unpacked is None:
            part = self._raw.read(count)
            if not part and self._size is not None and self.offset < self._size:
                raise OSError(EIO, f"the store sent {self.offset} of the announced {self._size} bytes")
            return part
        try:
            return self._unpacked.read(count)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            if isinstance(error, EOFError) and self._size is not None and self._raw.tell() < self._size:
                raise OSError(EIO, f"the store sent fewer than the announced {self._size} bytes") from error
            self.broken = f"the gzip stream is damaged or cut ({type(error).__name__})"
            return b""


class TarWalk:
    """Iterates over a stream's entries and damages; `content` reads the latest entry."""

    def __init__(self, stream: Stream) -> None:
        """Walk `stream` from where it stands, which must be the start of an archive."""
        self._stream = stream
        self._pushed: bytes | None = None  # a block that was read ahead
        self._left = 0  # bytes of the current entry's content that were not read yet

    def content(self) -> bytes:
        """The current entry's content; shorter than announced where the archive is cut, which is the next item then."""
        data = self._stream.read(self._left)
        self._left -= len(data)
        return data

    def __iter__(self) -> Iterator[Entry | Damage]:
        if not (first := self._stream.read(BLOCK)):
            yield Damage(0, 0, self._stream.broken or "the file is empty")
            return
        self._pushed = first
        while True:
            item = self._next()
            if item is None:
                return
            yield item
            if isinstance(item, Damage):
                if self._pushed is None:
                    return
                continue
            if cut := self._finish(item):
                yield cut
                return

    def _finish(self, entry: Entry) -> Damage | None:
        """Pass over what is left of an entry and its padding."""
        padding = -entry.size % BLOCK
        self._left -= self._stream.skip(self._left)
        at = self._stream.offset
        if self._left:
            lost, self._left = self._left, 0
            reason = f"the archive is cut inside member {entry.name!r}: {lost} of its {entry.size} bytes are missing"
            return Damage(at, at, self._stream.broken or reason, inside_member=True)
        if self._stream.skip(padding) < padding:
            return Damage(at, self._stream.offset, self._stream.broken or "the archive is cut: it has no end marker")
        return None

    def _block(self) -> tuple[int, bytes]:
        """The next block and its offset; shorter than 512 bytes at the end of the data."""
        if self._pushed is not None:
            block, self._pushed = self._pushed, None
            return self._stream.offset - len(block), block
        at = self._stream.offset
        return at, self._stream.read(BLOCK)

    def _next(self) -> Entry | Damage | None:
        """The next entry or damage; None at a proper end. After a damage with a pushed-back block, reading goes on."""
        start, block = self._block()
        name, size, is_sparse = None, None, False
        at = start
        while True:
            if len(block) < BLOCK:
                return Damage(
                    start, self._stream.offset, self._stream.broken or "the archive is cut: it has no end marker"
                )
            if block == ZEROS:
                return self._end(start) if at == start else self._resync(start, at, block, "a name without a member")
            header = parse(block)
            if isinstance(header, str):
                return self._resync(start, at, block, header)
            if header.type == tarfile.GNUTYPE_SPARSE and block[482]:
                self._skip_sparse_map()
            if header.type not in _EXTENSIONS:
                break
            if header.size > MAX_EXTENSION:
                return self._resync(start, at, block, "a header for a name of impossible length")
            content = self._stream.read(header.size + -header.size % BLOCK)[: header.size]
            if len(content) < header.size:
                return Damage(
                    start, self._stream.offset, self._stream.broken or "the archive is cut inside a member's name"
                )
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = content.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                try:
                    records = _pax(content)
                except ValueError:
                    return self._resync(start, *self._block(), "a damaged extended header")
                name, size = records.name or name, size if records.size is None else records.size
                is_sparse = is_sparse or records.is_sparse
            at, block = self._block()
        if is_sparse:  # its content is a map and the data between the holes, stored in one of three ways
            header.type = tarfile.GNUTYPE_SPARSE
        return self._entry(start, header, name, size)

    def _entry(self, start: int, header: tarfile.TarInfo, name: str | None, size: int | None) -> Entry:
        size = header.size if size is None else size
        oddity = KINDS.get(header.type, "")
        if header.isdir():
            oddity = "a directory"
        # As tarfile reads it: directories, links and devices have no content, whatever their size field says.
        has_content = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        self._left = size if has_content else 0
        return Entry(header.name if name is None else name, start, self._left, oddity)

    def _skip_sparse_map(self) -> None:
        more = True
        while more:
            _, block = self._block()
            more = len(block) == BLOCK and bool(block[504])

    def _end(self, start: int) -> Damage | None:
        """After one zero block: a proper end is two of them with nothing but zeros behind."""
        zeros = 1
        while True:
            at, block = self._block()
            if len(block) == BLOCK and block == ZEROS:
                zeros += 1
            elif block.strip(b"\0"):
                return self._resync(start, at, block, "zero blocks stand where a member should, and the file goes on")
            elif len(block) < BLOCK:
                if self._stream.broken:
                    return Damage(start, self._stream.offset, self._stream.broken)
                return None if zeros >= 2 else Damage(start, self._stream.offset, "half of the end marker is missing")

    def _resync(self, start: int, at: int, block: bytes, reason: str) -> Damage:
        """Scan block by block from `block` (at byte `at`) for the next header that can be trusted."""
        while len(block) == BLOCK:
            if at > start and _is_trustworthy(block):
                self._pushed = block
                return Damage(start, at, reason)
            at, block = self._block()
        return Damage(start, self._stream.offset, self._stream.broken or reason)


_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def parse(block: bytes) -> tarfile.TarInfo | str:
    """A header block's fields, or what is wrong with it."""
    try:
        # backslashreplace: a name that is not UTF-8 stays distinct from others, and can be written anywhere.
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        return f"a damaged member header ({error})"
    return header if header.size >= 0 else "a damaged member header (negative size)"


def _is_trustworthy(block: bytes) -> bool:
    """Whether a block found while scanning is a header that is complete in itself."""
    if block[257:262] != b"ustar" or isinstance(header := parse(block), str):
        return False
    # A full name field, or '?' in it, may be the short form of a name that stood in the damaged part.
    return header.type in _EXTENSIONS or (b"\0" in block[:100] and b"?" not in block[:100])


class _Records(NamedTuple):
    """What pax records say of a member."""

    name: str | None
    size: int | None  # of its content in the archive
    is_sparse: bool  # in one of the formats of GNU tar 1.14 and later


def _pax(content: bytes) -> _Records:
    """Read pax records ("<length> <key>=<value>\\n").

    Raises:
        ValueError: these are no pax records.
    """
    stream = io.BytesIO(content)
    name, whole_name, size, is_sparse = None, None, None, False
    while digits := stream.read(1).strip(b"\0"):
        while (digit := stream.read(1)).isdigit():
            digits += digit
        record = stream.read(int(digits) - len(digits) - 1)
        key, equals, value = record.partition(b"=")
        if digit != b" " or not equals or value[-1:] != b"\n":
            raise ValueError("no pax record")
        if key == b"path":
            name = value[:-1].decode("utf-8", "backslashreplace")
        elif key == b"size":
            if not value[:-1].isdigit():  # `int` takes signs, blanks and underscores
                raise ValueError("no size")
            size = int(value[:-1])
        elif key.startswith(b"GNU.sparse."):
            is_sparse = True
            if key == b"GNU.sparse.name":  # the path is then made up, for readers without sparse files
                whole_name = value[:-1].decode("utf-8", "backslashreplace")
    return _Records(whole_name or name, size, is_sparse)
