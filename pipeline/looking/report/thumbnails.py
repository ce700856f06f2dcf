"""Small pictures of a result, for people: thumbnails, the mask over its input, a contact sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageFont

from pipeline.common.room import Room
from pipeline.reading.decode import FORMATS, decode_small
from pipeline.writing.rows import THUMBNAIL_SIDE  # sharp at two to a phone's width

MAX_PIXELS = 2**31  # of what is shown: the run has decoded it before, within its own limit
AT_WORK = Room(32 << 20)  # pixels decoded at once, by however many threads: a larger picture is decoded alone
GAP = 2  # times the wanted size that a picture which can be decoded smaller comes in: then no loss is seen
TINT = (255, 45, 120)  # the mask's colour; the report's accent is the same, so that the two explain each other


def small_rgb(data: bytes, side: int = THUMBNAIL_SIDE) -> Image.Image:
    """Encoded pixels that this package wrote, or an input as the source holds it: upright, on white, at most `side`
    pixels on its longer side."""
    with AT_WORK.taken(pixels_of(data)):
        return thumbnail(decode_small(data, MAX_PIXELS, GAP * side), side)


def small_mask(data: bytes, side: int = THUMBNAIL_SIDE) -> Image.Image:
    """A mask that this package wrote, in mode "1", at most `side` pixels on its longer side."""
    with AT_WORK.taken(pixels_of(data)):
        mask = Image.open(io.BytesIO(data)).convert("L").point(_is_inside)
        return thumbnail(mask, side).point(_is_inside, "1")


def pixels_of(data: bytes) -> int:
    """By the header of an encoded picture."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        return picture.width * picture.height


def _is_inside(value: int) -> int:
    return 255 if value > 127 else 0


def thumbnail(image: Image.Image, side: int = THUMBNAIL_SIDE, enlarge: bool = False) -> Image.Image:
    """The image scaled so that its longer side is at most `side` pixels, or just that where small ones are enlarged."""
    scale = side / max(image.size)
    if scale >= 1 and not enlarge:
        return image
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.LANCZOS)


def data_uri(image: Image.Image) -> str:
    """The image inside a page, as WebP."""
    out = io.BytesIO()
    image.save(out, "WEBP", quality=65, method=2)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def mask_uri(mask: Image.Image) -> str:
    """A mask of mode "1" inside a page, to be laid over its image: tinted inside, clear outside, one bit per pixel."""
    tinted = Image.frombytes("P", mask.size, mask.convert("L").point(lambda value: value > 127).tobytes())
    tinted.putpalette((*(0, 0, 0), *TINT))
    out = io.BytesIO()
    tinted.save(out, "PNG", bits=1, transparency=bytes((0, 150)), optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def mask_over(image: Image.Image, mask: Bool[np.ndarray, "H W"] | None) -> Image.Image:
    """The image with its masked part tinted and outlined, the rest faded. Without a mask: the image, faded."""
    if mask is None:
        mask = np.zeros((image.height, image.width), dtype=bool)
    inside = np.asarray(Image.fromarray(mask).convert("L").resize(image.size, Image.Resampling.BOX)) > 127
    pixels = np.asarray(image).astype(np.float32)
    gray = pixels.mean(axis=2, keepdims=True)
    faded = 0.45 * gray + 0.25 * pixels + 0.30 * 255
    tinted = 0.5 * pixels + 0.5 * np.array(TINT, dtype=np.float32)
    out = np.where(inside[..., None], tinted, faded)
    out[_edge(inside)] = TINT
    return Image.fromarray(out.round().clip(0, 255).astype(np.uint8))


def _edge(inside: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels just outside the mask: four-neighbours of it that it does not hold."""
    grown = inside.copy()
    grown[1:] |= inside[:-1]
    grown[:-1] |= inside[1:]
    grown[:, 1:] |= inside[:, :-1]
    grown[:, :-1] |= inside[:, 1:]
    return grown & ~inside


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetEntry:
    """One row of a contact sheet."""

    original: Image.Image
    mask: Bool[np.ndarray, "H W"] | None
    edited: Image.Image
    label: str


def contact_sheet(entries: Sequence[SheetEntry], columns: int = 2, side: int = 192) -> Image.Image:
    """Input, mask and edit of each entry side by side, `columns` entries to a line, labels underneath."""
    gap, margin, label_height, head_height = 8, 28, 34, 30
    entry_width, entry_height = 3 * side + 2 * gap, side + label_height
    columns = min(columns, len(entries)) or 1
    lines = -(-len(entries) // columns)
    width = 2 * margin + columns * entry_width + (columns - 1) * 2 * margin
    sheet = Image.new("RGB", (width, margin + head_height + lines * (entry_height + gap) + margin // 2), "white")
    pen = ImageDraw.Draw(sheet)
    title, text = ImageFont.load_default(16), ImageFont.load_default(15)
    for number, entry in enumerate(entries):
        left = margin + (number % columns) * (entry_width + 2 * margin)
        top = margin + head_height + (number // columns) * (entry_height + gap)
        small = thumbnail(entry.original, side, enlarge=True)
        pictures = {
            "input": small,
            "mask": mask_over(small, entry.mask),
            "edit": thumbnail(entry.edited, side, enlarge=True),
        }
        for place, (name, picture) in enumerate(pictures.items()):
            x = left + place * (side + gap)
            if number < columns:
                pen.text((x, margin), name, fill=(120, 116, 128), font=title)
            sheet.paste(picture, (x + (side - picture.width) // 2, top + (side - picture.height) // 2))
        pen.text((left, top + side + 7), _cut(entry.label, entry_width, text), fill=(30, 28, 36), font=text)
    return sheet


def _cut(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The label, shortened to fit into `width` pixels."""
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(f"{label}...") > width:
        label = label[:-1]
    return f"{label}..."
