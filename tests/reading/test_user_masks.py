"""What the values of a user's mask mean: labels or brightness; what may be either is refused with the values found."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DecodeError
from pipeline.reading.decode import decode_mask
from pipeline.reading.pictures import picture

LABELS = np.zeros((6, 9), dtype=np.uint8)
LABELS[2:, 4:] = 1
INSIDE = LABELS * np.uint8(255)


def decoded(image: Image.Image, kind: str = "PNG", **options: Any) -> np.ndarray:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return decode_mask(out.getvalue(), 10_000, 1, LABELS.shape)


def with_palette(indices: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices, mode="L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def in_rgb(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(values[..., None], 3, axis=2))


BLACK, WHITE, MAROON, YELLOW, GRAY = (0, 0, 0), (255, 255, 255), (128, 0, 0), (255, 255, 0), (90, 90, 90)
SAY_THE_SAME = {
    "labels, 8 bits": Image.fromarray(LABELS),
    "labels, 16 bits": Image.fromarray(LABELS.astype(np.uint16)),
    "labels, RGB": in_rgb(LABELS),
    "labels, opaque": in_rgb(LABELS).convert("RGBA"),
    "labels in a palette of colours": with_palette(LABELS, BLACK, MAROON),
    "labels in a palette of bright colours": with_palette(LABELS, BLACK, YELLOW),
    "labels in a dark palette": with_palette(LABELS, BLACK, GRAY),
    "labels in a palette of gray levels": with_palette(LABELS, *((at, at, at) for at in range(256))),
    "booleans": Image.fromarray(LABELS.astype(bool)),
    "brightness, 8 bits": Image.fromarray(INSIDE),
    "brightness, 16 bits": Image.fromarray(LABELS.astype(np.uint16) * np.uint16(65535)),
    "brightness, RGB": in_rgb(INSIDE),
    "brightness, transparent outside": Image.merge("LA", [Image.new("L", (9, 6), 255), Image.fromarray(INSIDE)]),
    "brightness in a palette that starts with white": with_palette(1 - LABELS, WHITE, BLACK),
    "colours that are bright inside": Image.fromarray(LABELS[..., None] * np.array(WHITE, dtype=np.uint8)),
}


@pytest.mark.parametrize("spelling", SAY_THE_SAME)
def test_a_mask_means_what_it_says_however_it_is_stored(spelling: str) -> None:
    np.testing.assert_array_equal(decoded(SAY_THE_SAME[spelling]), INSIDE)


def test_a_mask_of_floats_is_labels_brightness_to_1_or_brightness_to_255() -> None:
    for factor in (1.0, 255.0):
        mask = Image.fromarray(LABELS.astype(np.float32) * np.float32(factor))
        np.testing.assert_array_equal(decoded(mask, "TIFF"), INSIDE)


def test_levels_of_gray_are_kept() -> None:
    values = np.random.default_rng(0).integers(0, 256, LABELS.shape, dtype=np.uint8)
    np.testing.assert_array_equal(decoded(Image.fromarray(values)), values)
    np.testing.assert_array_equal(decoded(Image.fromarray(values.astype(np.uint16) * np.uint16(257))), values)
    np.testing.assert_array_equal(decoded(Image.fromarray(values.astype(np.float32)), "TIFF"), values)


@pytest.mark.parametrize("one", [0, 1])
def test_one_value_alone_is_nothing_or_everything(one: int) -> None:
    for dtype in (np.uint8, np.uint16):
        assert (decoded(Image.fromarray(np.full(LABELS.shape, one, dtype=dtype))) == one * 255).all()
    assert (decoded(Image.new("RGBA", (9, 6), (255, 255, 255, 0))) == 0).all()


def png_of_16_bit_colours(values: np.ndarray) -> bytes:
    """A PNG that Pillow cannot write: RGB with 16 bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_labels_in_colours_of_16_bits_are_refused_since_their_low_bytes_are_not_read() -> None:
    white = decode_mask(png_of_16_bit_colours(LABELS.astype(np.uint16) * np.uint16(65535)), 10_000, 1, LABELS.shape)
    np.testing.assert_array_equal(white, INSIDE)
    with pytest.raises(DecodeError, match="Store it as gray"):
        decode_mask(png_of_16_bit_colours(LABELS.astype(np.uint16)), 10_000, 1, LABELS.shape)


AMBIGUOUS = {
    "a label that is not 1": (Image.fromarray(LABELS * np.uint8(2)), "values are 0, 2 of 255"),
    "several labels": (Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9) % 4), "values are 0, 1, 2, 3 of"),
    "many labels": (Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9)), "5, 6, 7, ... 53 of 255"),
    "a dark gray": (Image.fromarray(LABELS * np.uint8(100)), "values are 0, 100 of 255"),
    "8 bits in 16": (Image.fromarray(INSIDE.astype(np.uint16)), "values are 0, 255 of 65535"),
    "a dark colour": (Image.fromarray(LABELS[..., None] * np.array(MAROON, dtype=np.uint8)), "brightness is 0, 38 of"),
    "a label in one channel": (Image.fromarray(LABELS[..., None] * np.array((1, 0, 0), dtype=np.uint8)), "coloured"),
    "palette, other labels": (with_palette(LABELS * np.uint8(2), BLACK, WHITE, MAROON), "its indices are 0, 2"),
    "palette, falling": (with_palette(LABELS, YELLOW, MAROON), "its indices are 0, 1"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_a_mask_that_may_mean_either_is_refused_with_the_values_found_and_the_way_out(kind: str) -> None:
    image, text = AMBIGUOUS[kind]
    with pytest.raises(DecodeError, match="ambiguous") as caught:
        decoded(image)
    assert text in str(caught.value)
    assert "1 or white where the edit may act" in str(caught.value)


def test_dark_floats_are_refused_with_their_values() -> None:
    with pytest.raises(DecodeError, match=r"values are 0, 0\.25 of 1,"):
        decoded(Image.fromarray(LABELS.astype(np.float32) / 4), "TIFF")


def test_half_of_the_range_is_brightness() -> None:
    np.testing.assert_array_equal(decoded(Image.fromarray(LABELS.astype(np.float32) / 2), "TIFF"), LABELS * 128)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int64, np.float32, np.float64])
def test_an_array_of_labels_means_the_same_whatever_its_type(dtype: Any) -> None:
    for shape in (LABELS.shape, (*LABELS.shape, 1)):
        mask = picture(LABELS.reshape(shape).astype(dtype), "mask")
        np.testing.assert_array_equal(decode_mask(mask, 10_000, 1, LABELS.shape), INSIDE)
    mask = picture(INSIDE.astype(dtype) if dtype is not np.uint16 else INSIDE.astype(dtype) * 257, "mask")
    np.testing.assert_array_equal(decode_mask(mask, 10_000, 1, LABELS.shape), INSIDE)


def test_an_array_of_other_labels_is_refused() -> None:
    with pytest.raises(DecodeError, match="values are 0, 3 of 255"):
        decode_mask(picture(LABELS.astype(np.int64) * 3, "mask"), 10_000, 1, LABELS.shape)
    with pytest.raises(DecodeError, match="without a known scale"):
        picture(LABELS.astype(np.int64) * 1000, "mask")
