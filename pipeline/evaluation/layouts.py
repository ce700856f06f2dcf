"""Where the benchmarks' own scripts look for results: read from others there, and written there for them.

pie_bench      METHOD_FOLDER/annotation_images/<image_path>
gedit_bench    METHOD_FOLDER/fullset/<task_type>/<en|cn>/<key>.png and <key>_SRCIMG.png
imgedit_bench  METHOD_FOLDER/<key>.png
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from io import BytesIO

from PIL import Image

from pipeline.common.showing import public_url
from pipeline.errors import SourceError
from pipeline.evaluation.benchmarks.files import Folder
from pipeline.evaluation.items import Item, Result
from pipeline.evaluation.scoring import JPEG_QUALITY, MAX_PIXELS
from pipeline.reading.decode import decode
from pipeline.writing.rows import encode_png

FOLDERS = {"pie_bench": "output", "gedit_bench": "results", "imgedit_bench": "edited"}
"""What a tree of methods is called, by set."""


def place(kind: str, item: Item) -> str:
    """Where an item's result stands, relative to its method's folder."""
    if kind == "pie_bench":
        return posixpath.join("annotation_images", str(item.facts.get("image_path", "")))
    if kind == "gedit_bench":
        return f"fullset/{item.edit_type}/{item.language}/{item.facts.get('key', '')}.png"
    return f"{item.key}.png"


def source_place(item: Item) -> str:
    """Where GEdit-Bench's scorer looks for the input."""
    return place("gedit_bench", item).removesuffix(".png") + "_SRCIMG.png"


def result_there(kind: str, folder: Folder, method: str, item: Item) -> Result:
    """What somebody's method made of an item, or why it counts as missing."""

    def missing(what: str, path: str) -> Result:
        return Result(item=item, edit="", method=method, reason=f"missing_{what}", message=f"{path} is not there")

    if item.problem:
        return missing("result", item.key)  # the item's own problem is told instead
    path = place(kind, item)
    image = folder.get(path)
    if kind == "gedit_bench":
        source = folder.get(source_place(item))
        if image is None and source is None:
            return missing("both", path)
        if source is None:  # without it the official scorer skips the row
            return missing("source", source_place(item))
        if image is not None:
            return Result(item=item, edit="", method=method, image=image, shown_source=source)
    return missing("result", path) if image is None else Result(item=item, edit="", method=method, image=image)


def refuse_empty(kind: str, folders: dict[str, Folder], first: Item) -> None:
    """See that every method has a folder with anything in it: a wrong path is no method that failed everywhere.

    Raises:
        SourceError: names the folder.
    """
    for method, folder in folders.items():
        if not any(folder.find(".png", ".jpg", ".jpeg", ".webp")):
            raise SourceError(
                f"results.{method}: {public_url(folder.url)} holds no picture; the first is looked for at "
                f"{place(kind, first)}. Give the method's own folder"
            )


def files_of(kind: str, result: Result) -> Iterator[tuple[str, bytes]]:
    """A result's files in the benchmark's layout: (path relative to the tree of methods, content)."""
    item = result.item
    if item.problem or result.image is None or item.image is None:
        return
    path = f"{result.method}/{place(kind, item)}"
    if kind == "pie_bench":  # the authors save results under the input's name, which ends in jpg
        buffer = BytesIO()
        Image.fromarray(decode(result.image, MAX_PIXELS)[0]).save(buffer, "JPEG", quality=JPEG_QUALITY)
        yield path, buffer.getvalue()
        return
    yield path, as_png(result.image)
    if kind == "gedit_bench":
        yield f"{result.method}/{source_place(item)}", as_png(item.image)


def as_png(data: bytes) -> bytes:
    """An encoded picture as PNG: as it is where it is one."""
    return data if data.startswith(b"\x89PNG") else encode_png(decode(data, MAX_PIXELS)[0])
