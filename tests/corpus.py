"""Hundreds of broken inputs, made by a script: damaged archives and tables, no pictures, hostile members and names.

    python -m tests.corpus        # edits them all and prints how each kind ends

Every case says what must come out of it. `make_corpus` writes three folders, one for each format of source; a run over
each must end with every case edited or quarantined.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import struct
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

FORMATS = ("webdataset", "parquet", "folder")
MAX_MEMBER = 1 << 20  # source.max_member_bytes of the runs
Outcome = Literal["edited", "rejected", "either"]


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


# Bytes -----------------------------------------------------------------------------------------------------------


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


# Archives --------------------------------------------------------------------------------------------------------

FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "gid": (116, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "linkname": (157, 100),
    "magic": (257, 6),
    "version": (263, 2),
    "uname": (265, 32),
    "gname": (297, 32),
    "devmajor": (329, 8),
    "devminor": (337, 8),
    "prefix": (345, 155),
}
ODD_TYPES = {
    "hard link": tarfile.LNKTYPE,
    "symbolic link": tarfile.SYMTYPE,
    "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "pipe": tarfile.FIFOTYPE,
}
ODD_NAMES = {
    "absolute": "/etc/cron.d/x.png",
    "parent": "../../../tmp/x.png",
    "parent inside": "x/../../y.png",
    "backslashes": "..\\..\\x.png",
    "drive": "C:\\x.png",
    "newline": "x\ny.png",
    "control": "x\x1b[31m\x07.png",
    "space": " x .png",
    "quotes": "x'\"`$(id)`.png",
    "html": "<script>alert(1)<script>.png",
    "composed": "\u00e9.png",
    "decomposed": "e\u0301.png",
    "right to left": "\u202egnp.\u05d0.png",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467.png",
    "zero width": "x\u200b\ufeff.png",
    "long": "n" * 240 + ".png",
    "longer than a file system takes": "n" * 3000 + ".png",
    "deep": "d/" * 400 + "x.png",
    "hash": "x#1.png",
    "percent": "x%2F%00.png",
    "url": "https:/user:pw@host/x.png",
    "reserved": "CON.png",
    "dashes": "--help.png",
    "only the extension's dot twice": "x..png",
}


def archive_cases() -> Iterator[tuple[Case, bytes]]:
    """Tars of four samples, damaged in the second or between the second and third."""

    def case(kind: str, name: str, data: bytes, edited: str = "", told: int = 0, end: str = ".tar") -> Any:
        shard = f"{kind}-{name}".replace(" ", "_").replace("/", "_") + end
        return Case(kind, name, shard, edited=tuple(edited), told=told), data

    whole = tar(SAMPLES)
    at = offsets(whole)["b.png"]
    for field, (start, length) in FIELDS.items():
        yield case("tar header", field, over(whole, at + start, b"\xff" * length), "acd", told=1)
        block = over(whole[at : at + 512], start, b"\xff" * length)
        yield case("tar header, summed", field, over(whole, at, summed(block)), "a")
        zeroed = over(whole[at : at + 512], start, bytes(length))
        yield case("tar header, zeroed", field, over(whole, at, zeroed), "a")
    sizes = {
        "text": b"not a number",
        "negative": b"\xff" * 12,
        "8 GiB": b"77777777777\0",
        "2^88": b"\x80" + b"\xff" * 11,
        "a block less": b"%011o\0" % (len(PNG) - 512),
        "a block more": b"%011o\0" % (len(PNG) + 512),
        "nothing": b"%011o\0" % 0,
        "a space": b" " * 12,
    }
    for name, field in sizes.items():
        block = summed(over(whole[at : at + 512], 124, field))
        yield case("tar size", name, over(whole, at, block), "a", told=0 if name in ("a space", "nothing") else 1)
    end = offsets(whole)["d.txt"] + 1024
    content = at + 512 + len(PNG)
    yield case("tar padding", "noise", over(whole, content, b"\xaa" * (-content % 512)), "abcd")
    yield case("tar end", "none", whole[:end], "abcd", told=1)
    yield case("tar end", "one block", whole[: end + 512], "abcd", told=1)
    yield case("tar end", "half a block", whole[: end + 700], "abcd", told=1)
    yield case("tar end", "noise behind", whole + random.Random(0).randbytes(3000), "abcd", told=1)
    yield case("tar end", "an archive behind", whole + tar([("e.png", PNG), ("e.txt", b"x")]), "abcde", told=1)
    yield case("tar end", "empty file", b"", told=1)
    yield case("tar end", "no members", tar([]))
    for zeros in (512, 1024, 4096):
        yield case("tar zeros", f"{zeros} bytes", over(whole, at, bytes(zeros)), "a", told=1)
    for part in range(1, 25):
        cut = part * end // 25
        yield case("tar cut", f"at {part} of 25", whole[:cut], told=1)
    for seed in range(16):
        noise = random.Random(seed)
        place, length = noise.randrange(end), noise.choice([1, 16, 600, 3000])
        yield case("tar noise", f"seed {seed}", over(whole, place, noise.randbytes(length))[: len(whole)])

    long = "folder/" * 30 + "x.png"
    for label, format in (("GNU", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        data = tar([*SAMPLES[:4], (long, PNG), *SAMPLES[4:]], format)
        start = offsets(data)[long]
        yield case("tar long name", f"{label}, sound", data, "abcd")
        yield case("tar long name", f"{label}, header damaged", over(data, start, b"\xff" * 60), "abd", told=1)
        yield case("tar long name", f"{label}, content damaged", over(data, start + 512, b"\xff" * 60), "abd")
        yield case("tar long name", f"{label}, cut", data[: start + 540], "a", told=1)
        huge = header("x", 2 << 20, tarfile.GNUTYPE_LONGNAME if label == "GNU" else tarfile.XHDTYPE)
        yield case("tar long name", f"{label}, of 2 MiB", between(huge + bytes(2 << 20)), "ab", told=1)
        alone = header("x", 100, tarfile.GNUTYPE_LONGNAME if label == "GNU" else tarfile.XHDTYPE)
        yield case("tar long name", f"{label}, at the end", whole[:end] + alone + padded(b"x" * 100), "abcd", told=1)
    link = (
        header("././@LongLink", 5, tarfile.GNUTYPE_LONGLINK) + padded(b"/etc\0") + header("l.png", 0, tarfile.SYMTYPE)
    )
    yield case("tar long name", "of a link", between(link), "abcd", told=1)
    records = {
        "path out": b"29 path=../../../etc/passwd.p\n",
        "no length": b"path=x\n",
        "wrong length": b"99999 path=x\n",
        "huge length": b"9" * 5000 + b" path=x\n",
        "negative size": b"11 size=-5\n",
        "size of text": b"13 size=many\n",
        "huge size": b"30 size=99999999999999999999\n",
        "no equals": b"7 path\n",
        "NUL in path": b"12 path=a\0b\n",
        "not UTF-8": b"12 path=\xff\xfe\n",
        "sparse map": b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n",
        "only zeros": bytes(40),
    }
    for name, record in records.items():
        pax = header("pax", len(record), tarfile.XHDTYPE) + padded(record)
        yield case("tar pax record", name, between(pax + header("x.png", len(PNG)) + padded(PNG)), "ab")
    globals_ = header("pax", 16, tarfile.XGLTYPE) + padded(b"16 comment=hello")
    yield case("tar pax record", "global", between(globals_), "abcd")
    sparse = over(header("s.png", 4, tarfile.GNUTYPE_SPARSE), 482, b"\1")
    yield case("tar odd type", "sparse", between(summed(sparse) + bytes(512) + padded(b"data")), "abcd", told=1)
    yield case("tar odd type", "sparse without end", whole[:end] + summed(sparse) + b"\xff" * 5000, "abcd", told=1)
    for name, kind in ODD_TYPES.items():
        yield case("tar odd type", name, between(header("x.png", 0, kind, linkname="/etc/passwd")), "abcd", told=1)
        lying = header("y.png", 1 << 20, kind, linkname="a.png")
        yield case("tar odd type", f"{name} with a size", between(lying), "abcd", told=1)
    for name, kind in {"contiguous": b"7", "unknown": b"Z", "volume": b"V", "continued": b"M", "folder": b"D"}.items():
        yield case("tar odd type", name, between(header("x.png", len(PNG), kind) + padded(PNG)), "abcd")
    yield case("tar odd type", "directory like an image", between(header("x.png", 0, tarfile.DIRTYPE)), "abcd")
    for name, path in ODD_NAMES.items():
        for label, format in (("GNU", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
            yield case(f"tar name, {label}", name, tar([*SAMPLES[:4], (path, PNG), *SAMPLES[4:]], format), "abcd")
    for name, raw in {
        "empty": b"",
        "not UTF-8": b"\xff\xfe.png",
        "NUL": b"x\0y.png",
        "dot": b".",
        "slash": b"/",
    }.items():
        block = summed(over(header("x", len(PNG)), 0, raw + bytes(100 - len(raw))))
        yield case("tar name, raw", name, between(block + padded(PNG)), "abcd")
    v7 = summed(over(header("x.png", len(PNG)), 257, bytes(255)))
    yield case("tar name, raw", "without magic", between(v7 + padded(PNG)), "abcdx")
    nested = tar(SAMPLES[:2])
    yield case("tar nested", "as a member", tar([*SAMPLES, ("e.png", PNG), ("e.tar", nested)]), "abcde")
    yield case("tar nested", "as an image", tar([*SAMPLES, ("e.png", nested)]), "abcd", told=1)
    yield case("tar keys", "member twice", tar([*SAMPLES, ("e.png", PNG), ("e.png", PNG)]), "abcd", told=1)
    yield case("tar keys", "comes back", tar([*SAMPLES, SAMPLES[0]]), "abcd", told=1)
    yield case("tar keys", "no image", tar([*SAMPLES, ("e.txt", b"x")]), "abcd", told=1)
    yield case("tar keys", "two images by a dot", tar([*SAMPLES, ("e.1.png", PNG), ("e.2.png", PNG)]), "abcd", told=2)
    yield case("tar keys", "no extension", tar([*SAMPLES, ("e", PNG)]), "abcd", told=1)
    yield case("tar keys", "none but dots", tar([*SAMPLES, ("...", PNG)]), "abcd")
    yield case("tar keys", "case of the extension", tar([*SAMPLES, ("e.PNG", PNG)]), "abcde")
    yield case("tar size", "a member over the limit", tar([*SAMPLES, ("e.png", bytes(2 * MAX_MEMBER))]), "abcd", told=1)

    packed = gzip.compress(whole, mtime=0)
    for part in range(1, 5):
        yield case("gzip", f"cut at {part} of 5", packed[: part * len(packed) // 5], told=1, end=".tar.gz")
    yield case("gzip", "noise", over(packed, len(packed) // 2, b"\0" * 40), told=1, end=".tar.gz")
    yield case("gzip", "wrong checksum", over(packed, len(packed) - 8, b"\0" * 4), "abcd", told=1, end=".tar.gz")
    yield case("gzip", "noise behind", packed + b"noise", "abcd", told=1, end=".tar.gz")
    yield case("gzip", "header only", packed[:10], told=1, end=".tar.gz")
    yield case("gzip", "not packed", whole, "abcd", end=".tar.gz")
    yield case("gzip", "packed, named tar", packed, "abcd")
    yield case("gzip", "packed twice", gzip.compress(packed, mtime=0), told=1, end=".tar.gz")
    bomb = tar([*SAMPLES, ("e.png", bytes(64 << 20))])
    yield case("gzip", "64 MiB of zeros", gzip.compress(bomb, mtime=0), "abcd", told=1, end=".tgz")
    for name, data in {"text": b"hello " * 400, "zip": b"PK\3\4" + bytes(2000), "noise": b"\x93\x11" * 3000}.items():
        yield case("tar not one", name, data, told=1)


# Pictures --------------------------------------------------------------------------------------------------------

CODECS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
    "GIF": "gif",
    "PPM": "ppm",
    "JPEG2000": "jp2",
    "AVIF": "avif",
}


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG whose header may lie."""
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return start + extra + png_chunk(b"IDAT", zlib.compress(rows, 9)) + png_chunk(b"IEND", b"")


