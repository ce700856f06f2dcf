"""Small pictures: masks over images, contact sheets."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from pipeline.looking.report.thumbnails import (
    TINT,
    SheetEntry,
    contact_sheet,
    mask_over,
    mask_uri,
    small_mask,
    thumbnail,
)
from pipeline.writing.rows import encode_mask


def test_the_mask_is_tinted_and_the_rest_is_faded():
    image = Image.new("RGB", (40, 40), (10, 200, 30))
    mask = np.zeros((80, 80), dtype=bool)
    mask[20:60, 20:60] = True
    shown = np.asarray(mask_over(image, mask)).astype(int)
    assert np.abs(shown[20, 20] - np.array(TINT)).sum() < np.abs(np.array(image.getpixel((20, 20))) - TINT).sum()
    assert (shown[9, 20] == TINT).all(), "a line runs around the mask"
    assert shown[2, 2].min() > 60


def test_a_contact_sheet_sets_its_entries_side_by_side_and_cuts_long_labels():
    image = Image.new("RGB", (30, 20), (10, 200, 30))
    entry = SheetEntry(original=image, mask=np.ones((20, 30), dtype=bool), edited=image, label="+ a hat" * 99)
    one, four = contact_sheet([entry]), contact_sheet([entry] * 4)
    assert four.width > 1.9 * one.width
    assert four.height > 1.6 * one.height
    right_of_its_pictures = np.asarray(one)[:, -20:]
    assert (right_of_its_pictures == 255).all()


def test_a_mask_for_a_page_is_clear_outside_and_tinted_inside():
    mask = np.zeros((600, 300), dtype=bool)
    mask[:300] = True
    uri = mask_uri(small_mask(encode_mask(mask)))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA"))
    assert shown.shape == (256, 128, 4)
    assert tuple(shown[10, 10, :3]) == TINT
    assert 0 < shown[10, 10, 3] < 255
    assert shown[250, 10, 3] == 0
    assert len(uri) < 600


def test_small_pictures_are_not_blown_up_and_large_ones_are_cut_down():
    assert thumbnail(Image.new("RGB", (64, 32))).size == (64, 32)
    assert thumbnail(Image.new("RGB", (64, 32)), enlarge=True).size == (256, 128)
    assert thumbnail(Image.new("RGB", (1000, 500))).size == (256, 128)
