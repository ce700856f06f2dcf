"""h-Edit: its bridge and its directions, by algebra and on random networks; what it refuses, what it costs."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.diffusion.h_transform import at_level, edit_move, reconstruction_pull
from pipeline.diffusion.masks import dilated
from pipeline.diffusion.steps import DDIM, Step
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.h_edit import HEdit
from pipeline.editing.h_walk import HWalk, State
from pipeline.engine.engine import Engine
from pipeline.engine.pictures import decode_picture
from pipeline.errors import PrepareError, RecipeError
from pipeline.experts import TextExpert
from pipeline.inversion.base import Inversion
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig, Recipe, recipe_from
from pipeline.records import EditRequest, Trajectory, WordPair
from pipeline.rewards.closed_form import MaskedColor
from tests.closed_form_flow import ClosedFormFlow
from tests.facts import EditorFacts
from tests.golden.checks import observed
from tests.golden.replay import TINY_SDXL
from tests.methods import BACKBONES, analytic, image_latents, invert_and_edit, rows_of_edit, source, tiny_sd

# Implicit, attention replaced: 1 and 4; after DDIM inversion 1 for the residual, after a guided ddpm 1 for its base.
FACTS = EditorFacts(rows=6, quick={"cross_replace_steps": (0.0, 1.0)}, finds_region=True)
N = 4
CAT, DOG, TIGER = "a cat on a mat", "a dog on a mat", "a striped tiger on a mat"
EDIT_FRIENDLY = DDPMInversion(solver="ddim", num_steps=N, skip_steps=0, source_guidance_scale=1.0)
GUIDED = DDPMInversion(num_steps=N)  # of second order, its source guided
SKIPPING = EDIT_FRIENDLY.model_copy(update={"skip_steps": 2})
INVERSIONS: dict[str, Inversion] = {
    "R": EDIT_FRIENDLY,
    "R guided": GUIDED,
    "R skipping": SKIPPING,
    "D": DirectInversion(num_steps=N),
    "D skipping": DDIMInversion(num_steps=N, skip_steps=2),
}
PLAIN = {"control": "none"}
FORMS: dict[str, dict[str, Any]] = {
    "explicit controlled": {"form": "explicit"},
    "explicit": {"form": "explicit", **PLAIN},
    "implicit controlled": {"form": "implicit"},
    "implicit thrice": {"form": "implicit", "inner_steps": 3, **PLAIN},
}
WALKS = [
    *((name, form) for name in ("R", "D") for form in FORMS),
    ("R guided", "explicit controlled"),
    ("R guided", "implicit controlled"),
    ("R skipping", "implicit thrice"),
    ("D skipping", "implicit thrice"),
]


def edit(
    settings: dict[str, Any],
    inversion: Inversion = EDIT_FRIENDLY,
    backbone: Any = None,
    **request: Any,
) -> tuple[Trajectory, Any]:
    """One image, always the same one, from "a cat"; to "a dog" unless told otherwise."""
    backbone = tiny_sd(torch.float64) if backbone is None else backbone
    asked = EditRequest(**{"source_prompt": CAT, "target_prompt": DOG, **request})
    generator = invert_and_edit(source(backbone, 1, CAT), asked, inversion, HEdit(**settings), observe=True)
    return Engine(backbone, call_size=8).run_one(generator)


def begun(settings: dict[str, Any], trajectory: Trajectory, engine: Engine, **request: Any) -> HWalk:
    """A walk before its first step."""
    asked = EditRequest(**{"source_prompt": CAT, "target_prompt": DOG, **request})
    walk: HWalk = engine.run_one(HEdit(**settings).walk(trajectory, asked))
    engine.run_one(walk.begin())
    return walk


def step_by(settings: dict[str, Any], **request: Any) -> Tensor:
    """By how much one step from beside the trajectory moves more than the base point."""
    engine = Engine(tiny_sd(torch.float64), call_size=8)
    trajectory = engine.run_one(EDIT_FRIENDLY.invert(source(engine.backbone, 1, CAT)))
    start = trajectory.latents[1] + 0.1 * image_latents(engine.backbone, 7)
    equal = {"guidance_scale": 3.0, "source_guidance_scale": 3.0, **PLAIN}  # to its own prompt: no direction
    with_edit, without = (
        engine.run_one(begun(chosen, trajectory, engine, **asked).take(1, State(start, None))).latents
        for chosen, asked in ((settings, request), (settings | equal, {"target_prompt": CAT}))
    )
    return with_edit - without


@pytest.mark.parametrize(("inversion", "form"), WALKS)
def test_the_sources_own_prompt_at_equal_guidance_follows_the_trajectory(inversion: str, form: str) -> None:
    equal = {"guidance_scale": 3.0, "source_guidance_scale": 3.0}
    trajectory, edited = edit(equal | FORMS[form], INVERSIONS[inversion], target_prompt=CAT)
    assert len(edited.history) == N
    for record in edited.history:
        torch.testing.assert_close(record.latents, trajectory.latents[record.step + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("inversion", ["R", "D"])
def test_stable_diffusion_xl_follows_the_trajectory_too_and_leaves_it_for_another_prompt(inversion: str) -> None:
    backbone = load_backbone(ModelConfig(name=str(TINY_SDXL)), dtype=torch.float64, device="cpu")
    equal = {"guidance_scale": 3.0, "source_guidance_scale": 3.0}
    trajectory, kept = edit(equal, INVERSIONS[inversion], backbone, target_prompt=CAT)
    torch.testing.assert_close(kept.latents, trajectory.latents[-1], atol=1e-5, rtol=0)
    _, edited = edit(equal, INVERSIONS[inversion], backbone)
    assert not torch.allclose(edited.latents, trajectory.latents[-1], atol=1e-3)


@pytest.mark.parametrize("inversion", [EDIT_FRIENDLY, GUIDED], ids=["first order", "second order"])
def test_explicit_with_the_bases_guidance_is_edit_friendly_guidance(inversion: DDPMInversion) -> None:
    w_orig = inversion.source_guidance_scale
    settings = {"form": "explicit", "guidance_scale": 5.0, "source_guidance_scale": w_orig, **PLAIN}
    backbone = tiny_sd(torch.float64)
    _, ours = edit(settings, inversion)
    asked = EditRequest(source_prompt=CAT, target_prompt=DOG)
    plain = invert_and_edit(source(backbone, 1, CAT), asked, inversion, ClassifierFreeGuidance(guidance_scale=5.0))
    _, theirs = Engine(backbone, call_size=8).run_one(plain)
    torch.testing.assert_close(ours.latents, theirs.latents, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["explicit", "implicit"])
def test_texts_add_up_in_any_order_and_their_weights_are_factors(form: str) -> None:
    settings = {"form": form, "guidance_scale": 3.0, "source_guidance_scale": 3.0, **PLAIN}
    one, other = TextExpert(prompt=DOG, weight=0.5), TextExpert(prompt=TIGER, guidance_scale=5.0)
    half, tiger = (step_by(settings, target_prompt="", experts=(expert,)) for expert in (one, other))
    whole = step_by(settings)
    torch.testing.assert_close(half, 0.5 * whole, atol=1e-8, rtol=0)
    together = step_by(settings, target_prompt="", experts=(one, other))
    torch.testing.assert_close(together, half + tiger, atol=1e-8, rtol=0)
    torch.testing.assert_close(step_by(settings, target_prompt="", experts=(other, one)), together, atol=1e-9, rtol=0)
    assert half.abs().max() > 1e-2
    assert tiger.abs().max() > 1e-2


def test_texts_under_attention_control_act_as_each_does_alone() -> None:
    """Each target's row reads the source's, not another target's."""
    settings = {"form": "explicit", "guidance_scale": 3.0, "source_guidance_scale": 3.0}
    experts = (TextExpert(prompt=DOG), TextExpert(prompt=TIGER))
    dog, tiger = (step_by(settings, target_prompt="", experts=(one,)) for one in experts)
    torch.testing.assert_close(step_by(settings, target_prompt="", experts=experts), dog + tiger, atol=1e-8, rtol=0)
    free = step_by(settings | PLAIN, target_prompt="", experts=experts[:1])
    assert not torch.allclose(dog, free, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_kappa_is_the_derivative_of_a_step_by_the_noise_and_never_positive(eta: float) -> None:
    schedule: Any = analytic().schedule
    times = [981, 501, 61, 1, 0, 0]
    steps = tuple(Step(schedule.level(t), schedule.level(below)) for t, below in pairwise(times))
    solver, one = DDIM(steps=steps, eta=eta), torch.ones((1, 1, 1), dtype=torch.float64)
    for step, (start, end) in enumerate(steps):
        kappa = float(edit_move(solver, step, at_level(one, start)))
        a, below = start.signal**2, end.signal**2
        omega = (1 - below) / (1 - a) * (1 - a / below) * eta
        assert kappa == pytest.approx((1 - below - omega) ** 0.5 - (1 - a) ** 0.5 * (below / a) ** 0.5, abs=1e-12)
        assert kappa < 0 if start != end else abs(kappa) < 1e-15


def test_the_pull_is_the_normalised_gradient_of_the_mean_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, base, direction = torch.randn((3, 4, 6, 6), generator=generator, dtype=torch.float64)
    latents[0, :3] = base[0, :3]  # where nothing has moved nothing is pulled
    leaf = latents.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((leaf - base).abs().mean(), leaf)
    size = 0.1 * direction.square().mean().sqrt() / (gradient.square().mean().sqrt() + 1e-8)
    pulled = reconstruction_pull(latents, base, direction, 0.1)
    torch.testing.assert_close(pulled, latents - size * gradient, atol=1e-14, rtol=0)
    assert torch.equal(reconstruction_pull(latents, base, direction, 0.0), latents)
    assert torch.equal(pulled[0, :3], base[0, :3])


def test_the_pull_acts_from_the_second_inner_step_on() -> None:
    once = [edit({**PLAIN, "reconstruction_weight": weight})[1].latents for weight in (0.0, 0.1)]
    twice = [edit({**PLAIN, "inner_steps": 2, "reconstruction_weight": weight})[1].latents for weight in (0.0, 0.1)]
    assert torch.equal(*once)
    assert not torch.allclose(*twice)


@pytest.mark.parametrize("form", ["explicit", "implicit"])
def test_control_without_windows_is_no_control(form: str) -> None:
    closed = {"cross_replace_steps": (0.0, 0.0), "self_replace_steps": (0.0, 0.0)}
    assert torch.equal(edit({"form": form, **closed})[1].latents, edit({"form": form, **PLAIN})[1].latents)


def test_skipped_steps_are_edited_before_the_first_one_implicitly_and_without_control_alone() -> None:
    engine = Engine(tiny_sd(torch.float64), call_size=8)
    trajectory = engine.run_one(SKIPPING.invert(source(engine.backbone, 1, CAT)))
    asked = EditRequest(source_prompt=CAT, target_prompt=DOG)
    moved = {}
    for form, control in [("implicit", "none"), ("implicit", "prompt_to_prompt"), ("explicit", "none")]:
        walk = engine.run_one(HEdit(form=form, control=control).walk(trajectory, asked))
        moved[form, control] = not torch.equal(engine.run_one(walk.begin()).latents, trajectory.latents[0])
    assert moved == {("implicit", "none"): True, ("implicit", "prompt_to_prompt"): False, ("explicit", "none"): False}
    # By the step that was left out: from the level above.
    steps = engine.backbone.schedule.steps(N + 2, (12, 12), leading=True, to_lowest=True)
    assert trajectory.level_above == steps[1].start


def test_a_level_without_signal_is_stepped_from_explicitly() -> None:
    """An implicit direction would be divided by its signal. A flow begins there."""
    engine = Engine(ClosedFormFlow(torch.float64), call_size=8)
    trajectory = engine.run_one(DDIMInversion(num_steps=N).invert(source(engine.backbone, 1, CAT)))
    assert trajectory.levels[0].signal == 0.0
    asked = EditRequest(source_prompt=CAT, target_prompt=DOG)
    first = {
        form: engine.run_one(observed(HEdit(form=form, **PLAIN).edit(trajectory, asked))).history[0].latents
        for form in ("implicit", "explicit")
    }
    assert torch.equal(first["implicit"], first["explicit"])
    assert torch.isfinite(first["implicit"]).all()


BLEND = {"blend_words": WordPair(source=("cat",), target=("dog",))}


def test_a_blend_of_nothing_is_the_source_and_of_everything_the_edit() -> None:
    settings = {"start_blend": 0.0}
    trajectory, nothing = edit(settings | {"blend_threshold": 1.0}, **BLEND)
    assert torch.equal(nothing.latents, trajectory.latents[-1])
    assert not nothing.mask.any()
    _, everything = edit(settings | {"blend_threshold": 0.0}, **BLEND)
    torch.testing.assert_close(everything.latents, edit(settings)[1].latents, atol=1e-8, rtol=0)


def test_two_texts_are_blended_where_the_words_of_either_attend() -> None:
    settings = {"start_blend": 0.0, "blend_threshold": 0.99}
    experts = (TextExpert(prompt=DOG), TextExpert(prompt=TIGER))
    alone = [
        edit(settings, target_prompt="", experts=(expert,), blend_words=WordPair(target=(word,)))[1].history[0]
        for expert, word in zip(experts, ("dog", "striped tiger"), strict=True)
    ]
    together = edit(settings, target_prompt="", experts=experts, blend_words=WordPair(target=("dog", "striped tiger")))
    assert torch.equal(together[1].history[0].masks[0], alone[0].masks[0] | alone[1].masks[0])
    assert not torch.equal(alone[0].masks, alone[1].masks)


@pytest.mark.parametrize(("mask", "margin"), [("otsu", 1), ("quantile", 1), ("otsu", 0), ("quantile", 2)])
def test_outside_of_a_running_mask_and_its_margin_the_source_stays(mask: str, margin: int) -> None:
    settings = {"mask": mask, "mask_threshold": 0.8, "mask_margin": margin, **PLAIN}
    trajectory, edited = edit(settings, experts=(TextExpert(prompt=TIGER),))
    assert edited.masks.shape == (2, 12, 12)
    for record in edited.history:
        inside = dilated(record.masks.any(dim=0), margin)
        assert (record.latents[:, inside] != trajectory.latents[record.step + 1][:, inside]).any(dim=0).all()
        outside = ~inside
        assert outside.any()
        assert torch.equal(record.latents[:, outside], trajectory.latents[record.step + 1][:, outside])
    assert (edited.latents[:, edited.mask] != trajectory.latents[-1][:, edited.mask]).all()
    if mask == "quantile":
        assert edited.masks.double().mean(dim=(1, 2)).tolist() == pytest.approx([0.2, 0.2], abs=0.01)


def test_a_texts_own_threshold_takes_the_place_of_the_editors() -> None:
    experts = (TextExpert(prompt=TIGER, threshold=0.5),)
    _, edited = edit({"mask": "quantile", "mask_threshold": 0.9, **PLAIN}, experts=experts)
    assert edited.masks.double().mean(dim=(1, 2)).tolist() == pytest.approx([0.1, 0.5], abs=0.01)


@pytest.mark.parametrize(
    ("settings", "texts", "rows"),
    [
        ({"form": "explicit", **PLAIN}, 1, N * 3),
        ({"form": "explicit", **PLAIN}, 3, N * 5),
        ({"form": "implicit", **PLAIN}, 1, N * (1 + 3)),
        ({"form": "implicit", "inner_steps": 3, **PLAIN}, 1, N * (1 + 3 * 3)),
        ({"form": "explicit", "cross_replace_steps": (0, 1)}, 1, N * 4),
        ({"form": "explicit", "cross_replace_steps": (0, 1)}, 3, N * 6),
        # int(0.5 (N + 1)) steps of cross-attention, none of self-attention.
        ({"form": "implicit", "cross_replace_steps": (0, 0.5), "self_replace_steps": (0, 0)}, 1, N * (1 + 3) + 2),
        ({"form": "explicit", "source_guidance_scale": 7.5, **PLAIN}, 1, N * 2),  # the empty prompt cancels
    ],
)
def test_rows_are_the_fewest_that_lose_nothing(settings: dict[str, Any], texts: int, rows: int) -> None:
    experts = tuple(TextExpert(prompt=prompt) for prompt in (DOG, TIGER, "a mat")[:texts])
    request = EditRequest(source_prompt=CAT, experts=experts)
    assert rows_of_edit(EDIT_FRIENDLY, HEdit(**settings), request, CAT) == rows
    # After DDIM inversion the residuals take one more per step.
    assert rows_of_edit(DirectInversion(num_steps=N), HEdit(**settings), request, CAT) == rows + N


def test_a_skipped_step_takes_one_evaluation_more() -> None:
    request = EditRequest(source_prompt=CAT, target_prompt=DOG)
    assert rows_of_edit(SKIPPING, HEdit(**PLAIN), request, CAT) == N * 4 + 3


def test_an_equalizer_reaches_every_target_that_has_its_word() -> None:
    experts = (TextExpert(prompt=DOG), TextExpert(prompt=TIGER))
    plain, weighed = (
        edit({"form": "explicit", "cross_replace_steps": (0, 1)}, target_prompt="", experts=experts, equalizer=factors)
        for factors in ({}, {"striped": 4.0})
    )
    assert not torch.allclose(plain[1].latents, weighed[1].latents, atol=1e-4)


def recipe(editing: dict[str, Any] | None = None, inversion: dict[str, Any] | None = None, **edit: Any) -> Recipe:
    return recipe_from(
        {
            "source": {"shards": "-"},
            "edits": edit,
            "inversion": {"method": "ddpm", **(inversion or {})},
            "editing": {"method": "h_edit", **(editing or {})},
            "sink": {"folder": "-"},
        }
    )


STYLE = {"method": "random_gram", "reference": "starry"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"source_prompt": CAT}, "neither|has none. Add target_prompt, experts or rewards"),
        ({"rewards": [{"method": "colour"}]}, "method is 'colour', known are: arcface, blur"),
        ({"rewards": [{"method": "lpips"}]}, "Name their folder in editing.weights.lpips"),
        ({"rewards": [STYLE]}, "editing.references names: none. Name its file there"),
        ({"rewards": [STYLE | {"step": "direction"}]}, "no text that acts. Set the reward's step: loss"),
        ({"rewards": [{"method": "blur", "steps": [0.5, 0.5]}]}, "which is never"),
        ({"rewards": [{"method": "masking"}]}, "Set editing.user_mask: rewards"),
        ({"target_prompt": DOG, "equalizer": {"cow": 2.0}}, "'cow' is not a word of the prompt"),
        ({"target_prompt": DOG, "source_prompt": CAT, "subtract_words": {"source": ["cat"]}}, "without|Add these"),
        (
            {"editing": {"control": "none"}, "target_prompt": DOG, "equalizer": {"dog": 2.0}},
            "control: prompt_to_prompt",
        ),
        ({"editing": {"kind": "replace"}, "source_prompt": CAT, "target_prompt": TIGER}, "Use kind: refine"),
        ({"editing": {"mask": "otsu"}, "target_prompt": DOG, "blend_words": {"target": ["dog"]}}, "Leave one out"),
        ({"editing": {"form": "explicit", "inner_steps": 2}, "target_prompt": DOG}, "Set form: implicit"),
        (
            {"inversion": {"method": "direct", "offset_scale": 0.5}, "target_prompt": DOG},
            "offset_scale and interval let it drift",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_run_with_the_way_out(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**given)


def test_weights_and_pictures_that_are_missing_are_refused_before_the_run(tmp_path: Any) -> None:
    offers = analytic().offers
    (tmp_path / "empty").mkdir()
    none, empty = str(tmp_path / "none"), str(tmp_path / "empty")
    settings = {
        "weights": {"arcface": none, "lpips": empty, "clip": empty},
        "references": {"starry": str(tmp_path / "starry.png")},
    }
    made = recipe(settings, target_prompt=DOG)
    with pytest.raises(RecipeError) as caught:
        made.refuse_what_lacks(offers, "analytic")
    text = str(caught.value)
    assert "there is no such folder. Correct editing.weights.arcface" in text
    assert "there is no model.safetensors that can be read" in text
    assert "weights.clip: the score model" in text
    assert "there is no such file. Correct editing.references" in text


def test_a_row_without_the_mask_that_compositing_needs_is_refused() -> None:
    editor, asked = HEdit(composite=True), EditRequest(target_prompt=DOG)
    editor.check(asked, EDIT_FRIENDLY, masked=True)
    with pytest.raises(PrepareError, match="needs the row's own mask"):
        editor.check(asked, EDIT_FRIENDLY, masked=False)


def test_compositing_keeps_every_pixel_far_from_the_mask_and_takes_the_edit_inside_it() -> None:
    edited, image = np.full((64, 64, 3), 200, np.uint8), np.full((64, 64, 3), 10, np.uint8)
    mask = np.zeros((64, 64), np.float32)
    mask[8:56, 8:56] = 1.0
    made = HEdit(composite=True).composited(edited, image, mask)
    assert (made[:8] == 10).all()
    assert (made[28:36, 28:36] == 200).all()
    along = made[32, 8:32, 0].astype(int)
    assert (np.diff(along) >= 0).all()  # the edge falls off, and lies inside the mask
    assert ((along > 10) & (along < 200)).sum() >= 3
    assert HEdit().composited(edited, image, mask) is edited


def test_a_reward_alone_takes_the_masked_place_to_its_colour() -> None:
    backbone = analytic(torch.float64)
    pixels = decode_picture(backbone, image_latents(backbone, 1))
    given = dataclasses.replace(source(backbone, 1, CAT), pixels=pixels)
    mask = torch.zeros((12, 12), dtype=torch.float64)
    mask[:, :6] = 1.0
    asked = EditRequest(source_prompt=CAT, rewards=(MaskedColor(color=(0, 128, 0), weight=2.0),))
    generator = invert_and_edit(given, asked, EDIT_FRIENDLY, HEdit(form="explicit"), user_mask=mask)
    trajectory, edited = Engine(backbone, call_size=8).run_one(generator)
    made = decode_picture(backbone, edited.latents)
    before, after = (np.abs(one[:, :24].astype(int) - (0, 128, 0)).mean() for one in (pixels, made))
    assert after < 8 < 40 < before
    assert torch.equal(edited.latents[..., 6:], trajectory.latents[-1][..., 6:])


@pytest.mark.parametrize("name", BACKBONES)
def test_text_and_reward_have_the_same_bits_alone_and_beside_another_image(name: str) -> None:
    backbone = BACKBONES[name]()
    asked = EditRequest(source_prompt=CAT, target_prompt=DOG, rewards=(MaskedColor(color=(9, 200, 30)),))

    def whole(number: int) -> Any:
        given = source(backbone, number, CAT)
        given = dataclasses.replace(given, pixels=decode_picture(backbone, given.latents))
        return invert_and_edit(given, asked, EDIT_FRIENDLY, HEdit())

    alone = Engine(backbone, call_size=8).run_one(whole(1))[1]
    finished = Engine(backbone, call_size=8).run(whole(number) for number in (2, 1))
    beside = next(one.value[1] for one in finished if one.index == 1)
    assert torch.equal(alone.latents, beside.latents)


def test_rewards_act_in_their_window_of_steps_alone() -> None:
    backbone = analytic(torch.float64)
    given = source(backbone, 1, CAT)
    given = dataclasses.replace(given, pixels=decode_picture(backbone, given.latents))
    late = MaskedColor(color=(255, 0, 0), steps=(0.5, 1.0))
    asked = EditRequest(source_prompt=CAT, rewards=(late,))
    generator = invert_and_edit(given, asked, EDIT_FRIENDLY, HEdit(), observe=True)
    trajectory, edited = Engine(backbone, call_size=8).run_one(generator)
    apart = [float((one.latents - trajectory.latents[one.step + 1]).abs().max()) for one in edited.history]
    assert max(apart[:2]) < 1e-9
    assert min(apart[2:]) > 1e-2
