"""Encoded image bytes to RGB pixels, or a reason why not: whatever the bytes are, they end in one of the two.

Pillow does the decoding. What stands around it: which formats may be tried, the number of pixels checked before any is
decoded, and modes that `convert("RGB")` would get wrong (transparency, 16 bit, float, CMYK with a profile).
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageFile, ImageOps

from pipeline.errors import DecodeError
from pipeline.reading.user_masks import MAX_16_BIT, brightness

# Pillow registers its rarer formats at the first failure to open; naming one before that is a KeyError.
Image.init()

# Formats that hold one picture, whose decoders are hardened against untrusted input. Not among them: EPS and PDF, which
# are programs, and what no image dataset holds.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
Picture = bytes | Image.Image  # encoded, as a dataset holds it, or opened, as a Python user may hold it
_ORIENTATION_TAG = 0x0112
BAND_PIXELS = 1 << 20  # converted at a time
_SWAPPING = (5, 6, 7, 8)  # orientations that exchange height and width


def decode(picture: Picture, max_pixels: int) -> tuple[np.ndarray, int]:
    """Decode an image.

    Args:
        picture: the image, encoded or opened.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        Pixels (H, W, 3) uint8, upright by the EXIF orientation, transparency on white; and that orientation, 1..8.

    Raises:
        DecodeError: the bytes are no image, are cut, hold several pictures, or more pixels than allowed.
        MemoryError: there is not enough of it.
    """
    image, orientation = _open(picture, max_pixels, "image")
    return _guard("image", lambda: _to_rgb(image)), orientation


def decode_small(data: bytes, max_pixels: int, side: int) -> Image.Image:
    """As `decode`, for showing: a Pillow image in RGB. A JPEG, which can be decoded smaller, comes about as large as
    `side` pixels on its longer side need."""
    image, _ = _open(data, max_pixels, "image", side)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    return Image.fromarray(_guard("image", lambda: _to_rgb(image)))


def decode_mask(picture: Picture, max_pixels: int, image_orientation: int, image_size: tuple[int, int]) -> np.ndarray:
    """Decode a user's mask: white, or 1 of the labels 0 and 1, where the edit may act (`reading/user_masks.py`).

    Args:
        picture: the mask, encoded or opened, of any mode; transparency counts as black.
        max_pixels: larger masks are refused before they are decoded.
        image_orientation: EXIF orientation of the image, which the mask follows where it was drawn on the unturned
            image, i.e. has its height and width exchanged.
        image_size: (height, width) of the upright image.

    Returns:
        (H, W) uint8.

    Raises:
        DecodeError: the bytes are no image, or its values are ambiguous.
    """
    image, _ = _open(picture, max_pixels, "mask")
    mask = _guard("mask", lambda: brightness(image, low_bytes_lost=_loses_low_bytes(picture)))
    is_unturned = mask.shape != image_size and mask.shape == image_size[::-1] and image_orientation in _SWAPPING
    return upright(mask, image_orientation) if is_unturned else mask


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an array (H, W, ...) as EXIF `orientation` (1..8) says."""
    if orientation in _SWAPPING:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


_whole_files = threading.Lock()
_readers = 0  # inside `_cut_files_fail`
_others_choice = False


@contextmanager
def _cut_files_fail() -> Iterator[None]:
    """Pillow's global switch, which another package may have set, fills what is missing of a cut file with gray: off
    while this package decodes, and then as it was."""
    global _readers, _others_choice
    with _whole_files:
        if _readers == 0:
            _others_choice, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _readers += 1
    try:
        yield
    finally:
        with _whole_files:
            _readers -= 1
            if _readers == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _others_choice


def _open(picture: Picture, max_pixels: int, what: str, side: int | None = None) -> tuple[Image.Image, int]:
    """A loaded, upright image in its own mode, and its EXIF orientation; with `side`, a JPEG may come out smaller."""
    with _cut_files_fail():
        image = picture if isinstance(picture, Image.Image) else _identify(picture, what)
        width, height = image.size
        if width < 1 or height < 1:
            raise DecodeError(f"the {what} has no pixels: its size is {width} x {height}")
        if width * height > max_pixels:
            raise DecodeError(
                f"the {what} has {width} x {height} = {width * height} pixels, more than source.max_pixels "
                f"({max_pixels})"
            )
        if side is not None:
            scale = side / max(width, height)
            image.draft(None, (max(1, round(width * scale)), max(1, round(height * scale))))
        return _guard(what, lambda: _load(image, what))