def huge_headers() -> dict[str, bytes]:
    """Files of a few bytes that claim some 400 megapixels, and a real bomb of 100."""
    side = 20_000
    small = {format: encoded(picture(size=(32, 32)), format) for format in ("JPEG", "BMP", "GIF", "TIFF", "WEBP")}
    start = small["JPEG"].index(b"\xff\xc0") + 5
    tiff = small["TIFF"]
    for tag in (256, 257):  # width and height, of whatever integer type
        at = tiff.index(struct.pack("<H", tag)) + 2
        tiff = over(tiff, at, struct.pack("<HII", 4, 1, side))
    return {
        "jpg": over(small["JPEG"], start, struct.pack(">HH", side, side)),
        "png": png_of(side, side, b""),
        "bmp": over(small["BMP"], 18, struct.pack("<ii", side, side)),
        "gif": over(small["GIF"], 6, struct.pack("<HH", side, side)),
        "tif": tiff,
        "ppm": b"P6 %d %d 255 " % (side, side),
        "pgm": b"P5 99999999 99999999 255 ",
        "png bomb": png_of(10_000, 10_000, bytes(10_001) * 10_000),
        "png 2^31": png_of(2**31 - 1, 2**31 - 1, b""),
        "png no rows": png_of(0, 10, b""),
    }


