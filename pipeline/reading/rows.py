"""From a sample's members to a `Sample`: which member is the image, the caption, the mask, the edit request.

Members are known by extension: what follows the first dot of the name, lower case, `jpeg` as `jpg`. Without a setting

    image      is the first of IMAGE_EXTENSIONS that is there, then `input.*`, then the only one that ends like an image
    mask       is `mask.png`: white is where the edit may act
    json       gives the row's edit request(s) under source.edit or "edits"; its other keys become columns
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.errors import UNREADABLE
from pipeline.samples import ReadRow, Sample, Unreadable
from pipeline.settings.sections import SourceConfig

IMAGE_EXTENSIONS = ("jpg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm", "pbm", "jp2", "avif")
DEFAULT_MASK = "mask.png"
MAX_JSON = 16 << 20  # bytes of a json member, whose values take many times as many
JSON_WEIGHT = 16  # times its bytes that a json member counts in its unit
MAX_LIGHT = 4096  # bytes of a column or member that a light row keeps
LONG_KEY = 128  # characters that are remembered of a key as they are
SHOWN = 6  # names listed in a message


class RowProblemError(Exception):
    """Why a row cannot be read; becomes an `Unreadable`."""


class Names:
    """Gives every row of one shard an id of its own."""

    def __init__(self) -> None:
        """Start a shard."""
        self._keys: set[str] = set()
        self._with_index: set[str] = set()

    def take(self, key: str, index: int) -> tuple[str, bool]:
        """The id's part after the shard, and whether the key was there before; "#index" follows a repeated key."""
        repeated = _mark(key) in self._keys
        self._keys.add(_mark(key))
        name = key
        while (repeated and (name == key or _mark(name) in self._keys)) or _mark(name) in self._with_index:
            name = f"{name}#{index}"
        if name != key:
            self._with_index.add(_mark(name))
        return name, repeated


def _mark(key: str) -> str:
    """Stands for a key while a shard is read: each may have a megabyte."""
    if len(key) <= LONG_KEY:
        return key
    return f"{key[:LONG_KEY]}\n{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"


def extension(name: str) -> str:
    """The one spelling of a member's extension: lower case, no leading dot, `jpeg` as `jpg`."""
    name = name.lower().lstrip(".")
    return name[:-4] + "jpg" if name == "jpeg" or name.endswith(".jpeg") else name


def readable(path: str) -> str:
    """A file system's name as text that can be written anywhere; one that is not UTF-8 stays distinct from others."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def mask_extension(source: SourceConfig) -> str:
    """Extension of the user's mask."""
    return extension(source.mask) if source.mask else DEFAULT_MASK


def listed(names: Iterable[str]) -> str:
    """A few names for a message, and how many more there are."""
    names = list(names)
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "") if names else "none"


def dotted_images(names: Iterable[str], source: SourceConfig) -> list[str]:
    """Members that end like an image but have further dots, and are not named like a mask."""
    mask = mask_extension(source)
    return [
        name
        for name in names
        if "." in name
        and name.rpartition(".")[2] in IMAGE_EXTENSIONS
        and name != mask
        and name.partition(".")[0] not in ("mask", "masks")
    ]


def choose_image(names: Collection[str], source: SourceConfig) -> str | None:
    """The member that holds the image, or None where none does or several might."""
    if source.image is not None:
        wanted = extension(source.image)
        return wanted if wanted in names else None
    mask = mask_extension(source)
    for plain in IMAGE_EXTENSIONS:
        if plain in names and plain != mask:
            return plain
    dotted = dotted_images(names, source)
    inputs = [name for name in dotted if name.startswith("input.")]
    if inputs:
        return inputs[0]
    return dotted[0] if len(dotted) == 1 else None


def no_image(names: Collection[str], source: SourceConfig) -> str:
    """Why `choose_image` found none, and what to do."""
    if source.image is not None:
        return f"no member '{extension(source.image)}', which source.image asks for; it has: {listed(names)}"
    dotted = dotted_images(names, source)
    if len(dotted) > 1:
        return f"several members may be the image: {listed(dotted)}. Name one in source.image"
    return f"no image member; it has: {listed(names)}. Name the image's extension in source.image"


def unreadable(sample: Sample, message: str) -> Unreadable:
    """A row that stands in the source but could not be read."""
    return Unreadable(sample=sample, error_class=UNREADABLE, message=message)


