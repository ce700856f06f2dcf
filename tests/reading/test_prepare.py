"""Preparing: placements and their inverse, the user's mask, which edit applies. With photographs nobody here drew."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DecodeError, PrepareError
from pipeline.reading import prepare as preparing
from pipeline.reading.placement import apply, place, restore, restore_mask
from pipeline.reading.requests import requests_of
from pipeline.records import Asked, Prepared
from pipeline.samples import Sample

FITS = ("crop", "pad", "stretch", "bucket")


def saved(pixels, kind="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // max(1, height - 1), x * 255 // max(1, width - 1), (x + y) % 60 + 90], -1).astype(
        np.uint8
    )


def prepare(row: Sample, recipe: Recipe, **options: Any) -> Prepared:
    requests = requests_of(row, recipe)
    return preparing.prepare(Asked(sample=row, edits=tuple(requests), requests=requests), recipe, **options)


def sample(image, **fields):
    return Sample(id="s/k", shard="s", key="k", index=0, image=image, **fields)


def psnr(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("fit", FITS)
def test_photographs_go_to_the_canvas_and_back_at_their_own_size(photographs, make_recipe, fit):
    assert len(photographs) >= 25
    recipe = make_recipe(fit=fit)
    modes = set()
    for name, path in photographs.items():
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            modes.add(image.mode)
            width, height = image.size
        prepared = prepare(sample(data), recipe, size=128, multiple=8)
        h, w = prepared.pixels.shape[:2]
        assert h % 8 == 0
        assert w % 8 == 0
        assert prepared.pixels.dtype == np.uint8
        if fit == "bucket":
            assert 0.8 < h * w / 128**2 < 1.25, name
            assert abs(np.log((h / w) / (height / width))) < 0.16, name
        else:
            assert (h, w) == (128, 128)
        back = restore(prepared.pixels, prepared.placement, prepared.original)
        assert back.shape == prepared.original.shape == (height, width, 3)
        mask = restore_mask(np.ones((h, w), bool), prepared.placement)
        assert mask.shape == (height, width)
        if fit == "crop":
            side = min(height, width)
            assert mask.sum() == side * side
            np.testing.assert_array_equal(back[~mask], prepared.original[~mask])
        else:
            assert mask.all()
    assert {"RGB", "L"} <= modes


@pytest.mark.parametrize(
    ("fit", "shape"),
    [
        (fit, shape)
        for fit in FITS
        for shape in [(64, 64), (64, 48), (40, 64), (100, 37), (1, 1), (3, 200), (640, 480)]
        if fit != "bucket" or max(shape) <= 16 * min(shape)  # no bucket is so narrow
    ],
)
def test_the_way_back_undoes_the_way_there(fit, shape):
    original = smooth(*shape)
    placement = place(shape, fit, size=64, multiple=8)
    canvas = apply(original, placement)
    assert canvas.shape == (*placement.canvas, 3)
    back = restore(canvas, placement, original)
    assert back.shape == original.shape
    if min(placement.scaled[0] / placement.crop[2], placement.scaled[1] / placement.crop[3]) >= 1:
        assert psnr(back, original) > 35


@pytest.mark.parametrize(
    ("fit", "shape"),
    [("crop", (64, 90)), ("crop", (64, 64)), ("pad", (64, 40)), ("pad", (33, 64)), ("stretch", (64, 64)),
     ("bucket", (64, 64)), ("bucket", (72, 56)), ("bucket", (48, 88))],
)  # fmt: skip
def test_without_scaling_no_pixel_changes_there_and_back(fit, shape):
    original = noise(*shape)
    placement = place(shape, fit, size=64, multiple=8)
    canvas = apply(original, placement)
    (top, left), (height, width) = placement.offset, placement.scaled
    y, x = placement.crop[:2]
    np.testing.assert_array_equal(canvas[top : top + height, left : left + width],
                                  original[y : y + height, x : x + width])  # fmt: skip
    np.testing.assert_array_equal(restore(canvas, placement, np.zeros_like(original))[y : y + height, x : x + width],
                                  original[y : y + height, x : x + width])  # fmt: skip
    mask = noise(*placement.canvas)[..., 0] > 127
    inside = mask[top : top + height, left : left + width]
    np.testing.assert_array_equal(restore_mask(mask, placement)[y : y + height, x : x + width], inside)


def test_padding_is_centred_and_repeats_the_edge():
    original = noise(64, 30)
    placement = place((64, 30), "pad", size=64, multiple=8)
    assert placement.offset == (0, 17)
    canvas = apply(original, placement)
    assert (canvas[:, :17] == original[:, :1]).all()
    assert (canvas[:, 47:] == original[:, -1:]).all()


def test_what_is_outside_a_crop_stays_the_originals():
    original = noise(50, 80)
    placement = place((50, 80), "crop", size=64, multiple=8)
    assert placement.crop == (0, 15, 50, 50)
    result = restore(np.zeros((64, 64, 3), np.uint8), placement, original)
    np.testing.assert_array_equal(result[:, :15], original[:, :15])
    np.testing.assert_array_equal(result[:, 65:], original[:, 65:])
    assert (result[:, 15:65] == 0).all()


def test_an_edit_at_a_place_on_the_canvas_lands_at_that_place_of_the_image():
    for fit in FITS:
        placement = place((96, 160), fit, size=64, multiple=8)
        region = np.zeros((96, 160), bool)
        region[40:56, 70:90] = True
        there = apply(np.repeat(region[..., None] * np.uint8(255), 3, -1), placement)[..., 0] > 127
        back = restore_mask(there, placement)
        both, either = (back & region).sum(), (back | region).sum()
        assert both / either > 0.7, fit


def test_buckets_have_the_models_area_and_the_images_shape():
    for shape in [(100, 100), (480, 640), (1000, 250), (2000, 130)]:
        h, w = place(shape, "bucket", size=512, multiple=8).canvas
        assert h % 8 == w % 8 == 0
        assert 0.95 < h * w / 512**2 < 1.05
        assert abs(np.log((h / w) / (shape[0] / shape[1]))) < 0.05


def test_an_image_that_is_a_bucket_already_is_not_scaled():
    assert place((1152, 896), "bucket", size=1024, multiple=8).canvas == (1152, 896)
    assert place((640, 1536), "bucket", size=1024, multiple=64).canvas == (640, 1536)
    assert place((512, 512), "bucket", size=1024, multiple=8).canvas == (1024, 1024)


def test_impossible_sizes_are_refused_with_the_way_out():
    with pytest.raises(PrepareError, match="multiple of 8"):
        place((10, 10), "pad", size=100, multiple=8)
    with pytest.raises(PrepareError, match="Use pad or crop"):
        place((10, 1000), "bucket", size=64, multiple=8)
    with pytest.raises(ValueError, match="canvas"):
        restore(noise(8, 8), place((64, 64), "pad", size=64, multiple=8), noise(64, 64))


def test_images_that_cannot_be_opened_fail_in_decoding(make_recipe):
    with pytest.raises(DecodeError):
        prepare(sample(b"no image"), make_recipe(), size=64, multiple=8)
    small = make_recipe(source={"max_pixels": 99})
    with pytest.raises(DecodeError, match="max_pixels"):
        prepare(sample(saved(noise(10, 10))), small, size=64, multiple=8)


def test_a_row_that_asks_for_more_than_the_recipe_allows_fails_in_preparation(make_recipe):
    two = sample(saved(noise(8, 8)), edits={"concepts": [{"prompt": "hat"}, {"prompt": "beard"}]})
    with pytest.raises(PrepareError, match="max_row_concepts"):
        prepare(two, make_recipe(source={"max_row_concepts": 1}), size=64, multiple=8)
    assert len(prepare(two, make_recipe(source={"max_row_concepts": 2}), size=64, multiple=8).requests) == 1


@pytest.mark.parametrize("fit", FITS)
def test_a_users_mask_follows_its_image_and_is_zero_in_the_padding(make_recipe, fit):
    mask = np.zeros((48, 64), np.uint8)
    mask[10:40, 20:50] = 255
    prepared = prepare(sample(saved(noise(48, 64)), mask=saved(mask)), make_recipe(fit=fit), size=64, multiple=8)
    assert prepared.mask.shape == prepared.pixels.shape[:2]
    assert prepared.mask.dtype == np.float32
    assert 0 <= prepared.mask.min() <= prepared.mask.max() <= 1
    assert (restore_mask(prepared.mask > 0.5, prepared.placement) == (mask > 0))[:, 8:56].mean() > 0.97
    white = prepare(sample(saved(noise(48, 64)), mask=saved(np.full((48, 64), 255, np.uint8))), make_recipe(fit=fit),
                    size=64, multiple=8)  # fmt: skip
    (top, left), (height, width) = white.placement.offset, white.placement.scaled
    assert white.mask.sum() == height * width
    assert (white.mask[top : top + height, left : left + width] == 1).all()


def test_a_mask_outside_of_what_a_crop_keeps_is_refused_and_a_black_one_is_not(make_recipe):
    mask = np.zeros((48, 96), np.uint8)
    prepared = prepare(sample(saved(noise(48, 96)), mask=saved(mask)), make_recipe(fit="crop"), size=64, multiple=8)
    assert not prepared.mask.any()
    mask[:, :20] = 255
    with pytest.raises(PrepareError, match="outside of the square"):
        prepare(sample(saved(noise(48, 96)), mask=saved(mask)), make_recipe(fit="crop"), size=64, multiple=8)


def test_a_mask_of_another_scale_fits_and_one_of_another_shape_does_not(make_recipe):
    image = saved(noise(48, 64))
    half = np.zeros((24, 32), np.uint8)
    half[:, 16:] = 255
    prepared = prepare(sample(image, mask=saved(half)), make_recipe(fit="stretch"), size=64, multiple=8)
    assert (prepared.mask[:, 32:] == 1).all()
    assert (prepared.mask[:, :32] == 0).all()
    with pytest.raises(PrepareError, match="not the same shape"):
        prepare(sample(image, mask=saved(np.zeros((48, 48), np.uint8))), make_recipe(), size=64, multiple=8)
    with pytest.raises(PrepareError, match="mask"):
        prepare(sample(image, mask=b"no image"), make_recipe(), size=64, multiple=8)


def test_image_and_mask_of_a_turned_photograph_agree(make_recipe):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[5:20, 30:50] = 255
    stored_mask = stored[..., 0]
    upright_mask = np.rot90(stored_mask, -1)
    for mask in (stored_mask, upright_mask):
        row = sample(saved(stored, exif=exif), mask=saved(np.ascontiguousarray(mask)))
        prepared = prepare(row, make_recipe(fit="pad"), size=64, multiple=8)
        assert prepared.original.shape == (64, 48, 3)
        np.testing.assert_array_equal(prepared.original[..., 0], upright_mask)
        np.testing.assert_array_equal(prepared.mask[:, 8:56], upright_mask / 255)


def test_a_rows_own_edit_goes_before_the_jobs(make_recipe):
    recipe = make_recipe(edits={"job": {"concepts": [{"prompt": "hat"}]}})
    own = {"target_prompt": "a dog"}
    assert set(requests_of(sample(b""), recipe)) == {"job"}
    assert requests_of(sample(b"", edits=own), recipe)["edit"].target_prompt == "a dog"
    assert requests_of(sample(b"", edits=json.dumps(own)), recipe)["edit"].target_prompt == "a dog"
    assert set(requests_of(sample(b"", edits={"one": own, "two": own}), recipe)) == {"one", "two"}


@pytest.mark.parametrize("edits", ["{no json", {}, [], {"concept": []}, {"concepts": [{"prompt": " "}]}, 7])
def test_a_row_without_a_usable_edit_is_refused(make_recipe, edits):
    with pytest.raises(PrepareError, match="edit"):
        requests_of(sample(b"", edits=edits), make_recipe())


def test_a_row_without_any_edit_is_refused_with_the_way_out(make_recipe):
    with pytest.raises(PrepareError, match="no usable edit"):
        requests_of(sample(b""), make_recipe(edits={}))


def test_a_caption_fills_an_empty_source_prompt_where_the_recipe_says_so(make_recipe):
    hat = [{"prompt": "a hat"}]
    edits = {"none": {"concepts": hat}, "own": {"source_prompt": "mine", "concepts": hat}}
    row = sample(b"", caption="  a cat ")
    filled = requests_of(row, make_recipe(edits=edits, source={"caption_is_source_prompt": True}))
    assert (filled["none"].source_prompt, filled["own"].source_prompt) == ("a cat", "mine")
    left = requests_of(row, make_recipe(edits=edits))
    assert left["none"].source_prompt == ""
    long = requests_of(sample(b"", caption="x" * 9000), make_recipe(source={"caption_is_source_prompt": True}))
    assert len(long["edit"].source_prompt) == 2000