def _identify(data: bytes, what: str) -> Image.Image:
    if not data:
        raise DecodeError(f"the {what} has no bytes")
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise DecodeError(f"the {what} is of no known format (known: {', '.join(FORMATS)}), or damaged") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"the {what} has more pixels than Pillow opens") from error
    except MemoryError:
        raise
    except Exception as error:
        raise _decode_error(what, error) from error


def _load(image: Image.Image, what: str) -> tuple[Image.Image, int]:
    # A camera's MPO carries previews and depth beside the picture; other pictures in one file are frames or pages, and
    # to edit the first alone would quietly do less than was asked.
    pictures = getattr(image, "n_frames", 1)
    if pictures > 1 and image.format != "MPO":
        raise DecodeError(f"the {what} is animated or has pages: {pictures} pictures in one {image.format}. Split it")
    image.load()
    try:
        orientation = int(image.getexif().get(_ORIENTATION_TAG, 1))
        return (ImageOps.exif_transpose(image), orientation) if 2 <= orientation <= 8 else (image, 1)
    except Exception:  # a broken EXIF block tells no orientation, and is no reason to lose a sound picture
        return image, 1


def _loses_low_bytes(picture: Picture) -> bool:
    """Whether it is a PNG of 16 bits and several channels: Pillow reads the upper byte of each."""
    header = picture[:26] if isinstance(picture, bytes) else b""
    return header.startswith(b"\x89PNG") and header[24:25] == b"\x10" and header[25:26] in (b"\x02", b"\x04", b"\x06")


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
        pixels[:] = to_8_bit(np.asarray(image), f"{image.mode} image")[..., None]
        return pixels
    return in_bands(image, _from_cmyk(image) if image.mode == "CMYK" else _flattened)


def in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels, converted band by band: a picture of 64 megapixels takes hundreds of megabytes in every further mode."""
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = np.asarray(convert(image.crop((0, top, image.width, bottom))))
    return pixels


def _flattened(image: Image.Image) -> Image.Image:
    """In RGB, what is transparent on white."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def to_8_bit(pixels: np.ndarray, name: str) -> UInt8[np.ndarray, "..."]:
    """Pixels of more than 8 bits. The scale is the type's, never the picture's own: equal values stay equal.

    Args:
        pixels: of any shape. Floats are 0..1, or 0..255 where one is above 1; integers 0..65535.
        name: of the picture, for errors.

    Raises:
        DecodeError: a value has no meaning on that scale.
    """
    low, high = float(pixels.min()), float(pixels.max())  # either is NaN where any value is
    if not math.isfinite(low) or not math.isfinite(high) or low < 0:
        raise DecodeError(f"the {name} has values without a meaning as brightness: {low} to {high}")
    if pixels.dtype.kind == "f":
        if high > 255:
            raise DecodeError(f"the {name} has values up to {high}. Store 0..1 or 0..255")
        scale = 255.0 if high <= 1 else 1.0
    else:
        if high > MAX_16_BIT:
            raise DecodeError(f"the {name} has values up to {high:.0f}. Store 8 or 16 bits")
        scale = 255.0 / MAX_16_BIT
    scaled = np.empty(pixels.shape, dtype=np.uint8)
    rows = max(1, BAND_PIXELS // max(1, pixels[:1].size))
    for top in range(0, len(pixels), rows):
        scaled[top : top + rows] = np.rint(pixels[top : top + rows].astype(np.float64) * scale)
    return scaled


def _from_cmyk(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """How to convert: by the profile that it brings, if that works, else by the plain formula, as viewers do."""
    profile = image.info.get("icc_profile")
    if profile:
        with suppress(ImageCms.PyCMSError, OSError, ValueError):
            transform = ImageCms.buildTransform(
                ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"), "CMYK", "RGB"
            )
            ImageCms.applyTransform(image.crop((0, 0, 1, 1)), transform)
            return lambda band: cast(Image.Image, ImageCms.applyTransform(band, transform))
    return lambda band: band.convert("RGB")


def _guard(what, function):  # type: ignore[no-untyped-def]
    """Pillow's decoders raise whatever their formats' parsers do: every one of them means that these bytes fail."""
    try:
        return function()
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        raise _decode_error(what, error) from error


def _decode_error(what: str, error: Exception) -> DecodeError:
    text = re.sub(r"<[^<>]*>|0x[0-9a-fA-F]+", "(object)", " ".join(str(error).split()))
    return DecodeError(f"the {what} cannot be decoded, it is damaged or cut: {text or type(error).__name__}")
