"""The plain-Python front door."""

from __future__ import annotations

import gc
import io
import traceback
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from pipeline import Concept, Editor
from pipeline.errors import BlackImageError, DecodeError, EditError, InvertError, ModelError, PrepareError, RecipeError
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.models.demo.world import Scene, draw
from pipeline.recipe import recipe_from
from pipeline.result import Result
from tests.methods import network_calls

QUICK: dict[str, Any] = {"inversion": {"method": "ddpm", "num_steps": 2}}
PICTURE = (np.random.default_rng(0).random((40, 56, 3)) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.load("analytic")


def test_an_image_is_edited_at_its_own_size_with_a_mask_per_concept(editor: Editor) -> None:
    concepts = [{"prompt": "hat", "threshold": 0.5}, Concept(prompt="beard", direction="remove", threshold=0.5)]
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
    slow = io.BytesIO()
    Image.fromarray(PICTURE).save(slow, "PNG", compress_level=0)
    rgba = np.dstack([PICTURE, np.full((40, 56), 255, np.uint8)])
    spellings = (PICTURE, Image.fromarray(PICTURE), buffer.getvalue(), slow.getvalue(), path, str(path), rgba)
    results = [editor.edit(image, ["hat"], **QUICK) for image in spellings]
    assert len({result.seed for result in results}) == 1
    assert len({result.image.tobytes() for result in results}) == 1
    assert editor.edit(PICTURE[:, ::-1], ["hat"], **QUICK).seed != results[0].seed


def test_reconstruction_returns_the_vae_round_trip(editor: Editor) -> None:
    smooth = np.linspace(0, 255, 40 * 56 * 3).reshape(40, 56, 3).astype(np.uint8)
    result = editor.edit(smooth, editing={"method": "reconstruct"})
    difference = np.abs(np.asarray(result.image).astype(int) - smooth.astype(int))
    assert (result.masks, result.mask) == ((), None)
    assert result._repr_html_().count("<img") == 2  # input and edit
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
    assert editor.engine.stats.network_rows == 5 + 4 * 5 * 2
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


def test_one_concept_may_stand_alone(editor: Editor) -> None:
    spellings: tuple[Any, ...] = ("hat", ["hat"], {"prompt": "hat"}, Concept(prompt="hat"), (Concept(prompt="hat"),))
    results = [editor.edit(PICTURE, concepts, **QUICK) for concepts in spellings]
    assert {result.request.concepts for result in results} == {(Concept(prompt="hat"),)}
    assert len({result.image.tobytes() for result in results}) == 1


def test_no_edit_asked_is_refused(editor: Editor) -> None:
    with pytest.raises(RecipeError, match="no edit is asked"):
        editor.edit(PICTURE)
    empty = recipe_from({"source": {"shards": "-"}, "sink": {"folder": "-"}})
    with pytest.raises(RecipeError, match="no edit is asked"):
        editor.edit_many(PICTURE, empty)


def test_an_image_is_turned_upright_however_it_is_given(editor: Editor, tmp_path: Path) -> None:
    lying = tmp_path / "lying.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.fromarray(PICTURE).save(lying, exif=exif)
    opened = Image.open(lying)
    upright = ImageOps.exif_transpose(opened)
    spellings = (lying, opened, upright, np.asarray(upright), lying.read_bytes())
    results = [editor.edit(image, "hat", **QUICK) for image in spellings]
    assert {result.image.size for result in results} == {(40, 56)}
    assert len({result.seed for result in results}) == 1
    assert len({result.image.tobytes() for result in results}) == 1
    assert np.array_equal(np.asarray(results[0].input), np.rot90(PICTURE, -1))


MODES = (
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"),
    *("I;16", "I;16B", "I;16L"),
)


@pytest.mark.parametrize("mode", MODES)
def test_a_pillow_image_of_every_mode_is_edited(editor: Editor, mode: str) -> None:
    light = {"I": 65535, "F": 1.0, "I;16": 65535, "I;16B": 65535, "I;16L": 65535, "LAB": (255, 128, 128)}
    via = {"La": "LA", "RGBa": "RGBA", "PA": "LA"}.get(mode, "RGB")
    picture = (
        Image.new(mode, (56, 40), light[mode]) if mode in light else Image.new(via, (56, 40), "white").convert(mode)
    )
    assert picture.mode == mode
    result = editor.edit(picture, "hat", **QUICK)
    assert np.asarray(result.input).min() > 250, "white stays white"
    assert result.image.size == (56, 40)


LIGHT = np.linspace(0, 1, 40 * 56 * 3).reshape(40, 56, 3)
BYTES = np.rint(LIGHT * 255).astype(np.uint8)
ARRAYS = {
    "float64": LIGHT,
    "float32": LIGHT.astype(np.float32),
    "float to 255": BYTES.astype(np.float64),
    "uint16": BYTES.astype(np.uint16) * 257,
    "rgba": np.dstack([BYTES, np.full((40, 56), 255, np.uint8)]),
    "a view": BYTES[::-1].copy()[::-1],
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=list(ARRAYS))
def test_arrays_of_equal_brightness_are_the_same_image(editor: Editor, array: np.ndarray) -> None:
    assert np.array_equal(np.asarray(editor.edit(array, "hat", **QUICK).input), BYTES)


@pytest.mark.parametrize("shape", [(40, 56), (40, 56, 1), (40, 56, 2)])
def test_gray_arrays_are_images(editor: Editor, shape: tuple[int, ...]) -> None:
    gray = np.full(shape, 255, np.uint8)
    gray[:20, :, ...] = 100
    if len(shape) == 3:
        gray[..., -1] = 255 if shape[2] == 2 else gray[..., -1]
    result = np.asarray(editor.edit(gray, "hat", **QUICK).input)
    assert (result[:20] == 100).all()
    assert (result[20:] == 255).all()


def test_an_array_of_booleans_is_black_and_white(editor: Editor) -> None:
    assert np.array_equal(
        np.asarray(editor.edit(BYTES[..., 0] > 99, "hat", **QUICK).input)[..., 0] > 0, BYTES[..., 0] > 99
    )


REFUSED: dict[str, tuple[Any, str]] = {
    "int64": (BYTES.astype(np.int64), "int64.*without a known scale"),
    "negative": (LIGHT * 2 - 1, r"float64.*-1\.0 to 1\.0"),
    "bright": (LIGHT * 1000, "float64.*up to 1000"),
    "turned": (LIGHT.transpose(2, 0, 1), r"\(3, 40, 56\).*channels come last"),
    "batch": (BYTES[None], r"\(1, 40, 56, 3\)"),
    "empty": (BYTES[:0], "no pixels"),
    "complex": (LIGHT.astype(complex), "complex128"),
    "nan": (np.full((4, 4), np.nan), "nan"),
    "list": ([[0, 1], [2, 3]], "a list"),
    "None": (None, "NoneType"),
    "Pillow, empty": (Image.new("RGB", (0, 4)), "no pixels"),
}


@pytest.mark.parametrize(("image", "says"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_image_is_refused_by_name(editor: Editor, image: Any, says: str) -> None:
    with pytest.raises(DecodeError, match=says):
        editor.edit(image, "hat", **QUICK)


def test_a_file_that_is_not_there_is_the_systems_own_error(editor: Editor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        editor.edit(tmp_path / "gone.png", "hat")


def test_results_stand_in_the_recipes_order_whichever_finishes_first(editor: Editor) -> None:
    slow = {"inversion": {"method": "ddpm", "num_steps": 6}, "editing": {"method": "reconstruct"}}
    quick = {"inversion": {"method": "ddpm", "num_steps": 2}, "editing": {"method": "ledits_pp"}}
    recipe = recipe_from(
        {
            "source": {"shards": "-"},
            "edits": {"second": {"concepts": [{"prompt": "hat"}]}, "first": {"concepts": [{"prompt": "dog"}]}},
            "methods": {"slow": slow, "quick": quick, "a": slow},
            "sink": {"folder": "-"},
        }
    )
    asked = [(edit, method) for edit in ("second", "first") for method in ("slow", "quick", "a")]
    assert [(result.edit, result.method) for result in editor.edit_many(PICTURE, recipe)] == asked


def with_background(background: str, **sections: Any) -> Any:
    return recipe_from(
        {
            "source": {"shards": "-"},
            "edits": {"concepts": [{"prompt": "hat", "threshold": 0.8}, {"prompt": "beard", "threshold": 0.9}]},
            "inversion": {"method": "ddpm", "num_steps": 3},
            "sink": {"folder": "-", "background": background},
            **sections,
        }
    )


def test_the_background_of_the_input_is_kept_pixel_by_pixel() -> None:
    image = draw(Scene(), 96)  # half as large again as what the model sees
    sections = {"model": {"name": "demo", "size": 64}}
    with Editor.load("demo") as editor:
        (plain,), (kept,) = (editor.edit_many(image, with_background(one, **sections)) for one in ("result", "input"))
    assert plain.mask is not None
    inside, made, shown = (np.asarray(one) for one in (plain.mask, plain.image, kept.image))
    far = ~np.asarray(plain.mask.filter(ImageFilter.MaxFilter(2 * 2 * 6 + 1)))  # two cells of 6 pixels
    assert inside.any()
    assert far.any()
    assert np.array_equal(shown[inside], made[inside])
    assert np.array_equal(shown[far], image[far])
    assert not np.array_equal(made[far], image[far]), "the model's own is another"
    assert np.array_equal(np.asarray(kept.mask), inside)


def test_a_result_without_a_mask_fails_where_the_background_is_to_be_kept(editor: Editor) -> None:
    to_masks = {"edits": {"target_prompt": "a hat"}, "editing": {"method": "cfg"}}
    with pytest.raises(EditError, match=r"by its mask, and this one has none.*source\.mask"):
        editor.edit_many(PICTURE, with_background("input", **to_masks))


def test_a_background_is_kept_by_the_rows_own_mask_where_a_method_finds_none(editor: Editor) -> None:
    mask = np.zeros((40, 56), np.uint8)
    mask[10:20, 10:30] = 255
    to_masks = {
        "edits": {"source_prompt": "a face", "target_prompt": "a hat"},
        "editing": {"method": "masactrl", "start_step": 1},
    }
    (kept,) = editor.edit_many(PICTURE, with_background("input", **to_masks), mask=mask)
    changed = (np.asarray(kept.image) != PICTURE).any(axis=-1)
    assert changed[10:20, 10:30].any()
    assert not changed[:, 50:].any(), "where two latents around the mask end nothing is changed"


class MethodOfTheirOwnError(ValueError):
    """An error that a method of the user's own raises."""


@pytest.mark.parametrize("error", [InvertError("no"), MethodOfTheirOwnError("no"), KeyError("word")], ids=repr)
def test_what_went_wrong_is_raised_as_it_was(editor: Editor, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    cause = OSError("the cause")

    def broken(self: DDPMInversion, source: Any) -> Any:
        yield from ()
        raise error from cause

    monkeypatch.setattr(DDPMInversion, "invert", broken)
    with pytest.raises(type(error)) as caught:
        editor.edit(PICTURE, "hat")
    assert caught.value is error
    assert caught.value.__cause__ is cause
    assert "broken" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_a_black_result_is_raised_as_one(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        type(editor.backbone), "decode_latents", lambda self, latents: torch.zeros((1, 64, 64, 3), dtype=torch.uint8)
    )
    with pytest.raises(BlackImageError):
        editor.edit(PICTURE, "hat", **QUICK)


def test_many_images_give_a_list_in_their_order_and_one_that_fails_loses_no_other(editor: Editor) -> None:
    images: list[Any] = [PICTURE, b"not an image", PICTURE[::-1], Image.fromarray(PICTURE[:, ::-1])]
    seen: list[tuple[int, int]] = []
    results = editor.edit_all(images, "hat", on_progress=lambda *at: seen.append(at), **QUICK)
    assert isinstance(results[1], DecodeError)
    for at in (0, 2, 3):
        alone = editor.edit(images[at], "hat", **QUICK)
        together = results[at]
        assert not isinstance(together, Exception)
        assert together.seed == alone.seed
        assert np.abs(np.asarray(together.image).astype(int) - np.asarray(alone.image)).max() <= 1
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_many_images_share_network_calls() -> None:
    editor = Editor.load("analytic")
    calls = network_calls(editor.engine)
    editor.edit_all([PICTURE] * 4, "hat", names=list("abcd"), **QUICK)
    together = len(calls)
    editor.edit(PICTURE, "hat", **QUICK)
    assert together <= len(calls) - together


def test_each_image_has_its_own_mask_and_name(editor: Editor) -> None:
    left = np.zeros((40, 56), dtype=np.uint8)
    left[:, :28] = 255
    large = [{"prompt": "hat", "threshold": 0.3}]
    by_noise: dict[str, Any] = {"editing": {"method": "ledits_pp", "mask": "noise"}, **QUICK}
    several: dict[str, Any] = {"masks": [None, None, left], "names": ["a", "b", "a"]}
    free, other, bound = editor.edit_all([PICTURE] * 3, large, **several, **by_noise)
    assert isinstance(free, Result)
    assert isinstance(other, Result)
    assert isinstance(bound, Result)
    assert free.seed == bound.seed != other.seed
    same = np.asarray(free.image) == np.asarray(bound.image)
    assert not same.all(), "a mask changes the edit"
    assert np.array_equal(editor.edit(PICTURE, large, name="a", mask=left, **by_noise).image, bound.image)
    with pytest.raises(ValueError, match="1 masks for 2 images"):
        editor.edit_all([PICTURE, PICTURE], large, masks=[left])


def test_asked_to_raise_the_first_failure_ends_it_and_leaves_nothing_in_the_engine() -> None:
    editor = Editor.load("analytic")
    with pytest.raises(DecodeError):
        editor.edit_all([PICTURE, b"not an image", PICTURE], "hat", errors="raise")
    before = editor.engine.stats.network_rows
    editor.edit(PICTURE, "hat", **QUICK)
    assert editor.engine.stats.network_rows - before == 2 + 2 * 2


def test_a_closed_editor_frees_its_model_and_keeps_its_results() -> None:
    with Editor.load("analytic") as editor:
        result = editor.edit(PICTURE, "hat", **QUICK)
        model = weakref.ref(editor.backbone)
    gc.collect()
    assert model() is None
    assert result.image.size == (56, 40)
    editor.close()  # twice is no error
    with pytest.raises(RuntimeError, match="closed"):
        editor.edit(PICTURE, "hat")


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    for device in ("cuda:7", "nonsense"):
        with pytest.raises(ModelError, match=device):
            Editor.load("demo", device=device)
    with pytest.raises(ModelError, match="works on the CPU, not on meta"):
        Editor.load("analytic", device="meta")
    assert str(Editor.load("demo", device="cpu").backbone.device) == "cpu"


def test_a_notebook_shows_input_mask_and_edit(editor: Editor) -> None:
    html = editor.edit(PICTURE, {"prompt": "<b>hat", "direction": "remove"}, **QUICK)._repr_html_()
    assert html.count("data:image/webp;base64,") == 3
    assert [part in html for part in (">input<", ">mask<", ">edit<", "− &lt;b&gt;hat")] == [True] * 4
    assert "<b>" not in html


def test_a_result_prints_in_a_line(editor: Editor) -> None:
    result = editor.edit(PICTURE, "hat", **QUICK)
    share = np.asarray(result.mask).mean()
    assert repr(result) == f"<Result of 'edit' by ledits_pp, 56 x 40 pixels, a region of {share:.1%}>"


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        (QUICK, 3),
        ({"inversion": {"method": "null_text", "num_steps": 2}, "editing": {"method": "prompt_to_prompt"}}, None),
    ],
    ids=["ddpm", "may end early"],
)
def test_progress_rises_with_every_network_call_and_ends_at_all_rows(settings: Any, calls: int | None) -> None:
    editor = Editor.load("analytic")
    made = network_calls(editor.engine)
    seen: list[tuple[int, int]] = []
    edit = {"concepts": "hat"} if calls else {"source_prompt": "a cat", "target_prompt": "a dog"}
    editor.edit(PICTURE, **edit, **settings, on_progress=lambda *at: seen.append(at))
    done, totals = zip(*seen, strict=True)
    assert len(set(totals)) == 1
    assert done[-1] == totals[0] >= editor.engine.stats.network_rows
    assert list(done) == sorted(set(done))
    if calls:
        assert len(done) == calls == len(made)
        assert totals[0] == editor.engine.stats.network_rows
