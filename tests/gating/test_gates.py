"""Gates as functions of one result: figures, bounds, presets, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import EncodeError, ModelError, RecipeError
from pipeline.evaluation import looks
from pipeline.evaluation.looks import ClipLook, SafetyLook, gates_of
from pipeline.gating.gate import Gates, change_inside, passes, rejecting
from pipeline.recipe import Recipe, recipe_from
from pipeline.records import EditRequest
from pipeline.settings.gates import PRESETS, GatesConfig
from pipeline.writing.gate_counts import added, gate_counts, seen_in_words
from pipeline.writing.manifest import GateCounts
from tests.runs import recipe_data
from tests.writing.making import make_edited


def config(**gates: Any) -> GatesConfig:
    return GatesConfig.model_validate({"preset": "none", **gates})


def recipe(tmp_path: Path, gates: dict[str, Any], **more: Any) -> Recipe:
    return recipe_from(recipe_data(tmp_path, tmp_path / "out") | {"gates": gates} | more)


def test_change_inside_is_the_mean_over_the_mask_alone() -> None:
    before = np.full((4, 5, 3), 100, dtype=np.uint8)
    after, mask = before.copy(), np.zeros((4, 5), dtype=bool)
    mask[1, 1:3] = True
    after[1, 1], after[3, 3] = (110, 90, 100), 255  # outside of the mask nothing counts
    assert change_inside(before, after, mask) == pytest.approx((10 + 10) / 6)
    assert change_inside(before, after, None) is None
    assert change_inside(before, after, np.zeros_like(mask)) is None


@pytest.mark.parametrize(("value", "passed"), [(2.0, True), (1.99, False), (5.0, True), (5.01, False), (None, None)])
def test_bounds_include_their_ends_and_what_is_undefined_is_not_judged(
    value: float | None, passed: bool | None
) -> None:
    gates = config(change_inside={"min": 2.0, "max": 5.0})
    assert passes(gates, {"change_inside": value}, "change_inside") is passed
    assert rejecting(gates, {"change_inside": value}) == (() if passed is not False else ("change_inside",))


def test_a_background_that_is_another_one_fails_alignment_though_no_number_says_how_far() -> None:
    gates = config(align_corner_px={"max": 0.6}, mask_share={"max": 0.5})
    assert rejecting(gates, {"align_verdict": "unrelated", "mask_share": 0.9}) == ("align_corner_px", "mask_share")
    assert rejecting(gates, {"align_verdict": "undetermined"}) == ()


def test_a_shifted_result_is_rejected_and_its_own_picture_is_not() -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((120, 120), Image.Resampling.BICUBIC))
    mask = np.zeros((112, 112), dtype=bool)
    mask[40:60, 40:60] = True
    gates = Gates(config(align_corner_px={"max": 0.6}))
    common = {"original": picture[:112, :112], "masks": (mask,), "mask": mask, "concepts": 1}
    shifted = gates(make_edited(image=picture[2:114, 3:115], **common))
    assert shifted.gated is not None
    assert shifted.gated.reasons == ("align_corner_px",)
    assert shifted.gated.figures["align_shift"] == pytest.approx(3.0, abs=0.1)
    same = gates(make_edited(image=picture[:112, :112], **common))
    assert same.gated is not None
    assert same.gated.reasons == ()
    assert same.gated.figures["align_verdict"] == "aligned"


def test_gates_that_are_named_replace_those_of_the_preset_and_null_turns_one_off() -> None:
    gates = GatesConfig.model_validate({"background_psnr": {"min": 30}, "mask_share": None})
    expected = PRESETS["pixels"] | {"background_psnr": {"min": 30}}
    expected.pop("mask_share")
    assert {name: one.model_dump(exclude_none=True) for name, one in gates.gates.items()} == expected
    again = GatesConfig.model_validate(gates.model_dump(mode="json"))
    assert again == gates  # as run.json holds it


def test_published_presets_have_published_bounds() -> None:
    clip: dict[str, Any] = {"clip": "somewhere"}
    found = GatesConfig.model_validate({"preset": "instructpix2pix", **clip}).gates
    assert {name: one.min for name, one in found.items()} == {
        "clip_sim_0": 0.2, "clip_sim_1": 0.2, "clip_sim_dir": 0.2, "clip_sim_image": 0.7
    }  # fmt: skip
    found = GatesConfig.model_validate({"preset": "ultraedit", **clip}).gates
    assert found["clip_sim_dir"].min == 0.22
    assert found["clip_sim_image"].min == 0.75
    assert found["dinov2_sim"].min == 0.4


@pytest.mark.parametrize(
    ("gates", "more", "said"),
    [
        ({"preset": "ultraedit"}, {}, "gates.clip_sim_dir: nothing measures it. Set gates.clip to a CLIP"),
        ({"nsfw_score": {"max": 0.5}}, {}, "Set gates.safety to a checker of yours"),
        ({"preset": "none"}, {}, "has no gate, and rejects nothing"),
        ({"mask_share": {"min": 0.9, "max": 0.1}}, {}, "min 0.9 is above max 0.1: nothing would pass"),
        ({"mask_share": {}}, {}, "bounds nothing. Give min, max or both"),
        ({"preset": "best"}, {}, "gates.preset"),
        ({"edit_change": {"min": 9}}, {"round_trip": False}, "is not measured with sink.round_trip false"),
        ({"clip": "x", "clip_sim_1": {"min": 0.2}}, {}, "edits.a: gates.clip_sim_1 compares with the target_prompt"),
    ],
)
def test_gates_that_could_judge_nothing_are_refused_with_the_way_out(
    gates: dict[str, Any], more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    data = recipe_data(tmp_path, tmp_path / "out", sink=more) | {"gates": gates}
    with pytest.raises(RecipeError) as refused:
        recipe_from(data)
    assert said in str(refused.value)


def test_a_trajectory_that_cannot_be_replayed_has_no_gate_before_the_edit(tmp_path: Path) -> None:
    noise = {"inversion": {"method": "noise"}, "editing": {"method": "cfg"}}
    edits = {"edits": {"a": {"target_prompt": "a dog"}}}
    with pytest.raises(RecipeError, match=r"a trajectory of inversion.method 'noise' cannot be replayed"):
        recipe(tmp_path, {"inversion_psnr": {"min": 20}}, **noise, **edits)


def test_a_recipe_without_gates_keeps_the_hash_that_it_had_before_there_were_any(tmp_path: Path) -> None:
    plain = recipe_from(recipe_data(tmp_path, tmp_path / "out"))
    assert "gates" not in plain.result_settings()
    assert recipe(tmp_path, {}).hash != plain.hash


def checker() -> Any:
    """A stranger's: how red a picture is."""
    return lambda images: [float(np.asarray(image)[..., 0].mean() / 255) for image in images]


