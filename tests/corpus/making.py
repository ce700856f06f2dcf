"""What the corpus is made of: a case, small pictures, and archives byte by byte."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

FORMATS = ("webdataset", "parquet", "folder")
MAX_MEMBER = 1 << 20  # source.max_member_bytes of the runs
Fate = Literal["edited", "rejected", "either"]


@dataclass(frozen=True)
class Case:
    """One broken input, and what must come of it."""

    kind: str
    name: str
    shard: str  # path in the source
    edited: tuple[str, ...] = ()  # ids, without the shard, that must be in data/
    rejected: tuple[str, ...] = ()  # ids, without the shard, that must be in quarantine/
    told: int = 0  # results that must be in quarantine/, at least
    row: str = ""  # for a case that is one row of a shared shard: its id, without the shard


def picture(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Noise in any of Pillow's modes."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if mode in ("I;16", "F"):
        gray = np.asarray(image.convert("L"))
        return Image.fromarray(gray.astype(np.uint16) * 257 if mode == "I;16" else gray.astype(np.float32))
    return image.convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """An image's file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def over(data: bytes, at: int, new: bytes) -> bytes:
    """`data` with `new` written over it."""
    return data[:at] + new + data[at + len(new) :]


PNG = encoded(picture())
Member = tuple[str, bytes]
SAMPLES: tuple[Member, ...] = tuple(
    (f"{key}.{part}", data) for key in "abcd" for part, data in (("png", PNG), ("txt", b"a caption"))
)


def tar(members: tuple[Member, ...] | list[Member], format: int = tarfile.GNU_FORMAT) -> bytes:
    """An archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    """One header block, without its content."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)[-512:]


def padded(data: bytes) -> bytes:
    """Content as it stands in an archive."""
    return data + bytes(-len(data) % 512)


def summed(block: bytes) -> bytes:
    """A header with the right checksum, whatever else is in it."""
    blank = over(block, 148, b" " * 8)
    return over(blank, 148, b"%06o\0 " % sum(blank))


def between(middle: bytes) -> bytes:
    """An archive of a, b, `middle`, c, d."""
    whole = tar(SAMPLES)
    half = offsets(whole)["c.png"]
    return whole[:half] + middle + whole[half:]


def offsets(data: bytes) -> dict[str, int]:
    """Byte of every member's header."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: member.offset for member in archive}


def row_case(kind: str, name: str, shard: str, key: str, outcome: Fate) -> Case:
    """A case that is one row of a shard."""
    edited = (key,) if outcome == "edited" else ()
    rejected = (key,) if outcome == "rejected" else ()
    return Case(kind, name, shard, edited=edited, rejected=rejected, row=key)