def picture_cases() -> Iterator[tuple[str, str, str, bytes, Outcome]]:
    """(kind, name, extension, bytes, outcome), each of which is one row."""
    for format, ext in CODECS.items():
        data = encoded(picture(), format)
        # Lossless codecs of pixels without a checksum show a changed byte as a changed pixel: that is not noticed.
        yield "image sound", format, ext, data, "edited"
        yield "image cut", f"{format} half", ext, data[: len(data) // 2], "rejected"
        yield "image cut", f"{format} header", ext, data[:12], "rejected"
        yield "image cut", f"{format} last bytes", ext, data[: -max(24, len(data) // 50)], "either"
        yield "image noise", f"{format} start", ext, b"\xff" * 8 + data[8:], "rejected"
        yield "image noise", f"{format} middle", ext, over(data, len(data) // 2, b"\xa5" * 40), "either"
        yield "image noise", f"{format} zeros", ext, over(data, len(data) // 3, bytes(len(data) // 3)), "either"
        yield "image noise", f"{format} behind", ext, data + b"noise" * 100, "edited" if ext != "avif" else "either"
        yield "image wrong extension", format, "png" if ext == "jpg" else "jpg", data, "edited"
    for name, data in huge_headers().items():
        yield "image huge", name, name[:3] if " " not in name else "png", data, "rejected"
    for mode, format in (
        ("1", "PNG"),
        ("L", "JPEG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("I;16", "TIFF"),
        ("F", "TIFF"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "TIFF"),
        ("LAB", "TIFF"),
    ):
        yield "image mode", f"{mode} {format}", CODECS[format], encoded(picture(mode=mode), format), "edited"
    frames = [picture(seed) for seed in range(3)]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        animated = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        yield "image animated", format, CODECS[format], animated, "rejected"
    for size in ((1, 1), (1, 900), (900, 1), (2000, 3)):
        yield "image shape", f"{size[0]} x {size[1]}", "png", encoded(picture(size=size)), "edited"
    texts = {
        "nothing": b"",
        "a byte": b"\xff",
        "text": b"not an image",
        "HTML": b"<html><body>404 Not Found</body></html>",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "PDF": b"%PDF-1.7\n" + bytes(400),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) (r) file\n",
        "zip": b"PK\3\4" + bytes(400),
        "ELF": b"\x7fELF" + bytes(400),
        "pickle": b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.",
        "a path": b"/etc/passwd",
        "a link": b"https://host/x.png",
        "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "zeros": bytes(5000),
        "numpy": b"\x93NUMPY\x01\x00" + bytes(200),
    }
    for name, data in texts.items():
        yield "image none", name, "png", data, "rejected"
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 900_000, zip=True)
    rows = b"".join(b"\0" + bytes(10) for _ in range(10))
    profile = png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(30 << 20), 9))
    text_bomb = png_chunk(b"zTXt", b"c\0\0" + zlib.compress(b"x" * (30 << 20), 9))
    loop = bytearray(encoded(picture(), "TIFF"))
    first = struct.unpack_from("<I", loop, 4)[0]
    struct.pack_into("<I", loop, first + 2 + 12 * struct.unpack_from("<H", loop, first)[0], first)
    yield "image metadata", "PNG text", "png", encoded(picture(), pnginfo=info), "edited"
    yield "image metadata", "PNG text bomb", "png", png_of(10, 10, rows, text_bomb), "either"
    yield "image metadata", "PNG profile bomb", "png", png_of(10, 10, rows, profile), "either"
    yield "image metadata", "PNG wrong checksum", "png", over(PNG, 29, b"\0\0\0\0"), "rejected"
    yield "image metadata", "PNG twice the header", "png", PNG[:33] + PNG[8:], "either"
    yield "image metadata", "TIFF that loops", "tif", bytes(loop), "either"
    yield "image metadata", "JPEG EXIF noise", "jpg", encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff"), "edited"
    yield "image metadata", "JPEG profile noise", "jpg", encoded(picture(), "JPEG", icc_profile=b"x" * 300), "edited"


def text_cases() -> Iterator[tuple[str, str, dict[str, bytes], Outcome]]:
    """(kind, name, members beside the image, outcome), each of which is one row."""
    captions = {
        "not UTF-8": b"\xff\xfe\xfa",
        "NUL": b"a\0b",
        "UTF-16": "caption".encode("utf-16"),
        "900 kB": b"word " * 180_000,
        "blank": b" \n\t ",
        "markup": b"<script>alert(1)</script><img src=x onerror=alert(1)>",
        "template": b"{{ 7*7 }}{% raw %}",
        "control": b"\x1b[2J\x07\r\n\x00\x7f",
        "right to left": "\u202eabc\u05d0".encode(),
        "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467".encode() * 50,
        "decomposed": "e\u0301".encode() * 100,
    }
    for name, data in captions.items():
        yield "caption", name, {"txt": data}, "edited"
    concept = {"prompt": "hat"}
    documents: dict[str, tuple[bytes, Outcome]] = {
        "empty": (b"", "rejected"),
        "cut": (b'{"a": ', "rejected"),
        "deep lists": (b"[" * 100_000, "rejected"),
        "deep, closed": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "rejected"),
        "900 kB": (json.dumps({"text": "x" * 900_000}).encode(), "edited"),
        "over the limit": (b" " * (2 * MAX_MEMBER), "rejected"),
        "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "rejected"),
        "1e999": (b'{"a": 1e999, "b": -1e999}', "either"),
        "NaN": (b'{"a": NaN}', "edited"),
        "lone surrogate": (b'{"a": "\\ud800"}', "rejected"),
        "NUL": (b'{"a": "\\u0000"}', "either"),
        "not UTF-8": (b'{"a": "\xff"}', "rejected"),
        "a list": (b"[1, 2]", "edited"),
        "null": (b"null", "edited"),
        "keys twice": (b'{"a": 1, "a": 2}', "edited"),
        "10,000 keys": (json.dumps({f"k{n}": n for n in range(10_000)}).encode(), "edited"),
        "our own column names": (b'{"id": "x", "image": "y", "seed": "z", "columns": {}}', "edited"),
        "python": (b'{"__class__": "os.system", "py/object": "os.system"}', "edited"),
        "edit: text": (b'{"edit": "hat"}', "rejected"),
        "edit: number": (b'{"edit": 5}', "rejected"),
        "edit: list": (b'{"edit": []}', "rejected"),
        "edit: unknown field": (json.dumps({"edit": {"concepts": [concept], "run": 1}}).encode(), "rejected"),
        "edit: no prompt": (b'{"edit": {"concepts": [{}]}}', "rejected"),
        "edit: infinite scale": (b'{"edit": {"concepts": [{"prompt": "x", "guidance_scale": 1e999}]}}', "rejected"),
        "edit: huge scale": (b'{"edit": {"concepts": [{"prompt": "x", "guidance_scale": 1e300}]}}', "either"),
        "edit: prompt of 900 kB": (json.dumps({"edit": {"concepts": [{"prompt": "x " * 9000}]}}).encode(), "either"),
        "edit: name of a path": (json.dumps({"edit": {"../x": {"concepts": [concept]}}}).encode(), "rejected"),
        "edit: deep text": (json.dumps({"edit": "[" * 100_000}).encode(), "rejected"),
        "edit and edits": (
            json.dumps({"edit": {"concepts": [concept]}, "edits": {"concepts": [concept]}}).encode(),
            "rejected",
        ),
    }
    for name, (data, outcome) in documents.items():
        yield "json", name, {"json": data}, outcome
    masks: dict[str, tuple[bytes, Outcome]] = {
        "no image": (b"x", "rejected"),
        "nothing": (b"", "rejected"),
        "other shape": (encoded(picture(size=(90, 10))), "rejected"),
        "huge": (huge_headers()["png bomb"], "rejected"),
        "CMYK": (encoded(picture(mode="CMYK"), "JPEG"), "edited"),
    }
    for name, (data, outcome) in masks.items():
        yield "mask", name, {"mask.png": data}, outcome


# Tables ----------------------------------------------------------------------------------------------------------

TABLE_ROWS = 12


class Foreign(pa.ExtensionType):
    """A type that a reader must not ask Python code to rebuild."""

    def __init__(self) -> None:
        super().__init__(pa.binary(), "tests.foreign")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR."

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Foreign:
        return cls()


def table(**columns: Any) -> pa.Table:
    """Twelve rows of image, caption and id; columns given as None are left out."""
    base: dict[str, Any] = {
        "id": [f"r{row:02d}" for row in range(TABLE_ROWS)],
        "image": [PNG] * TABLE_ROWS,
        "caption": ["a caption"] * TABLE_ROWS,
    }
    return pa.table({name: data for name, data in {**base, **columns}.items() if data is not None})


def parquet(data: pa.Table, **options: Any) -> bytes:
    """A table's file, in row groups of four."""
    buffer = io.BytesIO()
    pq.write_table(data, buffer, **{"row_group_size": 4, **options})
    return buffer.getvalue()


def repeated(value: Any, kind: pa.DataType | None = None) -> pa.Array:
    """A column of one value."""
    return pa.array([value] * TABLE_ROWS, type=kind)


def table_cases() -> Iterator[tuple[Case, bytes]]:
    """Parquet files: damaged bytes, and sound ones of other schemas."""
    names = tuple(f"r{row:02d}" for row in range(TABLE_ROWS))

    def case(kind: str, name: str, data: bytes, edited: tuple[str, ...] = (), told: int = 0) -> tuple[Case, bytes]:
        shard = f"{kind}-{name}".replace(" ", "_").replace("/", "_") + ".parquet"
        return Case(kind, name, shard, edited=edited, told=told), data

    whole = parquet(table(), compression="none", use_dictionary=False)
    for part in range(16):
        yield case("parquet cut", f"at {part} of 16", whole[: part * len(whole) // 16], told=1)
    yield case("parquet cut", "last byte", whole[:-1], told=1)
    for part in range(16):
        place = 4 + part * (len(whole) - 12) // 16
        yield case("parquet noise", f"at {part} of 16", over(whole, place, random.Random(part).randbytes(60)))
        yield case("parquet zeros", f"at {part} of 16", over(whole, place, bytes(60)))
    footer = len(whole) - 8
    for name, length in {"0": 0, "1": 1, "2^31": 2**31 - 1, "2^32": 2**32 - 1, "the file": len(whole)}.items():
        yield case("parquet footer", f"length {name}", over(whole, footer, struct.pack("<I", length)), told=1)
    yield case("parquet footer", "magic", over(whole, footer + 4, b"XXXX"), told=1)
    yield case("parquet footer", "encrypted", over(whole, footer + 4, b"PARE"), told=1)
    yield case("parquet footer", "first magic", over(whole, 0, b"XXXX"))
    length = struct.unpack("<I", whole[footer : footer + 4])[0]
    for part in range(12):
        place = footer - length + part * length // 12
        yield case("parquet footer", f"noise at {part} of 12", over(whole, place, random.Random(part).randbytes(6)))
    yield case("parquet footer", "only magic", b"PAR1", told=1)
    yield case("parquet footer", "text", b"hello", told=1)
    yield case("parquet footer", "nothing", b"", told=1)

    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images: dict[str, tuple[Any, tuple[str, ...], int]] = {
        "missing": (None, (), 1),
        "text": (["x"] * TABLE_ROWS, (), 1),
        "numbers": (list(range(TABLE_ROWS)), (), 1),
        "null type": (pa.nulls(TABLE_ROWS), (), 1),
        "all null": (repeated(None, pa.binary()), (), TABLE_ROWS),
        "half null": ([PNG, None] * 6, names[::2], 6),
        "empty": ([b""] * TABLE_ROWS, (), TABLE_ROWS),
        "lists": (repeated([PNG]), (), 1),
        "large": (repeated(PNG, pa.large_binary()), names, 0),
        "view": (repeated(PNG, pa.binary_view()), names, 0),
        "fixed size": (repeated(PNG, pa.binary(len(PNG))), (), 0),
        "dictionary": (repeated(PNG).dictionary_encode(), (), 0),
        "struct": (repeated({"bytes": PNG, "path": "x"}, struct_type), names, 0),
        "struct, only path": (repeated({"bytes": None, "path": "/etc/passwd"}, struct_type), (), TABLE_ROWS),
        "struct, null": (repeated(None, struct_type), (), TABLE_ROWS),
        "struct without bytes": (repeated({"a": 1}), (), 1),
        "struct of structs": (repeated({"image": {"bytes": PNG}}), (), 1),
        "foreign type": (pa.ExtensionArray.from_storage(Foreign(), repeated(PNG)), (), 0),
        "over the limit": ([PNG, bytes(2 * MAX_MEMBER)] * 6, names[::2], 6),
    }
    for name, (column, edited, told) in images.items():
        yield case("parquet image", name, parquet(table(image=column)), edited, told)
    for name, column in {
        "numbers": list(range(TABLE_ROWS)),
        "bytes": [b"\xff"] * TABLE_ROWS,
        "null": [None] * TABLE_ROWS,
        "lists": [["a"]] * TABLE_ROWS,
        "dictionary": repeated("a").dictionary_encode(),
    }.items():
        yield case("parquet caption", name, parquet(table(caption=column)), names)
    not_utf8 = pa.Array.from_buffers(pa.string(), TABLE_ROWS, repeated(b"\xff\xfe").buffers())
    yield case("parquet caption", "not UTF-8", parquet(table(caption=not_utf8)), names)
    for name, column in {
        "twice": ["r00"] * TABLE_ROWS,
        "null": [None] * TABLE_ROWS,
        "numbers": list(range(TABLE_ROWS)),
        "floats": [0.5] * TABLE_ROWS,
        "empty": [""] * TABLE_ROWS,
        "paths": [f"../../{row}" for row in range(TABLE_ROWS)],
        "with hashes": ["x", "x", "x#1"] * 4,
        "NUL": [f"a\0{row}" for row in range(TABLE_ROWS)],
        "not UTF-8": not_utf8,
        "900 kB": ["k" * 900_000, *names[1:]],
    }.items():
        yield case("parquet key", name, parquet(table(id=column)))
    for name, column in {
        "broken JSON": ["{"] * TABLE_ROWS,
        "numbers": [5] * TABLE_ROWS,
        "deep JSON": ["[" * 100_000] * TABLE_ROWS,
        "bytes": [b"\xff"] * TABLE_ROWS,
        "lists": [[1]] * TABLE_ROWS,
    }.items():
        yield case("parquet edit", name, parquet(table(edit=column)), told=TABLE_ROWS)
    for name, column in {
        "times beyond years": pa.array([2**62] * TABLE_ROWS, pa.timestamp("s")),
        "nanoseconds": pa.array([1] * TABLE_ROWS, pa.timestamp("ns")),
        "durations": pa.array([2**62] * TABLE_ROWS, pa.duration("s")),
        "dates": pa.array([2**30] * TABLE_ROWS, pa.date32()),
        "maps": pa.array([[("a", 1), ("a", 2)]] * TABLE_ROWS, pa.map_(pa.string(), pa.int64())),
        "infinities": [float("inf")] * TABLE_ROWS,
        "half floats": pa.array(np.ones(TABLE_ROWS, np.float16)),
        "foreign type": pa.ExtensionArray.from_storage(Foreign(), repeated(b"x")),
        "deep": repeated([[[[[[[[1]]]]]]]]),
        "not UTF-8": not_utf8,
    }.items():
        try:
            data = parquet(table(other=column))
        except (pa.ArrowException, ValueError):  # what this pyarrow cannot write
            continue
        yield case("parquet column", name, data, names if name not in ("times beyond years", "dates") else ())
    yield case("parquet column", "named empty", parquet(table(**{"": [1] * TABLE_ROWS})), names)
    yield case("parquet column", "odd name", parquet(table(**{"\u202e\U0001f468\n": [1] * TABLE_ROWS})), names)
    arrays = [pa.array(names), repeated(PNG), repeated(PNG)]
    double = pa.Table.from_arrays(arrays, names=["id", "image", "image"])
    yield case("parquet column", "image twice", parquet(double), told=1)
    double = pa.Table.from_arrays([*arrays[:2], repeated(1), repeated(2)], names=["id", "image", "n", "n"])
    yield case("parquet column", "another twice", parquet(double), told=1)
    for codec in ("snappy", "gzip", "brotli", "lz4", "zstd"):
        data = parquet(table(), compression=codec)
        yield case("parquet codec", f"{codec} sound", data, names)
        yield case("parquet codec", f"{codec} noise", over(data, 60, b"\xa5" * 40))
    pandas = table().replace_schema_metadata(
        {"pandas": b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.", "huggingface": b"{"}
    )
    yield case("parquet metadata", "pickles", parquet(pandas), names)
    yield case("parquet metadata", "no rows", parquet(table().slice(0, 0)))
    yield case("parquet metadata", "one row group of nothing", parquet(table(), row_group_size=12), names)
    yield case("parquet metadata", "pages of version 2", parquet(table(), data_page_version="2.0"), names)
    bomb = table(other=["x" * (4 << 20)] * TABLE_ROWS)
    yield case("parquet metadata", "48 MiB of one letter", parquet(bomb, compression="zstd"), names)


# Folders ---------------------------------------------------------------------------------------------------------


def folder_files() -> Iterator[tuple[str, str, str, bytes, Outcome]]:
    """(kind, name, path, bytes, outcome) of files in a folder of images."""
    names = {
        "composed": "\u00e9.png",
        "decomposed": "e\u0301.png",
        "right to left": "\u202e\u05d0.png",
        "emoji": "\U0001f468\u200d\U0001f469.png",
        "spaces": " a  b .png",
        "newline": "a\nb.png",
        "wildcards": "[a-z]*?.png",
        "braces": "{0..9}.png",
        "hash": "a#b.png",
        "percent": "a%2Fb.png",
        "quotes": "'\"`$(id).png",
        "dash": "-rf.png",
        "backslash": "a\\b.png",
        "long": "n" * 250 + ".png",
        "two dots": "a..png",
        "many dots": "a.b.c.png",
        "upper case": "A.PNG",
        "control": "a\x1b[31mb.png",
        "deep": "d/" * 40 + "x.png",
        "like a parent": "a.../b...png",
        "like ours": "_units.png",
        "colon": "a::b.png",
        "url": "s3:/bucket/x.png",
    }
    for name, path in names.items():
        yield "file name", name, path, PNG, "edited"
    yield "file", "empty", "empty.png", b"", "rejected"
    yield "file", "text", "text.png", b"text", "rejected"
    yield "file", "too large", "large.png", bytes(2 * MAX_MEMBER), "rejected"
    for format, ext in CODECS.items():
        yield "file", f"{format} cut", f"cut-{ext}.{ext}", encoded(picture(), format)[:40], "rejected"


def make_folder(root: Path) -> Iterator[Case]:
    """A folder of files, and of what only looks like one."""

    def write(path: str, data: bytes) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)

    for kind, name, path, data, outcome in folder_files():
        write(path, data)
        key = path.rpartition(".")[0]
        yield row_case(kind, name, ".", key, outcome)
    sidecars: dict[str, tuple[str, bytes, Outcome]] = {
        "caption not UTF-8": ("txt", b"\xff", "edited"),
        "json cut": ("json", b"{", "rejected"),
        "json deep": ("json", b"[" * 100_000, "rejected"),
        "json too large": ("json", b" " * (2 * MAX_MEMBER), "rejected"),
        "mask no image": ("mask.png", b"x", "rejected"),
    }
    for name, (ext, data, outcome) in sidecars.items():
        key = "side-" + name.replace(" ", "-")
        write(f"{key}.png", PNG)
        write(f"{key}.{ext}", data)
        yield row_case("file sidecar", name, ".", key, outcome)
    (root / "a-folder.png").mkdir()
    (root / "dangling.png").symlink_to(root / "nowhere")
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    raw = os.fsencode(root) + b"/\xff\xfe.png"
    Path(os.fsdecode(raw)).write_bytes(PNG)
    yield row_case("file name", "not UTF-8", ".", "\\xff\\xfe", "edited")
    for name in ("a folder", "a dangling link", "a link to itself", "a pipe"):
        yield Case("file", name, ".")


# All of them -----------------------------------------------------------------------------------------------------


def row_case(kind: str, name: str, shard: str, key: str, outcome: Outcome) -> Case:
    """A case that is one row of a shard."""
    edited = (key,) if outcome == "edited" else ()
    rejected = (key,) if outcome == "rejected" else ()
    return Case(kind, name, shard, edited=edited, rejected=rejected, row=key)


def make_corpus(root: Path) -> dict[str, list[Case]]:
    """Write every case below `root`, in a folder for each format; returns the cases by format."""
    cases: dict[str, list[Case]] = {format: [] for format in FORMATS}
    for format, made in (("webdataset", archive_cases()), ("parquet", table_cases())):
        (root / format).mkdir(parents=True)
        for case, data in made:
            (root / format / case.shard).write_bytes(data)
            cases[format].append(case)
    members: list[Member] = []
    for number, (kind, name, ext, data, outcome) in enumerate(picture_cases()):
        members.append((f"p{number:03d}.{ext}", data))
        cases["webdataset"].append(row_case(kind, name, "rows-pictures.tar", f"p{number:03d}", outcome))
    (root / "webdataset" / "rows-pictures.tar").write_bytes(tar(members))
    members = []
    for number, (kind, name, beside, outcome) in enumerate(text_cases()):
        members += [(f"t{number:03d}.{ext}", data) for ext, data in {"png": PNG, **beside}.items()]
        cases["webdataset"].append(row_case(kind, name, "rows-texts.tar", f"t{number:03d}", outcome))
    (root / "webdataset" / "rows-texts.tar").write_bytes(tar(members))
    (root / "folder").mkdir()
    cases["folder"] = list(make_folder(root / "folder"))
    return cases


def recipe_of(source: Path, out: Path, format: str) -> dict[str, Any]:
    """One edit, few steps, and no budget that would end the run."""
    return {
        "source": {"shards": str(source), "format": format, "max_member_bytes": MAX_MEMBER},
        "edits": {"concepts": [{"prompt": "hat"}]},
        "model": {"name": "analytic", "size": 32},
        "inversion": {"method": "ddpm", "num_steps": 2},
        "sink": {"folder": str(out)},
        "run": {
            "engine": "local",
            "unit_size": 64,
            "max_failed_fraction": 1.0,
            "max_consecutive_failed_units": 10**6,
        },
    }


@dataclass(frozen=True)
class Ends:
    """How the rows of a run ended."""

    edited: Counter[tuple[str, str]]  # (shard, id without the shard) -> results
    rejected: dict[tuple[str, str], tuple[str, str]]  # the same -> (stage, message)
    shards: frozenset[str]  # those whose last unit is committed

    @classmethod
    def of(cls, out: Path) -> Ends:
        """Read a run's folder."""
        edited: Counter[tuple[str, str]] = Counter()
        for path in (out / "data").glob("*.parquet"):
            for row in pq.read_table(path, columns=["id", "shard"]).to_pylist():
                edited[row["shard"], row["id"].removeprefix(row["shard"] + "/")] += 1
        rejected = {}
        for path in (out / "quarantine").glob("*.parquet"):
            for row in pq.read_table(path, columns=["id", "shard", "stage", "message"]).to_pylist():
                place = row["shard"], row["id"].removeprefix(row["shard"] + "/")
                assert place not in rejected, f"{place} is in quarantine twice"
                rejected[place] = row["stage"], row["message"]
        manifests = [json.loads(path.read_text()) for path in (out / "_units").glob("*/*.json")]
        return cls(edited, rejected, frozenset(unit["shard"] for unit in manifests if unit["is_last"]))

    def problems(self, case: Case) -> list[str]:
        """What did not come out as the case says."""
        found = []
        if case.shard not in self.shards:
            found.append("its shard was not finished")
        if case.row and (case.shard, case.row) not in {*self.edited, *self.rejected}:
            found.append("it vanished")
        for key in case.edited:
            if self.edited[case.shard, key] != 1:
                why = self.rejected.get((case.shard, key), ("", "it is nowhere"))[1]
                found.append(f"{key} was not edited: {why}")
        for key in case.rejected:
            if (case.shard, key) not in self.rejected:
                found.append(f"{key} was not quarantined")
        told = sum(shard == case.shard for shard, _ in self.rejected)
        if told < case.told:
            found.append(f"{told} rows in quarantine, not {case.told}")
        return found

    def outcome(self, case: Case) -> str:
        """In a word."""
        if case.row:
            place = case.shard, case.row
            return "edited" if place in self.edited else "rejected" if place in self.rejected else "gone"
        edited = any(shard == case.shard for shard, _ in self.edited)
        rejected = any(shard == case.shard for shard, _ in self.rejected)
        return {(True, True): "both", (True, False): "edited", (False, True): "rejected"}.get(
            (edited, rejected), "empty"
        )


def run_corpus(root: Path, run: Callable[[dict[str, Any]], Any]) -> dict[str, tuple[list[Case], Ends]]:
    """Make the corpus, edit it, and read what came out, by format."""
    cases = make_corpus(root / "in")
    found = {}
    for format in FORMATS:
        run(recipe_of(root / "in" / format, root / "out" / format, format))
        found[format] = cases[format], Ends.of(root / "out" / format)
    return found


def main() -> None:
    """Edit the corpus and print a table of kinds and outcomes."""
    from pipeline import cluster
    from pipeline.recipe import recipe_from

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run_corpus(Path(folder), lambda data: cluster.run(recipe_from(data), progress="off"))
    counts: dict[str, Counter[str]] = {}
    for cases, ends in found.values():
        for case in cases:
            counts.setdefault(case.kind, Counter())[ends.outcome(case)] += 1
            for problem in ends.problems(case):
                print(f"{case.kind}, {case.name}: {problem}")
    outcomes = ("edited", "rejected", "both", "empty")
    print(f"{'kind':24}{'cases':>9}" + "".join(f"{name:>10}" for name in outcomes))
    for kind, count in counts.items():
        print(f"{kind:24}{count.total():9}" + "".join(f"{count[name]:10}" for name in outcomes))
    print(f"{sum(count.total() for count in counts.values())} cases in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
