"""Pictures that are none, and the texts and masks beside them: each is one row of a tar."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator

from PIL import PngImagePlugin

from tests.corpus.making import MAX_MEMBER, PNG, Fate, encoded, over, picture

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


def picture_cases() -> Iterator[tuple[str, str, str, bytes, Fate]]:
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


def text_cases() -> Iterator[tuple[str, str, dict[str, bytes], Fate]]:
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
    documents: dict[str, tuple[bytes, Fate]] = {
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
    masks: dict[str, tuple[bytes, Fate]] = {
        "no image": (b"x", "rejected"),
        "nothing": (b"", "rejected"),
        "other shape": (encoded(picture(size=(90, 10))), "rejected"),
        "huge": (huge_headers()["png bomb"], "rejected"),
        "CMYK": (encoded(picture(mode="CMYK"), "JPEG"), "edited"),
    }
    for name, (data, outcome) in masks.items():
        yield "mask", name, {"mask.png": data}, outcome
