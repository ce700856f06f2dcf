"""Rows: what they hold, and that the same result gives the same bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.evaluation.metrics import NAMES
from pipeline.recipe import Recipe
from pipeline.records import Rejected
from pipeline.writing.rows import FIGURES, LABELS, encode_outcome, schema, stem_of
from tests.writing.making import MODEL, make_edited, make_rejected, make_sample

RecipeFor = Callable[..., Recipe]


def pixels_of(image: dict[str, bytes]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image["bytes"])))


def test_images_and_masks_come_back_pixel_for_pixel(recipe_for: RecipeFor) -> None:
    edited = make_edited(concepts=3)
    row = encode_outcome(edited, recipe_for(include_input=True), MODEL, 8)
    assert isinstance(row, dict)
    assert (pixels_of(row["image"]) == edited.image).all()
    assert (pixels_of(row["input"]) == edited.original).all()
    assert (pixels_of(row["mask"]) == edited.mask).all()
    assert [(pixels_of(mask) == truth).all() for mask, truth in zip(row["masks"], edited.masks, strict=True)] == [
        True
    ] * 3


def test_masks_take_one_bit_per_pixel(recipe_for: RecipeFor) -> None:
    row = encode_outcome(make_edited(), recipe_for(), MODEL, 8)
    assert isinstance(row, dict)
    assert Image.open(io.BytesIO(row["mask"]["bytes"])).mode == "1"


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_the_edited_image_has_the_format_that_the_recipe_names(recipe_for: RecipeFor, name: str, kind: str) -> None:
    row = encode_outcome(make_edited(), recipe_for(image_format=name), MODEL, 8)
    assert isinstance(row, dict)
    assert Image.open(io.BytesIO(row["image"]["bytes"])).format == kind
    assert row["image"]["path"].endswith(f".edited.{name}")


@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_the_same_result_gives_the_same_bytes(recipe_for: RecipeFor, name: str) -> None:
    rows = [encode_outcome(make_edited(3), recipe_for(image_format=name), MODEL, 8) for _ in range(2)]
    assert rows[0] == rows[1]


def test_a_row_fits_the_schema_column_for_column(recipe_for: RecipeFor) -> None:
    for include_input in (False, True):
        recipe = recipe_for(include_input=include_input)
        row = encode_outcome(make_edited(), recipe, MODEL, 8)
        assert isinstance(row, dict)
        assert set(row) - {LABELS} == set(schema(recipe.sink).names)
        assert pa.Table.from_pylist([row], schema=schema(recipe.sink)).num_rows == 1


def test_the_figures_are_those_that_are_measured() -> None:
    assert FIGURES == NAMES


def test_a_result_that_no_image_can_hold_is_rejected_in_stage_encode(recipe_for: RecipeFor) -> None:
    broken = make_edited(image=np.zeros((24, 32, 3), dtype=np.float32))
    rejected = encode_outcome(broken, recipe_for(), MODEL, 8)
    assert isinstance(rejected, Rejected)
    assert (rejected.stage, rejected.error_class) == ("encode", "EncodeError")
    assert "float32" in rejected.message


def test_an_image_too_wide_for_webp_is_rejected_with_its_size(recipe_for: RecipeFor) -> None:
    wide = np.zeros((1, 20_000, 3), dtype=np.uint8)
    rejected = encode_outcome(make_edited(image=wide), recipe_for(image_format="webp"), MODEL, 8)
    assert isinstance(rejected, Rejected)
    assert rejected.stage == "encode"
    assert "20000 x 1" in rejected.message


def test_what_was_rejected_before_stays_as_it_is(recipe_for: RecipeFor) -> None:
    rejected = make_rejected(error=ValueError("its traceback holds every array of its frames"))
    kept = encode_outcome(rejected, recipe_for(), MODEL, 8)
    assert kept == rejected
    assert isinstance(kept, Rejected)
    assert kept.error is None


def test_text_that_utf8_cannot_hold_does_not_fail_a_row(recipe_for: RecipeFor) -> None:
    odd = make_sample(0, caption="\ud800 cat", key="\ud83d", columns={"note": "\udfff"})
    row = encode_outcome(make_edited(sample=odd), recipe_for(), MODEL, 8)
    assert isinstance(row, dict)
    assert pa.Table.from_pylist([row], schema=schema(recipe_for().sink)).num_rows == 1
    assert json.loads(row["columns"]) == {"note": "?"}


def test_file_names_are_safe_and_stay_apart() -> None:
    keys = ["im.1", "im_1", "im/1", "../1", "ü", "", "x" * 300]
    samples = [make_sample(at, id=f"s.tar/{key}", key=key) for at, key in enumerate(keys)]
    stems = {stem_of(sample, edit, "m") for sample in samples for edit in ("a-b", "a_b")}
    assert len(stems) == 2 * len(keys)
    assert all("." not in stem and "/" not in stem and stem.isascii() for stem in stems)
    assert stem_of(samples[0], "a-b", "c") != stem_of(samples[0], "a", "b-c")
