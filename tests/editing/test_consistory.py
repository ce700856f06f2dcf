"""ConsiStory: who reads whom, what a scene's bits depend on, what is off when it is off, masks, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from skimage.filters import threshold_otsu
from torch import Tensor

from pipeline.diffusion.subject import (
    best_matches,
    correspondences,
    otsu_threshold,
    smoothed,
    subject_mask,
    taken_shares,
    thinned,
)
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.consistory import ConsiStory
from pipeline.editing.consistory_group import Group
from pipeline.editing.sharing import (
    Rows,
    injected_features,
    mixed_queries,
    shared_attention,
    spread,
    who_reads_whom,
)
from pipeline.engine.backbone import Offers
from pipeline.engine.controls import ANY, HIDDEN, GivenClasses, Layers
from pipeline.engine.engine import Engine
from pipeline.errors import EditError, PrepareError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.records import EditRequest, Trajectory
from pipeline.subjects import Subject
from tests.facts import EditorFacts
from tests.methods import analytic, levels, network_calls, source, tiny_sd

# Image, generated anchor and one scene, in both halves and both passes; after noise there is no image.
FACTS = EditorFacts(rows=12, rows_after={"noise": 8}, quick={"scenes_per_call": 1})
N = 3
ANCHORS = ("a photo of a dog", "a dog")
BEACH, SNOW, SOFA = "a dog on a beach", "a dog in the snow", "a happy dog on a sofa"
UNSHARED: dict[str, Any] = {"share": "none", "injection_strength": 0.0, "free_u": None}
# Something of all that there is happens within few steps.
ALL: dict[str, Any] = {"query_steps": 0.4, "injection_steps": (0.0, 1.0), "mask_dropout": 0.3}


def scene(prompt: str = BEACH, words: tuple[str, ...] = ("dog",), **changes: Any) -> EditRequest:
    subject = Subject(words=words, **{"anchor_prompts": ANCHORS, **changes})
    return EditRequest(source_prompt="a dog in a house", target_prompt=prompt, subject=subject)


def trajectory(inversion: Any = None, backbone: Any = None) -> Trajectory:
    model = backbone or tiny_sd()
    made: Trajectory = Engine(model, call_size=8).run_one(
        (inversion or NoiseStart(num_steps=N)).invert(source(model, 1, "a dog in a house", 8))
    )
    return made


def edited(
    *requests: EditRequest, editor: ConsiStory | None = None, given: Trajectory | None = None, **more: Any
) -> Any:
    engine = Engine(more.get("backbone") or tiny_sd(), call_size=16)
    return engine.run_one((editor or ConsiStory(**ALL)).edit_all(given or trajectory(), requests))


# What a scene's bits depend on ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together() -> Any:
    """Three scenes, in two groups, and both anchors."""
    return edited(scene(BEACH), scene(SNOW), scene(SOFA), scene(ANCHORS[0], anchor=0), scene(ANCHORS[1], anchor=1))


def test_a_scene_has_the_same_bits_whatever_other_scenes_there_are_and_in_whatever_order(together: Any) -> None:
    (alone,) = edited(scene(SNOW))
    other_way = edited(scene(SOFA), scene(SNOW), scene(BEACH))
    for mine, theirs in ((alone, together[1]), *zip(other_way, (together[2], together[1], together[0]), strict=True)):
        assert torch.equal(mine.latents, theirs.latents)
        assert torch.equal(mine.masks, theirs.masks)


def test_anchors_do_not_notice_scenes_and_scenes_notice_anchors(together: Any) -> None:
    alone = edited(scene(ANCHORS[0], anchor=0), scene(ANCHORS[1], anchor=1))
    for mine, theirs in zip(alone, together[3:], strict=True):
        assert torch.equal(mine.latents, theirs.latents)
    (fewer,) = edited(scene(SNOW, anchor_prompts=ANCHORS[:1]))
    assert not torch.allclose(fewer.latents, together[1].latents, atol=1e-2)


def test_pictures_of_one_prompt_have_noise_of_their_own(together: Any) -> None:
    same, another = edited(scene(BEACH), scene(BEACH, picture=1))
    assert torch.equal(same.latents, together[0].latents)
    assert not torch.allclose(another.latents, same.latents, atol=1e-1)


def test_each_part_of_the_method_changes_scenes(together: Any) -> None:
    for off in ({"share": "none"}, {"query_strength": None}, {"injection_strength": 0.0}, {"free_u": None}):
        (other,) = edited(scene(SNOW), editor=ConsiStory(**ALL, **off))
        assert not torch.equal(other.latents, together[1].latents), off
    for kept in (
        {"dropout_steps": 1},
        {"mask_dropout": 1.0},
        {"mask_steps": 1},
        {"anchor_weight": 3.0},
        {"outline_factor": 1},
    ):
        (other,) = edited(scene(SNOW), editor=ConsiStory(**{**ALL, **kept}))
        assert not torch.equal(other.latents, together[1].latents), kept


def test_with_everything_off_scenes_are_sampled_as_ever() -> None:
    (alone,) = edited(scene(SNOW), editor=ConsiStory(**UNSHARED))
    given = trajectory()
    assert given.source.draws is not None
    noise = given.source.draws(f"scene 0 {SNOW}")()
    start = Trajectory(
        method="noise", source=given.source, solver=given.solver, latents=torch.stack([noise, *given.latents[1:]])
    )
    plain = Engine(tiny_sd(), call_size=16).run_one(
        ClassifierFreeGuidance(guidance_scale=5.0).edit(start, EditRequest(target_prompt=SNOW))
    )
    torch.testing.assert_close(alone.latents, plain.latents, atol=1e-3, rtol=1e-3)


def test_all_dropout_without_injection_is_no_sharing() -> None:
    nothing = {**UNSHARED, "query_strength": None}
    (kept,) = edited(scene(SNOW), editor=ConsiStory(**{**nothing, "share": "up", "mask_dropout": 1.0}))
    (unshared,) = edited(scene(SNOW), editor=ConsiStory(**nothing))
    torch.testing.assert_close(kept.latents, unshared.latents, atol=1e-3, rtol=1e-3)


def test_an_image_is_an_anchor_along_its_own_trajectory() -> None:
    given = trajectory(DDIMInversion(num_steps=N))
    image, shown = edited(scene(ANCHORS[0], anchor_prompts=(), anchor=0), scene(anchor_prompts=()), given=given)
    assert torch.equal(image.latents, given.latents[-1])
    other = trajectory(DDIMInversion(num_steps=N, guidance_scale=2.0))
    (moved,) = edited(scene(anchor_prompts=()), given=other)
    assert not torch.allclose(moved.latents, shown.latents, atol=1e-2)


def test_rows_are_those_that_the_page_says() -> None:
    engine = Engine(tiny_sd(), call_size=16)
    calls = network_calls(engine)
    engine.run_one(ConsiStory(query_steps=0.4).edit_all(trajectory(), [scene(BEACH), scene(SNOW)]))
    # Two anchors and two scenes, in two halves: of three steps the second mixes queries; all twice.
    assert [call.group for call in calls] == [8, 16, 8] * 2
    assert engine.stats.network_rows == 2 * (8 + 16 + 8)
    assert engine.stats.padded_rows == 8 * 4  # room for another set beside it


# Masks, dropout, correspondence ---------------------------------------------------------------------------------------


def test_otsu_is_that_of_scikit_image_and_takes_a_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    for numbers in (torch.rand(500, generator=generator), torch.randn(64, generator=generator) ** 3):
        assert otsu_threshold(numbers) == pytest.approx(float(threshold_otsu(numbers.double().numpy())))
    assert otsu_threshold(torch.full((9,), 0.3)) == pytest.approx(0.3)
    two = torch.tensor([0.1, 0.1, 0.9, 0.9, 0.9])
    assert (two > otsu_threshold(two)).tolist() == [False, False, True, True, True]


def test_a_mask_is_the_union_over_tokens_and_empty_where_nothing_stands_out() -> None:
    maps = torch.zeros((2, 4, 4))
    maps[0, 0, 0] = maps[1, 3, 3] = 1.0
    mask = subject_mask(maps, (4, 4))
    assert mask.nonzero().tolist() == [[0, 0], [3, 3]]
    assert not subject_mask(torch.ones((1, 4, 4)), (8, 8)).any()
    assert not subject_mask(torch.ones((0, 4, 4)), (8, 8)).any()


def test_the_logarithm_parts_small_attention_from_smaller_where_one_place_has_nearly_all() -> None:
    maps = torch.full((1, 4, 4), 1e-6)
    maps[0, :2] = 1e-4
    maps[0, 0, 0] = 0.1
    assert subject_mask(maps, (4, 4)).nonzero().tolist() == [[0, 0]]
    assert torch.equal(subject_mask(maps, (4, 4), logarithm=True), maps[0] > 1e-5)
    assert not subject_mask(torch.zeros((1, 4, 4)), (4, 4), logarithm=True).any()


def test_dropout_takes_places_away_and_adds_none() -> None:
    mask, uniform = torch.tensor([True, True, False]), torch.tensor([0.2, 0.8, 0.8])
    assert thinned(mask, uniform, 0.5).tolist() == [False, True, False]
    assert torch.equal(thinned(mask, uniform, 0.0), mask)
    assert not thinned(mask, uniform, 1.0).any()


def test_dropout_is_drawn_anew_for_every_step_size_of_map_and_anchor_and_thins_anchors_alone() -> None:
    names: list[str] = []

    def draws(name: str) -> Callable[[], Tensor]:
        names.append(name)
        return lambda: torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(len(names)))

    group = Group(ConsiStory(mask_dropout=0.5, dropout_steps=2), trajectory(), (), anchors=2, draws=draws)
    masks = {factor: torch.ones((3, 8 // factor, 8 // factor), dtype=torch.bool) for factor in (1, 2)}
    for step in range(3):
        for factor in masks:
            shown = group._shown(step, factor, masks)
            assert shown[2].all(), "nobody reads a scene"
            kept = shown[:2].flatten(1).float().mean(dim=1)
            assert ((kept > 0) & (kept < 1)).all() if step < 2 else (kept == 1).all()
    assert len(set(names)) == len(names) == 2 * 2 * 2, "two anchors, two sizes, the first two steps"


def test_an_outline_is_one_place_around_the_anchors_in_coarse_maps_alone() -> None:
    group = Group(ConsiStory(mask_dropout=0.0, outline_factor=2), trajectory(), (), anchors=1, draws=no_noise)
    masks = {factor: torch.zeros((2, 8 // factor, 8 // factor), dtype=torch.bool) for factor in (1, 2, 4)}
    for mask in masks.values():
        mask[:, 0, 0] = True
    for factor, places in ((1, [[0, 0]]), (2, [[0, 0], [0, 1], [1, 0], [1, 1]]), (4, [[0, 0], [0, 1], [1, 0], [1, 1]])):
        shown = group._shown(0, factor, masks)
        assert shown[0].nonzero().tolist() == places
        assert shown[1].nonzero().tolist() == [[0, 0]], "nobody reads a scene"
        assert masks[factor].sum() == 2, "where the subject is stays as it was"


def no_noise(name: str) -> Callable[[], Tensor]:
    raise AssertionError(f"nothing is drawn without dropout, and {name} was")


def test_windows_are_those_of_the_published_code_at_its_fifty_steps() -> None:
    editor = ConsiStory()
    assert editor.injection_range(50) == range(5, 17)
    mixed = editor.query_strengths(50)
    assert list(mixed) == [1, 2, 3, 4, 5], "in the first step nobody is read yet"
    assert mixed[5] == pytest.approx(0.81836735)
    assert mixed[1] == pytest.approx(0.9 - (0.9 - 0.81836735) / 5)
    assert editor.feature_step(levels(tiny_sd(), list(range(981, 0, -20)))) == 36
    assert editor.injection_range(3) == range(2), "both ends included"


def features() -> Tensor:
    return torch.randn((1, 8, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_nearest_place_of_a_rolled_map_is_the_roll_and_lies_in_the_mask() -> None:
    first = features()
    both = torch.cat([first, first.roll(1, dims=3)])
    everywhere, reads = torch.ones((2, 4, 4), dtype=torch.bool), torch.ones((2, 2), dtype=torch.bool)
    places, distances = correspondences(both, everywhere, reads)
    assert torch.equal(places[0, 1], torch.arange(16).view(4, 4).roll(-1, dims=1).flatten())
    torch.testing.assert_close(distances[0, 1], torch.zeros(16, dtype=torch.float64))
    assert torch.isinf(distances[0, 0]).all()
    left = everywhere.clone()
    left[:, :, 2:] = False
    within, _ = correspondences(both, left, reads)
    assert (within[0, 1] % 4 < 2).all()


def test_only_alike_places_of_the_subject_take_a_share_and_an_image_without_anchor_none() -> None:
    places = torch.arange(4).expand(3, 3, 4).clone()
    distances = torch.full((3, 3, 4), float("inf"))
    distances[2, 0] = torch.tensor([0.1, 0.9, 0.1, 0.9])
    distances[2, 1] = torch.tensor([0.9, 0.2, 0.9, 0.9])
    matches = best_matches(places, distances, who_reads_whom(3, 2))
    assert matches.images[2].tolist()[:3] == [0, 1, 0]
    masks = torch.tensor([[True] * 4, [True] * 4, [True, True, False, True]])
    assert taken_shares(matches, masks, 0.8).tolist() == [[0.0] * 4, [0.0] * 4, [pytest.approx(0.8)] * 2 + [0.0, 0.0]]
    blends = injected_features(matches, taken_shares(matches, masks, 0.8), Layers(), Rows(3, 2))
    assert [(blend.row, blend.sources.tolist()[:2]) for blend in blends] == [(5, [3, 4])]  # of the conditional half
    assert not injected_features(matches, taken_shares(matches, masks, 0.0), Layers(), Rows(3, 2))


def test_smoothing_keeps_a_constant_inside() -> None:
    torch.testing.assert_close(smoothed(torch.ones((1, 2, 5, 5)))[:, :, 1:-1, 1:-1], torch.ones((1, 2, 3, 3)))


def test_every_row_reads_itself_whole_and_the_subject_of_the_anchors_in_its_own_half() -> None:
    shown = torch.zeros((3, 2, 2), dtype=torch.bool)
    shown[0, 0, 0] = shown[1, 1, 1] = shown[2] = True
    reads = shared_attention(who_reads_whom(3, 2), shown, Layers(), (4, 4), Rows(3, 2))
    assert [(part.row, part.sources) for part in reads] == [
        (0, (0, 1, 0)),
        (1, (1, 0, 1)),
        (2, (2, 0, 1)),
        (3, (3, 4, 3)),
        (4, (4, 3, 4)),
        (5, (5, 3, 4)),
    ]
    for part in reads:
        assert isinstance(part.classes, GivenClasses)
        own, other, third = part.classes.theirs
        assert (own == ANY).all()
        assert int((other == ANY).sum()) == 4  # one place of four, spread
        assert (third == HIDDEN).all() if part.row in (0, 1, 3, 4) else int((third == ANY).sum()) == 4
    assert not shared_attention(who_reads_whom(1, 1), shown[:1], Layers(), (4, 4), Rows(1, 2))
    assert all(part.weights is None for part in reads)
    heavy = shared_attention(who_reads_whom(3, 2), shown, Layers(), (4, 4), Rows(3, 2), 3.0)
    assert {part.weights for part in heavy} == {(1.0, 3.0, 3.0)}, "its own places count once"
    mixed = mixed_queries(Rows(3, 2), Layers(), 0.9)
    assert [(part.row, part.source) for part in mixed] == [(row, row + 6) for row in range(6)]


@pytest.mark.parametrize(("large", "small"), [(12, 2), (20, 3), (16, 16), (13, 4)])
def test_spread_maps_are_found_again_by_nearest_neighbours(large: int, small: int) -> None:
    maps = torch.rand((2, small, small), generator=torch.Generator().manual_seed(large)) > 0.5
    found = torch.nn.functional.interpolate(spread(maps, (large, large))[None].float(), size=(small, small))[0]
    assert torch.equal(found.bool(), maps)


# Settings -------------------------------------------------------------------------------------------------------------


def test_the_published_windows_of_fifty_steps() -> None:
    editor, levels = ConsiStory(), NoiseStart(num_steps=50)
    assert list(editor.injection_range(50)) == list(range(5, 17))
    assert {step: round(share, 6) for step, share in editor.query_strengths(50).items()} == {
        1: 0.883673,
        2: 0.867347,
        3: 0.851020,
        4: 0.834694,
        5: 0.818367,
    }
    found = trajectory(levels)
    assert found.timesteps[editor.feature_step(found.levels)] == 261


def test_the_background_tells_the_subject_too() -> None:
    request = scene(BEACH, background=("beach", "photo", "a"))
    own = scene(BEACH)
    (inverted,) = edited(request, editor=ConsiStory(**ALL, mask="background"))
    (straight,) = edited(own)
    assert not torch.equal(inverted.masks, straight.masks)


def test_masks_of_chosen_layers() -> None:
    (chosen,) = edited(scene(BEACH), editor=ConsiStory(**ALL, mask_layers=(10,)))
    (usual,) = edited(scene(BEACH))
    assert chosen.masks.shape == usual.masks.shape == (1, 8, 8)
    assert not torch.equal(chosen.latents, usual.latents)
    (by_logarithm,) = edited(scene(BEACH), editor=ConsiStory(**ALL, mask_threshold="logarithm"))
    assert not torch.equal(by_logarithm.masks, usual.masks)
    openings = Offers(openings=tiny_sd().offers.openings)
    assert "names layer 16" in next(ConsiStory(mask_layers=(16,)).model_problems(openings))
    assert "differ in size" in next(ConsiStory(mask_layers=(0, 6)).model_problems(openings))
    assert "no cross-attention there" in next(
        ConsiStory().model_problems(Offers(openings=analytic().offers.openings.__class__()))
    )


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "editor", "message"),
    [
        (EditRequest(target_prompt=BEACH), {}, "Add subject"),
        (scene(BEACH, words=("cat",)), {}, "'cat' is not a word of the prompt"),
        (scene("a cat on a beach"), {}, "'dog' is not a word of the prompt 'a cat on a beach'"),
        (scene(BEACH, anchor_prompts=()), {}, "the set has no anchors"),
        (scene(BEACH, anchor=2), {}, "the set's 2 anchors count from 0"),
        (scene(BEACH), {"mask": "background"}, "Add subject.background"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(request_: EditRequest, editor: dict[str, Any], message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        ConsiStory(**editor).check(request_, NoiseStart(num_steps=N))


def test_one_scene_that_cannot_be_leaves_the_others_alone(together: Any) -> None:
    long = " ".join(["very"] * 90) + " good dog"
    bad, good = edited(scene(f"{long}"), scene(SNOW))
    assert isinstance(bad, PrepareError)
    assert "beyond what the text encoder reads" in str(bad)
    assert torch.equal(good.latents, together[1].latents)


def test_a_group_that_no_call_holds_is_an_error_with_both_numbers() -> None:
    engine = Engine(tiny_sd(), call_size=8)
    (found,) = engine.run_one(ConsiStory(scenes_per_call=4).edit_all(trajectory(), [scene()]))
    assert isinstance(found, EditError)
    assert "12 rows read each other" in str(found)
    assert "8 rows" in str(found)


def test_a_trajectory_that_begins_below_noise_is_refused() -> None:
    problems = list(ConsiStory().pair_problems(DDIMInversion(num_steps=40, skip_steps=10)))
    assert any("skip_steps: 0" in text for text in problems)
    assert any("leaves none of the 1 steps" in text for text in ConsiStory().pair_problems(NoiseStart(num_steps=1)))
