"""What the values of a user's mask mean: labels 0 and 1, or brightness.

    0 and 1 alone                     labels, whatever the type: 1 is inside
    at least half of the type's range brightness: white is inside, gray is in between
    palettes of colours               labels by index, where the indices are 0 and 1; gray palettes are brightness
    all zero                          nothing may be edited

Anything else (0, 1, 2 and 3; 0 and 38) could mean either, and would quietly edit nothing or nearly so: it is refused.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image

from pipeline.errors import DecodeError

SHOWN_VALUES = 8
NEARLY_GRAY = 16  # of 255, between channels: what compression makes of gray
MAX_16_BIT = 65535


def brightness(image: Image.Image, *, low_bytes_lost: bool = False) -> UInt8[np.ndarray, "H W"]:
    """A mask as 0 (outside) to 255 (inside).

    Args:
        image: of any mode, loaded; transparency counts as black.
        low_bytes_lost: the file had 16 bits of colour, of which Pillow reads the upper 8: labels would all be 0.

    Raises:
        DecodeError: its values are ambiguous; names them.
    """
    if image.mode == "F":
        values = np.asarray(image)
        return by_values(values, 1.0 if values.max() <= 1 else 255.0)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return by_values(np.asarray(image), MAX_16_BIT)
    if image.mode in ("L", "1") and "transparency" not in image.info:
        return by_values(np.asarray(image.convert("L")), 255)
    if image.mode == "P":
        return _of_palette(image)
    colours = _on_black(image)
    gray = np.asarray(Image.fromarray(colours).convert("L"))
    if low_bytes_lost and gray.max() < 128:
        raise DecodeError(
            "the mask has colours of 16 bits, and is darker than half throughout. Store it as gray, of 8 or 16 bits"
        )
    if not _is_gray(colours, tolerance=0) and gray.max() < 128:
        raise _ambiguous(gray, 255, "it is coloured, and its brightness is")
    return by_values(gray, 255)


def by_values(values: Num[np.ndarray, "H W"], full: float) -> UInt8[np.ndarray, "H W"]:
    """The mask that numbers mean, 0 (outside) to 255 (inside).

    Args:
        values: of any type.
        full: what is white, unless the values are 0 and 1 alone.

    Raises:
        DecodeError: the values are ambiguous; names them.
    """
    low, high = values.min(), values.max()
    if not np.isfinite(values).all() or low < 0 or high > full:
        raise DecodeError(f"the mask has values from {low:g} to {high:g}. Store 0 to {full:g}, or 0 and 1")
    if high >= full / 2:
        if values.dtype == np.uint8 and full == 255:
            return values  # as they are: a mask may have 64 megapixels
        return np.rint(values * (255.0 / full)).astype(np.uint8)
    if not ((values == 0) | (values == 1)).all():
        raise _ambiguous(values, full, "its values are")
    return (values == 1).astype(np.uint8) * np.uint8(255)


def _of_palette(image: Image.Image) -> UInt8[np.ndarray, "H W"]:
    colours = _on_black(image)
    gray = np.asarray(Image.fromarray(colours).convert("L"))
    if _is_gray(colours, NEARLY_GRAY) and gray.max() >= 128:
        return gray
    indices = np.asarray(image)
    if set(np.unique(indices)) <= {0, 1} and _rises(image):
        return indices * np.uint8(255)
    if not colours.any():
        return gray
    raise _ambiguous(indices, None, "its palette is of colours, and its indices are")


def _rises(image: Image.Image) -> bool:
    """Whether a palette's colour 1 is brighter than its colour 0, as labels are drawn."""
    two = Image.new("P", (2, 1))
    two.putpalette(image.getpalette() or [])
    two.putdata([0, 1])
    zero, one = np.asarray(two.convert("L"))[0]
    return bool(one > zero)


def _on_black(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer)
    return np.asarray(image.convert("RGB"))


def _is_gray(colours: UInt8[np.ndarray, "H W 3"], tolerance: int) -> bool:
    return int((colours.max(axis=2) - colours.min(axis=2)).max()) <= tolerance


def _ambiguous(values: np.ndarray, full: float | None, what: str) -> DecodeError:
    found = np.unique(values)
    shown = ", ".join(f"{value:g}" for value in found[:SHOWN_VALUES])
    more = f", ... {found[-1]:g}" if len(found) > SHOWN_VALUES else ""
    of = "" if full is None else f" of {full:g}"
    return DecodeError(
        f"the mask is ambiguous: {what} {shown}{more}{of}, neither labels (0 and 1 alone) nor brightness (which "
        "reaches half of its range). Store 0 where nothing may change, and 1 or white where the edit may act"
    )
