"""Edit pairs made of photographs, with defects whose truth is known."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy.ndimage import affine_transform

from tests.photographs import photographs

NO_PHOTOGRAPHS = ("cell", "clock_motion", "color", "horse", "logo", "phantom", "chessboard", "page", "text")
FEWEST_PIXELS = 300  # of a photograph's shorter side
MARGIN = 6  # pixels around a crop, which a shift or a zoom takes from


@dataclass(frozen=True)
class Displacement:
    """What was done to a result beside its edit."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class MadePair:
    """Decoded pictures as a trainer sees them, the mask of the edit, and the source it was cut from."""

    source: bytes
    edited: bytes
    mask: np.ndarray  # (H, W) bool


@cache
def sources() -> dict[str, np.ndarray]:
    """Photographs of scikit-image, without its drawings and its motion blur, which has no texture."""
    found = {}
    for name, path in photographs().items():
        if not name.startswith(NO_PHOTOGRAPHS):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            if min(pixels.shape[:2]) >= FEWEST_PIXELS:
                found[name] = pixels
    return found


def crop_of(rng: np.random.Generator, most: int) -> tuple[np.ndarray, int, int, int]:
    """A photograph, and the top, left and side of a square in it of at most `most` pixels."""
    photograph = sources()[rng.choice(sorted(sources()))]
    height, width = photograph.shape[:2]
    side = min(most, min(height, width) - 2 * MARGIN)
    top, left = (int(rng.integers(MARGIN, length - side - MARGIN + 1)) for length in (height, width))
    return photograph, top, left, side


def displaced(photograph: np.ndarray, top: int, left: int, side: int, by: Displacement) -> np.ndarray:
    """The square, its content moved and scaled about its centre: (side, side, 3) float32, by cubic splines."""
    centre = (side - 1) / 2
    around = photograph[
        max(0, top - 4 * MARGIN) : top + side + 4 * MARGIN, max(0, left - 4 * MARGIN) : left + side + 4 * MARGIN
    ].astype(np.float32)
    down, right = top - max(0, top - 4 * MARGIN), left - max(0, left - 4 * MARGIN)
    offset = [down + centre - (centre + by.dy) / by.scale, right + centre - (centre + by.dx) / by.scale]
    if by == Displacement():
        return around[down : down + side, right : right + side]
    return np.stack(
        [
            affine_transform(
                around[..., at], [1 / by.scale] * 2, offset=offset, output_shape=(side, side), order=3, mode="nearest"
            )
            for at in range(3)
        ],
        axis=-1,
    )


def region(rng: np.random.Generator, side: int) -> np.ndarray:
    """One to three rectangles, each a tenth to a third of a side long: (side, side) bool."""
    mask = np.zeros((side, side), dtype=bool)
    for _ in range(rng.integers(1, 4)):
        height, width = rng.integers(side // 10, side // 3, 2)
        y, x = rng.integers(0, side - height), rng.integers(0, side - width)
        mask[y : y + height, x : x + width] = True
    return mask


def edit(rng: np.random.Generator, pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Something else inside the mask: pieces of another photograph, or another colour; and another light everywhere."""
    edited = pixels.copy()
    if rng.random() < 0.7:
        other = Image.fromarray(sources()[rng.choice(sorted(sources()))]).resize(mask.shape[::-1])
        edited[mask] = 0.3 * edited[mask] + 0.7 * np.asarray(other, dtype=np.float32)[mask]
    else:
        colour = rng.uniform(0, 255, 3)
        edited[mask] = 0.4 * edited[mask] + 0.6 * colour
    return edited * rng.uniform(0.97, 1.03) + rng.uniform(-3, 3)


def jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Encoded."""
    file = io.BytesIO()
    Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """As pixels (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pair(rng: np.random.Generator, by: Displacement, most: int = 512) -> MadePair:
    """A pair of a fresh crop."""
    photograph, top, left, side = crop_of(rng, most)
    mask = region(rng, side)
    edited = edit(rng, displaced(photograph, top, left, side, by), mask)
    source = jpeg(photograph[top : top + side, left : left + side], int(rng.integers(85, 96)))
    return MadePair(source, jpeg(edited, int(rng.integers(85, 96))), mask)
