"""Decoding: every mode and orientation becomes the RGB picture that a viewer shows, or a reason why not."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from pipeline.errors import DecodeError
from pipeline.reading.decode import FORMATS, decode, decode_mask, upright

LIMIT = 64_000_000


def saved(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(height=7, width=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_lossless_rgb_keeps_its_very_pixels():
    for kind in ("png", "bmp", "tiff", "ppm"):
        pixels, orientation = decode(saved(Image.fromarray(rgb()), kind), LIMIT)
        np.testing.assert_array_equal(pixels, rgb())
        assert (pixels.dtype, orientation) == (np.uint8, 1)
    pixels, _ = decode(saved(Image.fromarray(rgb()), "webp", lossless=True), LIMIT)
    np.testing.assert_array_equal(pixels, rgb())


def test_gray_and_one_bit_images_become_gray_rgb():
    gray = rgb()[..., 0]
    pixels, _ = decode(saved(Image.fromarray(gray)), LIMIT)
    np.testing.assert_array_equal(pixels, np.stack([gray] * 3, axis=-1))
    bits = gray > 127
    pixels, _ = decode(saved(Image.fromarray(bits)), LIMIT)
    np.testing.assert_array_equal(pixels, np.stack([bits * np.uint8(255)] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    pixels = np.dstack([rgb(), np.full((7, 5), 255, np.uint8)])
    pixels[:, :2, 3] = 0
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.new("P", (5, 7), 1)
        image.putpalette([0, 0, 0, 200, 10, 10])
        image.paste(0, (0, 0, 2, 7))
        data = saved(image, transparency=0)
    else:
        data = saved(image.convert(mode))
    found, _ = decode(data, LIMIT)
    assert (found[:, :2] == 255).all()
    expected = {"RGBA": rgb()[:, 2:], "P": np.broadcast_to([200, 10, 10], (7, 3, 3))}
    if mode in expected:
        np.testing.assert_array_equal(found[:, 2:], expected[mode])
    else:
        assert (found[:, 2:] == np.asarray(Image.fromarray(rgb()).convert("L").convert("RGB"))[:, 2:]).all()


def test_half_transparency_is_mixed_with_white_and_a_colour_key_counts_as_transparent():
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert abs(int(decode(saved(half), LIMIT)[0][0, 0, 0]) - 127) <= 1
    key = Image.new("RGB", (2, 2), (9, 9, 9))
    assert (decode(saved(key, transparency=(9, 9, 9)), LIMIT)[0] == 255).all()


def test_sixteen_bit_and_float_gray_are_scaled_by_a_fixed_rule():
    wide = np.array([[0, 257, 32896, 65535]], np.uint16)
    for kind in ("png", "tiff"):
        pixels, _ = decode(saved(Image.fromarray(wide), kind), LIMIT)
        assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    unit = np.array([[0, 0.5, 1]], np.float32)
    assert decode(saved(Image.fromarray(unit), "tiff"), LIMIT)[0][0, :, 0].tolist() == [0, 128, 255]
    bytes_as_float = np.array([[0, 100, 255]], np.float32)
    assert decode(saved(Image.fromarray(bytes_as_float), "tiff"), LIMIT)[0][0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[np.nan, 1]], np.float32),
        np.array([[-1.0, 1]], np.float32),
        np.array([[0, 1e6]], np.float32),
        np.array([[0, 70_000]], np.int32),
    ],
)
def test_numbers_without_a_meaning_as_gray_are_refused(values):
    with pytest.raises(DecodeError):
        decode(saved(Image.fromarray(values), "tiff"), LIMIT)


def test_cmyk_is_converted_with_and_without_a_profile():
    image = Image.fromarray(rgb(16, 16)).convert("CMYK")
    plain, _ = decode(saved(image, "tiff"), LIMIT)
    np.testing.assert_array_equal(plain, np.asarray(image.convert("RGB")))
    broken, _ = decode(saved(image, "tiff", icc_profile=b"no profile"), LIMIT)
    np.testing.assert_array_equal(broken, plain)
    unfitting = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(decode(saved(image, "tiff", icc_profile=unfitting), LIMIT)[0], plain)
    assert decode(saved(image, "jpeg"), LIMIT)[0].shape == (16, 16, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, found = decode(saved(Image.fromarray(rgb()), exif=exif), LIMIT)
    assert found == orientation
    np.testing.assert_array_equal(pixels, upright(rgb(), orientation))
    assert pixels.shape == ((5, 7, 3) if orientation > 4 else (7, 5, 3))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    np.testing.assert_array_equal(pixels[corner[orientation]], rgb()[0, 0])


ORIENTATION_AS_TEXT = b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x03\0\0\0abc\0\0\0\0\0"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("block", [b"MM\0*\xff\xff\xff\xff", b"XXXX", ORIENTATION_AS_TEXT])
def test_a_broken_exif_block_does_not_cost_the_picture(block):
    data = saved(Image.fromarray(rgb(16, 16)), "jpeg", exif=b"Exif\0\0" + block)
    pixels, orientation = decode(data, LIMIT)
    assert (pixels.shape, orientation) == ((16, 16, 3), 1)


def frames():
    return [Image.fromarray(rgb(seed=seed)) for seed in range(3)]


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_animations_and_pages_are_refused_with_their_number(kind):
    data = saved(frames()[0], kind, save_all=True, append_images=frames()[1:])
    with pytest.raises(DecodeError, match="3 pictures"):
        decode(data, LIMIT)
    assert decode(saved(frames()[0], kind), LIMIT)[0].shape == (7, 5, 3)


def test_a_camera_file_with_previews_is_its_first_picture():
    data = saved(Image.fromarray(rgb(16, 16)), "mpo", save_all=True, append_images=[Image.fromarray(rgb(8, 8))])
    assert decode(data, LIMIT)[0].shape == (16, 16, 3)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    data = saved(Image.fromarray(rgb(10, 10)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DecodeError, match=r"10 x 10 = 100 pixels, more than source\.max_pixels \(99\)"):
        decode(data, 99)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [0, 12_000, 60_000, 2**31 - 1])
def test_a_header_that_claims_too_much_or_nothing_is_refused(side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(DecodeError):
        decode(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT", LIMIT)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff", "gif", "bmp", "jpeg2000", "avif"])
def test_cut_files_are_refused_in_every_format(kind):
    data = saved(Image.fromarray(rgb(64, 64)), kind)
    assert decode(data, LIMIT)[0].shape == (64, 64, 3)
    for share in (0.05, 0.5, 0.9):
        with pytest.raises(DecodeError):
            decode(data[: int(len(data) * share)], LIMIT)


@pytest.mark.parametrize("level", [0, 6])
def test_a_flipped_bit_in_a_png_is_noticed_or_changes_no_pixel(level):
    original = saved(Image.fromarray(rgb(16, 16)), compress_level=level)
    refused = 0
    for at in range(len(original)):
        data = bytearray(original)
        data[at] ^= 1
        try:
            pixels, _ = decode(bytes(data), LIMIT)
        except DecodeError:
            refused += 1
        else:
            np.testing.assert_array_equal(pixels, rgb(16, 16))
    assert refused > 0.9 * len(original)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", b"<svg/>", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_is_refused_with_a_message_without_addresses(data):
    with pytest.raises(DecodeError) as caught:
        decode(data, LIMIT)
    assert "0x" not in str(caught.value)
    assert "BytesIO" not in str(caught.value)


def test_no_format_that_runs_programs_is_tried():
    assert not {"EPS", "PDF", "WMF"} & set(FORMATS)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from(["png", "jpeg", "webp", "tiff", "gif", "bmp"]), seed=st.integers(0, 2**32))
def test_damaged_bytes_are_decoded_or_refused_and_nothing_else(kind, seed):
    noise = random.Random(seed)
    data = bytearray(saved(Image.fromarray(rgb(24, 24)), kind))
    for _ in range(noise.randrange(1, 9)):
        data[noise.randrange(len(data))] = noise.randrange(256)
    try:
        pixels, _ = decode(bytes(data), 1_000_000)
    except DecodeError:
        return
    assert pixels.ndim == 3
    assert pixels.dtype == np.uint8


def test_a_mask_drawn_on_the_unturned_image_is_turned_with_it():
    values = rgb(7, 5)[..., 0]
    turned = decode_mask(saved(Image.fromarray(values)), LIMIT, 6, (5, 7))
    np.testing.assert_array_equal(turned, upright(values, 6))
    drawn_upright = decode_mask(saved(Image.fromarray(values)), LIMIT, 6, (7, 5))
    np.testing.assert_array_equal(drawn_upright, values)


def test_a_cut_file_fails_whatever_another_package_asked_pillow_for_and_that_choice_stays(monkeypatch):
    cut = saved(Image.fromarray(rgb(200, 200)), "jpeg")[:-2000]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DecodeError, match="damaged or cut"):
        decode(cut, LIMIT)
    assert ImageFile.LOAD_TRUNCATED_IMAGES
