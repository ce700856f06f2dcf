"""A picture, in whatever form a Python user holds it, as what `decode` reads: encoded bytes, or a Pillow image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import DecodeError
from pipeline.reading.decode import Picture, to_8_bit

AnyImage = str | os.PathLike[str] | bytes | np.ndarray | Image.Image
ARRAYS = "Give uint8 (0..255), uint16 (0..65535), bool, or floats (0..1), of shape (H, W), (H, W, 3) or (H, W, 4)"


def picture(image: Any, what: str = "image") -> Picture:
    """Open a picture.

    Args:
        image: a path, encoded bytes, a Pillow image of any mode, or an array: uint8, uint16, bool or floats from 0 to 1
            (or to 255), gray (H, W), (H, W, 1), gray with alpha (H, W, 2), RGB (H, W, 3) or RGBA (H, W, 4).
        what: what it is to the caller, for errors.

    Raises:
        DecodeError: it is none of these; says what it is.
        OSError: the path cannot be read.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    if hasattr(image, "__array__"):
        return _from_array(np.asarray(image), what)
    raise DecodeError(f"the {what} is a {type(image).__name__}. Give a path, encoded bytes, a Pillow image or an array")


def _from_array(pixels: np.ndarray, what: str) -> Image.Image:
    name = f"{what}, an array of {pixels.dtype} and shape {pixels.shape},"
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or not 1 <= channels <= 4:
        is_turned = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4)
        hint = "The channels come last: transpose(1, 2, 0)" if is_turned else ARRAYS
        raise DecodeError(f"the {name} has no shape of one picture. {hint}")
    if pixels.size == 0:
        raise DecodeError(f"the {name} has no pixels")
    if pixels.ndim == 3 and channels == 1:
        pixels = pixels[..., 0]
    if pixels.dtype == np.bool_ and pixels.ndim == 2:
        return Image.fromarray(pixels)
    if what == "mask" and pixels.ndim == 2:
        pixels = _mask_values(pixels)
        if pixels.dtype in (np.float32, np.uint16):
            return Image.fromarray(pixels)  # as they are: what 0 and 1 mean is for `decode_mask` to say
    if pixels.dtype == np.uint16 or pixels.dtype.kind == "f":
        pixels = to_8_bit(pixels, name)
    if pixels.dtype != np.uint8:
        raise DecodeError(f"the {name} is of a type without a known scale. {ARRAYS}")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _mask_values(values: np.ndarray) -> np.ndarray:
    """A mask's values in a type that Pillow holds: labels come as integers of any size."""
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    if values.dtype.kind in "iu" and values.dtype != np.uint16 and 0 <= values.min() <= values.max() <= 255:
        return values.astype(np.uint8)
    return values