def damaged_row(shard: str, key: str, name: str, index: int, message: str) -> Unreadable:
    """A row of which nothing but its place is known."""
    return unreadable(Sample(id=f"{shard}/{name}", shard=shard, key=key, index=index, image=b""), message)


def light(row: ReadRow) -> ReadRow:
    """A row without its pictures and all that is long: enough to see what it asks for and what it is made of."""
    if isinstance(row, Unreadable):
        return replace(row, sample=_light(row.sample))
    return _light(row)


def _light(sample: Sample) -> Sample:
    return replace(
        sample,
        image=b"",
        mask=None if sample.mask is None else b"",
        columns={name: value if len(str(value)) <= MAX_LIGHT else "..." for name, value in sample.columns.items()},
        members={name: content if len(content) <= MAX_LIGHT else b"" for name, content in sample.members.items()},
    )


def build_sample(
    members: Mapping[str, bytes],
    source: SourceConfig,
    *,
    shard: str,
    key: str,
    name: str,
    index: int,
    image_path: str = "",
    problem: str = "",
) -> ReadRow:
    """One row from its members.

    Args:
        members: content by extension.
        source: says which member is what.
        shard: path of the shard relative to the source.
        key: the row's label.
        name: the id's part after the shard.
        index: ordinal in the shard.
        image_path: name of the image's file; "": the key and the member.
        problem: what is known to be wrong with the row; "" where nothing is.
    """
    image = choose_image(members, source)
    known = {"json", extension(source.caption), mask_extension(source), image}
    columns: dict[str, Any] = {}
    edits = None
    problem = problem or ("" if image else no_image(members, source))
    if "json" in members and image != "json":
        try:
            columns, edits = read_json(members["json"], source)
        except RowProblemError as error:
            problem = problem or f"member json {error}"
    caption = ""
    if (text := members.get(extension(source.caption))) is not None and extension(source.caption) != "json":
        caption, complaint = decode_text(text)
        if complaint:
            columns["caption_error"] = complaint
    sample = Sample(
        id=f"{shard}/{name}",
        shard=shard,
        key=key,
        index=index,
        image=members[image] if image else b"",
        image_name=image or "",
        image_path=image_path or (f"{key}.{image}" if image else ""),
        caption=caption,
        mask=members.get(mask_extension(source)),
        edits=edits,
        columns=columns,
        members={member: content for member, content in members.items() if member not in known},
    )
    return unreadable(sample, problem) if problem else sample


def decode_text(data: bytes) -> tuple[str, str]:
    """Text of a caption, and a complaint where it is not UTF-8 (what cannot be read is replaced then)."""
    try:
        return data.decode("utf-8-sig").strip(), ""
    except UnicodeDecodeError as error:
        return data.decode("utf-8-sig", "replace").strip(), f"the caption is not UTF-8 (byte {error.start})"


def read_json(data: bytes, source: SourceConfig) -> tuple[dict[str, Any], Any]:
    """Columns and edit request(s) of a json member; a document that is no object becomes the column "json".

    Raises:
        RowProblemError: it is not JSON. The row's edit request may stand in it, so the row cannot be edited without.
    """
    try:
        # NaN is no JSON, but pandas and img2dataset write it for "nothing".
        document = json.loads(data.decode("utf-8-sig"), parse_constant=lambda _: None)
        json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # lone surrogates and bytes that are not UTF-8 are ValueErrors too
        raise RowProblemError(f"is not JSON: {error or type(error).__name__}") from error
    if not isinstance(document, dict):
        return {"json": document}, None
    return split_edits(document, source)


def split_edits(columns: dict[str, Any], source: SourceConfig) -> tuple[dict[str, Any], Any]:
    """Take the edit request(s) out of a row's columns.

    Raises:
        RowProblemError: both keys hold some, so that nobody can say which count.
    """
    found = {name: columns.pop(name) for name in dict.fromkeys((source.edit, "edits")) if name in columns}
    given = {name: value for name, value in found.items() if not is_blank(value)}
    if len(given) > 1:
        raise RowProblemError(f"has edit requests under {' and under '.join(given)}. Keep one of them")
    return columns, next(iter(given.values()), None)


def is_blank(value: Any) -> bool:
    """Whether there is no edit request: nothing, blank text, or a struct whose fields are all null."""
    if isinstance(value, (str, bytes)):
        return not value.strip()
    return value is None or (isinstance(value, dict) and bool(value) and all(item is None for item in value.values()))
