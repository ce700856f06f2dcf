"""Tars that are damaged, odd or hostile."""

from __future__ import annotations

import gzip
import random
import tarfile
from collections.abc import Iterator
from typing import Any

from tests.corpus.making import MAX_MEMBER, PNG, SAMPLES, Case, between, header, offsets, over, padded, summed, tar

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
