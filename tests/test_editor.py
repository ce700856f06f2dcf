"""The plain-Python front door."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import Concept, Editor
from pipeline.errors import DecodeError, PrepareError, RecipeError
from pipeline.recipe import recipe_from

PICTURE = (np.random.default_rng(0).random((40, 56, 3)) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.load("analytic")


def test_an_image_is_edited_at_its_own_size_with_a_mask_per_concept(editor: Editor) -> None:
    concepts = ["hat", Concept(prompt="beard", direction="remove")]
    result = editor.edit(PICTURE, concepts, inversion={"method": "ddpm", "num_steps": 5})
    assert result.image.size == (56, 40)
    assert [mask.size for mask in result.masks] == [(56, 40)] * 2
    assert result.mask.mode == "1"
    union = np.asarray(result.masks[0]) | np.asarray(result.masks[1])
    assert np.array_equal(np.asarray(result.mask), union)
    assert union.any()
    assert not np.array_equal(np.asarray(result.image), PICTURE)


def test_every_spelling_of_an_image_gives_the_same_edit(editor: Editor, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(buffer.getvalue())
    results = [
        np.asarray(editor.edit(image, ["hat"], name="one").image)
        for image in (PICTURE, Image.fromarray(PICTURE), buffer.getvalue(), path, str(path))
    ]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_no_concept_returns_the_vae_round_trip(editor: Editor) -> None:
    smooth = np.linspace(0, 255, 40 * 56 * 3).reshape(40, 56, 3).astype(np.uint8)
    result = editor.edit(smooth)
    difference = np.abs(np.asarray(result.image).astype(int) - smooth.astype(int))
    assert result.masks == ()
    assert difference.mean() < 2  # the analytic model's VAE loses nothing; scaling to 64 pixels and back does


def test_a_mask_keeps_the_rest_as_it_was(editor: Editor) -> None:
    where = np.zeros((64, 64), dtype=np.uint8)
    where[:, :32] = 255
    picture = np.full((64, 64, 3), 128, dtype=np.uint8)
    result = editor.edit(
        picture, [{"prompt": "hat", "threshold": 0.3}], mask=where, editing={"method": "ledits_pp", "mask": "noise"}
    )
    changed = (np.asarray(result.image) != picture).any(axis=2)
    assert changed[:, :32].any()
    assert changed[:, 34:].mean() < 0.05


def test_four_edits_of_one_image_share_one_inversion() -> None:
    editor = Editor.load("analytic")
    recipe = recipe_from(
        {
            "source": {"shards": "-"},
            "edits": {f"scale{n}": {"concepts": [{"prompt": "hat", "guidance_scale": n}]} for n in (2, 3, 4, 5)},
            "inversion": {"method": "ddpm", "num_steps": 5},
            "sink": {"folder": "-"},
        }
    )
    results = editor.edit_many(PICTURE, recipe)
    assert [result.edit for result in results] == ["scale2", "scale3", "scale4", "scale5"]
    assert editor.engine.stats.unet_rows == 5 + 4 * 5 * 2
    assert editor.engine.stats.shared_rows == 3 * 2  # of the first step, the same in all four
    assert len({result.image.tobytes() for result in results}) == 4
    assert len({result.seed for result in results}) == 1


def test_text_to_image_is_the_noise_start_under_guidance(editor: Editor) -> None:
    request = {"target_prompt": "hat", "inversion": {"method": "noise", "num_steps": 5}, "editing": {"method": "cfg"}}
    blank = np.zeros((64, 64, 3), dtype=np.uint8)
    one, other = (np.asarray(editor.edit(blank, name="a", seed=seed, **request).image) for seed in (0, 1))
    assert not np.array_equal(one, other)
    again = np.asarray(editor.edit(blank, name="a", seed=0, **request).image)
    assert np.array_equal(one, again)


def test_settings_that_cannot_work_are_refused_together(editor: Editor) -> None:
    with pytest.raises(RecipeError) as caught:
        editor.edit(PICTURE, [{"prompt": "", "treshold": 1}], inversion={"method": "ddimm"})
    assert len(caught.value.problems) == 3


def test_an_image_that_cannot_be_opened_is_a_decode_error(editor: Editor) -> None:
    with pytest.raises(DecodeError):
        editor.edit(b"not an image", ["hat"])


def test_a_concept_that_would_never_act_is_refused(editor: Editor) -> None:
    with pytest.raises((PrepareError, RecipeError), match="would never act"):
        editor.edit(PICTURE, [{"prompt": "hat", "warmup_steps": 99}])
