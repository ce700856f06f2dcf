"""Small pictures of a result, for people: thumbnails, the mask over its input, a contact sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageFont

from pipeline.reading.decode import decode
from pipeline.writing.rows import THUMBNAIL_SIDE  # sharp at two to a phone's width

MAX_PIXELS = 2**31  # of what is shown: the run has decoded it before, within its own limit
TINT = (255, 45, 120)  # the mask's colour; the report's accent is the same, so that the two explain each other


def load_rgb(data: bytes) -> Image.Image:
    """Open encoded pixels that this package wrote, or an input as the source holds it: upright, on white."""
    pixels, _ = decode(data, MAX_PIXELS)
    return Image.fromarray(pixels)


def load_mask(data: bytes) -> Bool[np.ndarray, "H W"]:
    """Open a mask that this package wrote."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("L")) > 127


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


def mask_uri(mask: Bool[np.ndarray, "H W"], side: int = THUMBNAIL_SIDE) -> str:
    """The mask inside a page, to be laid over its image: tinted inside, clear outside, one bit per pixel."""
    small = thumbnail(Image.fromarray(mask).convert("L"), side).point(lambda value: value > 127, "1")
    tinted = Image.frombytes("P", small.size, small.convert("L").point(lambda value: value > 127).tobytes())
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