def broken_checker() -> Any:
    return lambda images: [7.0]


def test_what_the_checker_rejects_keeps_no_picture_unless_it_is_asked_to() -> None:
    red = np.full((24, 32, 3), (255, 0, 0), dtype=np.uint8)
    look = SafetyLook("tests.gating.test_gates:checker")
    for keep in (False, True):
        gates = Gates(config(safety="tests.gating.test_gates:checker", keep_unsafe=keep), [look])
        edited = gates(make_edited(image=red))
        assert edited.gated is not None
        assert edited.gated.reasons == ("nsfw_score",)
        assert edited.gated.figures["nsfw_score"] == 1.0
        assert (edited.image == red).all() == keep
    with pytest.raises(EncodeError, match=r"gave .7.0. for one picture, not one number from 0 to 1"):
        SafetyLook("tests.gating.test_gates:broken_checker")(make_edited())


def test_a_model_that_is_missing_is_told_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gates.safety: no.such:thing gives no checker"):
        gates_of(recipe(tmp_path, {"safety": "no.such:thing"}))
    with pytest.raises(ModelError, match="is no folder here"):
        gates_of(recipe(tmp_path, {"clip": "./nowhere"}))


def test_clip_looks_at_each_result_alone_and_by_its_own_prompts() -> None:
    class Clip:
        """Features that can be worked out: a picture's are its mean colours, a text's its letters."""

        def of_images(self, images: Any) -> np.ndarray:
            means = np.stack([image.reshape(-1, 3).mean(0) for image in images])
            return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True))

        def of_texts(self, texts: Any) -> np.ndarray:
            return np.stack([np.array([1.0, 0, 0]) if "red" in text else np.array([0, 1.0, 0]) for text in texts])

    look = ClipLook(Clip())  # type: ignore[arg-type]
    green, red = (np.full((24, 32, 3), colour, dtype=np.uint8) for colour in ((0, 200, 0), (200, 0, 0)))
    request = EditRequest(source_prompt="a green wall", target_prompt="a red wall")
    found = look(make_edited(original=green, image=red, request=request))
    assert found == pytest.approx({"clip_sim_0": 1, "clip_sim_1": 1, "clip_sim_dir": 1, "clip_sim_image": 0})
    instruction = look(make_edited(original=green, image=red, request=EditRequest()))
    assert instruction["clip_sim_dir"] is None
    assert instruction["clip_sim_1"] is None
    assert looks.LOOKED["clip"] == tuple(found)


def test_counts_of_a_gate_add_up_and_tell_who_rejected_alone() -> None:
    gates = config(change_inside={"min": 3}, mask_share={"max": 0.5})
    rows: list[dict[str, Any]] = [
        {"change_inside": 1.0, "mask_share": 0.6, "reject_reasons": ["change_inside", "mask_share"]},
        {"change_inside": 2.0, "mask_share": 0.2, "reject_reasons": ["change_inside"]},
        {"change_inside": 5.0, "mask_share": 0.2, "reject_reasons": []},
        {"change_inside": None, "mask_share": None, "reject_reasons": []},
    ]
    found = gate_counts(rows, gates)
    assert found["change_inside"] == GateCounts(
        passed=1, rejected=2, alone=1, undefined=1, measured=3, seen=(1.0, 1.5, 2.0, 3.5, 5.0)
    )
    assert (found["mask_share"].rejected, found["mask_share"].alone) == (1, 0)
    both = added(found, gate_counts(rows[2:3], gates))["change_inside"]
    assert (both.passed, both.rejected, both.measured, both.seen[0], both.seen[-1]) == (2, 2, 4, 1.0, 5.0)
    assert both.seen[2] == pytest.approx((3 * 2.0 + 5.0) / 4)
    assert seen_in_words(found["change_inside"]) == "1 to 5, half of them about 1.5 to 3.5"
    assert gate_counts(rows, None) == {}


def test_a_judge_without_its_packages_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.settings.gates.EXTRA", ("no_such_package",))
    with pytest.raises(RecipeError, match=r"needs no_such_package, .* pip install 'shardedit\[evaluate\]'"):
        recipe(tmp_path, {"judge": {"model": "x"}, "judge_overall": {"min": 6}})


def test_how_a_judge_is_asked_makes_no_other_run(tmp_path: Path) -> None:
    gates = {"judge": {"model": "x"}, "judge_overall": {"min": 6}}
    other = gates | {"judge": {"model": "x", "tries": 9, "concurrency": 1}}
    assert recipe(tmp_path, gates).hash == recipe(tmp_path, other).hash
    assert recipe(tmp_path, gates | {"judge": {"model": "y"}}).hash != recipe(tmp_path, gates).hash
