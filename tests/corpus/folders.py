"""Folders of images, and of what only looks like one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tests.corpus.making import MAX_MEMBER, PNG, Case, Fate, encoded, picture, row_case
from tests.corpus.pictures import CODECS


def folder_files() -> Iterator[tuple[str, str, str, bytes, Fate]]:
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
    sidecars: dict[str, tuple[str, bytes, Fate]] = {
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
