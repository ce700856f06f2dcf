"""Where an image goes on the model's canvas, and the way back.

    crop      the centred square, scaled to size x size; what is outside stays the original's
    pad       scaled to fit size x size, edges replicated around it
    stretch   scaled to size x size, whatever the shape
    bucket    about size * size pixels in the image's own shape; sides become multiples of what the model needs

An image that needs no scaling keeps its very pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from pipeline.errors import PrepareError
from pipeline.records import Placement

MAX_ASPECT = 16  # a bucket's longer side over its shorter: beyond it, nothing of the image would be left
BUCKET_AREA = 0.1  # an image that is a bucket already keeps its pixels: by how much its area may differ
STRIP_PIXELS = 1 << 22  # of a large result, scaled at a time


def place(
    original: tuple[int, int], fit: Literal["crop", "pad", "stretch", "bucket"], *, size: int, multiple: int
) -> Placement:
    """Where an image of (height, width) goes on the model's canvas.

    Raises:
        PrepareError: `size` is not a multiple of `multiple`, or the shape is too long for a bucket.
    """
    height, width = original
    if fit != "bucket" and size % multiple:
        raise PrepareError(f"model.size {size} is not a multiple of {multiple}, which the model needs")
    canvas = scaled = (size, size)
    crop = (0, 0, height, width)
    offset = (0, 0)
    if fit == "crop":
        side = min(height, width)
        crop = ((height - side) // 2, (width - side) // 2, side, side)
    elif fit == "pad":
        scale = size / max(height, width)
        scaled = (max(1, round(height * scale)), max(1, round(width * scale)))
        offset = ((size - scaled[0]) // 2, (size - scaled[1]) // 2)
    elif fit == "bucket":
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise PrepareError(
                f"an image of {height} x {width} is too long for model.fit bucket (at most {MAX_ASPECT}:1). "
                "Use pad or crop"
            )
        canvas = scaled = _bucket(height, width, size, multiple)
    return Placement(original=original, crop=crop, scaled=scaled, offset=offset, canvas=canvas)


def _bucket(height: int, width: int, size: int, multiple: int) -> tuple[int, int]:
    fits = height % multiple == 0 and width % multiple == 0
    if fits and abs(height * width / size**2 - 1) <= BUCKET_AREA:
        return height, width
    aspect = math.sqrt(height / width)
    return _to_multiple(size * aspect, multiple), _to_multiple(size / aspect, multiple)


def apply(original: UInt8[np.ndarray, "H W 3"], placement: Placement) -> UInt8[np.ndarray, "h w 3"]:
    """Bring an image to the model's canvas; padding repeats the edge."""
    top, left, height, width = placement.crop
    scaled = resize(original[top : top + height, left : left + width], placement.scaled, Image.Resampling.LANCZOS)
    return np.pad(scaled, (*padding(placement), (0, 0)), mode="edge")


def restore(
    edited: UInt8[np.ndarray, "h w 3"], placement: Placement, original: UInt8[np.ndarray, "H W 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Bring an edited canvas back to the original's size: the inverse of `apply`. Outside a crop, `original` stays."""
    _check(edited.shape[:2], placement.canvas, "canvas")
    _check(original.shape[:2], placement.original, "original")
    top, left, height, width = placement.crop
    inside = resize(_cut(edited, placement), (height, width), Image.Resampling.LANCZOS)
    if inside.shape == original.shape:
        return inside
    result = original.copy()
    result[top : top + height, left : left + width] = inside
    return result


def restore_mask(mask: Bool[np.ndarray, "h w"], placement: Placement) -> Bool[np.ndarray, "H W"]:
    """Bring a canvas mask back to the original's size: a pixel is in it where at least half of its area is."""
    _check(mask.shape, placement.canvas, "canvas")
    top, left, height, width = placement.crop
    result = np.zeros(placement.original, dtype=np.bool_)
    inside = resize(_cut(mask, placement).astype(np.uint8) * 255, (height, width), Image.Resampling.BOX)
    np.greater_equal(inside, 128, out=result[top : top + height, left : left + width])
    return result


def resize(pixels: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    """(H, W, ...) uint8 at (height, width); the same pixels where the size is the same."""
    if pixels.shape[:2] == size:
        return pixels
    height, width = size
    if height * width <= STRIP_PIXELS or height < len(pixels):
        return _scaled(pixels, size, method)
    # Pillow brings what does not become lower to its new width first, row by row, and to its new height then, column by
    # column: strips of columns give the same bits, and need no second copy of a large result.
    wide = _scaled(pixels, (len(pixels), width), method) if pixels.shape[1] != width else pixels
    result = np.empty((height, width, *pixels.shape[2:]), dtype=np.uint8)
    columns = max(1, STRIP_PIXELS // height)
    for left in range(0, width, columns):
        strip = wide[:, left : left + columns]
        result[:, left : left + columns] = _scaled(strip, (height, strip.shape[1]), method)
    return result


def _scaled(pixels: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((size[1], size[0]), method))


def _cut(canvas: np.ndarray, placement: Placement) -> np.ndarray:
    (top, left), (height, width) = placement.offset, placement.scaled
    return canvas[top : top + height, left : left + width]


def padding(placement: Placement) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows above and below, and columns before and after, the image on its canvas."""
    (top, left), (height, width), canvas = placement.offset, placement.scaled, placement.canvas
    return (top, canvas[0] - height - top), (left, canvas[1] - width - left)


def _to_multiple(length: float, multiple: int) -> int:
    return max(1, round(length / multiple)) * multiple


def _check(shape: tuple[int, ...], expected: tuple[int, int], what: str) -> None:
    if tuple(shape) != expected:
        raise ValueError(f"the {what} is {tuple(shape)}, the placement was made for {expected} (height, width)")
