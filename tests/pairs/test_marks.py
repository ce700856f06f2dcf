"""Marks of AI editing: read back by Pillow from every format, beside pixels that stay as they were."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import EncodeError
from pipeline.pairs.marks import SOURCE_TYPE, marked, packet

XMP = packet({"recipe": 'a"b<&'}, tool="shardedit 1", model="a model", version="")
PIXELS = np.random.default_rng(0).integers(0, 256, (31, 45, 3), dtype=np.uint8)
SAVED = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 90},
    "jpg_with_exif": {"format": "JPEG", "quality": 90, "exif": Image.Exif(), "icc_profile": b"x" * 300},
    "webp": {"format": "WEBP", "quality": 90},
    "webp_lossless": {"format": "WEBP", "lossless": True},
    "webp_extended": {"format": "WEBP", "icc_profile": b"x" * 301},
}


def saved(pixels: np.ndarray = PIXELS, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **options)
    return file.getvalue()


def opened(image: bytes) -> Image.Image:
    found = Image.open(io.BytesIO(image))
    found.load()
    return found


def xmp_of(image: bytes) -> bytes:
    found = opened(image).info["xmp"]
    assert isinstance(found, bytes)
    return found


@pytest.mark.parametrize("options", SAVED.values(), ids=SAVED)
def test_a_mark_is_read_back_and_the_pixels_stay(options):
    image = saved(**options)
    result = marked(image, XMP)
    assert xmp_of(result) == XMP
    assert np.array_equal(np.asarray(opened(result)), np.asarray(opened(image)))
    assert opened(result).info.get("icc_profile") == opened(image).info.get("icc_profile")
    assert opened(result).info.get("exif") == opened(image).info.get("exif")


@pytest.mark.parametrize("options", SAVED.values(), ids=SAVED)
def test_a_second_mark_takes_the_place_of_the_first(options):
    image = saved(**options)
    other = packet({}, tool="another", model="b", version="2")
    assert marked(marked(image, other), XMP) == marked(image, XMP)


def test_transparency_survives_in_webp():
    pixels = np.dstack([PIXELS, np.arange(PIXELS[..., 0].size, dtype=np.uint32).reshape(31, 45) % 256]).astype(np.uint8)
    image = saved(pixels, format="WEBP", lossless=True)
    assert np.array_equal(np.asarray(opened(marked(image, XMP))), np.asarray(opened(image)))


def test_the_packet_says_who_edited_in_the_terms_of_iptc():
    (described,) = ElementTree.fromstring(XMP.decode().replace("\ufeff", "")).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    said = {name.rpartition("}")[2]: value for name, value in described.attrib.items()}
    assert said["DigitalSourceType"] == SOURCE_TYPE
    assert SOURCE_TYPE.endswith("/compositeWithTrainedAlgorithmicMedia")
    assert (said["CreatorTool"], said["AISystemUsed"], said["recipe"]) == ("shardedit 1", "a model", 'a"b<&')
    assert "AISystemVersionUsed" not in said


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_what_is_cut_or_no_image_is_refused(kind):
    image = saved(**SAVED[kind])
    with pytest.raises(EncodeError, match="cannot be marked as edited"):
        marked(image[:40] if kind != "jpg" else image[:30], XMP)
    with pytest.raises(EncodeError, match="no PNG, JPEG or WebP"):
        marked(b"GIF89a", XMP)
