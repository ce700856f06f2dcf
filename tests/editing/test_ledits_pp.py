"""LEDITS++: counts, invariants, windows, masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.diffusion.masks import dilated, smooth_attention
from pipeline.editing.ledits_pp import LEditsPP, is_active
from pipeline.engine.calls import Denoise, Denoised
from pipeline.engine.engine import Engine
from pipeline.errors import EditError, PrepareError
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.one_image import latent_mask
from pipeline.records import Concept, EditRequest
from tests.facts import EditorFacts
from tests.golden.checks import observed
from tests.methods import BACKBONES, analytic, image_latents, invert_and_edit, source, sunglasses_and_hat, tiny_sd

FACTS = EditorFacts(rows=2, finds_region=True)
N = 6
every_backbone = pytest.mark.parametrize("backbone", [make() for make in BACKBONES.values()], ids=list(BACKBONES))
every_solver = pytest.mark.parametrize("solver", ["sde-dpmsolver++", "ddim"])


def rows_of_edit(request: EditRequest, num_steps: int = N) -> int:
    """The specification's formula: from the smallest warm-up on, one row and one per active concept."""
    first = min((concept.warmup_steps for concept in request.concepts), default=num_steps)
    return sum(1 + sum(is_active(c, i) for c in request.concepts) for i in range(first, num_steps))


REQUESTS = {
    "none": EditRequest(),
    "one": EditRequest(concepts=(Concept(prompt="hat"),)),
    "windows": EditRequest(
        concepts=(
            Concept(prompt="hat", warmup_steps=2),
            Concept(prompt="red dog", warmup_steps=3, cooldown_steps=4),
            Concept(prompt="snow", warmup_steps=4, cooldown_steps=6),
        )
    ),
    "ten": EditRequest(concepts=tuple(Concept(prompt=f"word {n}", warmup_steps=1) for n in range(10))),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=list(REQUESTS))
def test_network_rows_equal_the_formula(request_: EditRequest) -> None:
    engine = Engine(analytic(), call_size=4)
    engine.run_one(invert_and_edit(source(analytic(), 1), request_))
    assert engine.stats.network_rows == N + rows_of_edit(request_)


def test_three_concepts_with_the_specifications_windows_take_25_edit_rows_fewer_than_the_reference() -> None:
    concepts = tuple(
        Concept(prompt=prompt, warmup_steps=warmup, cooldown_steps=cooldown)
        for prompt, warmup, cooldown in (("george clooney", 2, 9), ("sunglasses", 3, 10), ("red hat", 4, 7))
    )
    engine = Engine(analytic(), call_size=4)
    request = EditRequest(concepts=concepts)
    engine.run_one(invert_and_edit(source(analytic(), 1), request, DDPMInversion(num_steps=10, skip=0.2)))
    assert engine.stats.network_rows - 10 == 25


def test_ten_concepts_in_calls_of_four_equal_ten_concepts_in_calls_of_sixteen() -> None:
    results = [
        Engine(analytic(), call_size=size).run_one(invert_and_edit(source(analytic(), 1), REQUESTS["ten"]))[1]
        for size in (4, 16)
    ]
    torch.testing.assert_close(results[0].latents, results[1].latents)
    assert torch.equal(results[0].masks, results[1].masks)
    assert results[0].masks.shape == (10, 12, 12)


@every_backbone
@every_solver
@pytest.mark.parametrize(
    "request_",
    [EditRequest(), sunglasses_and_hat().model_copy(update={"concepts": (Concept(prompt="hat", guidance_scale=0.0),)})],
    ids=["no concept", "scale zero"],
)
def test_nothing_to_change_returns_the_encoded_image_without_an_edit_row(
    backbone: Any, solver: str, request_: EditRequest
) -> None:
    engine = Engine(backbone, call_size=8)
    given = source(backbone, 1)
    _, edited = engine.run_one(invert_and_edit(given, request_, DDPMInversion(num_steps=N, solver=solver)))
    assert torch.equal(edited.latents, given.latents)
    assert engine.stats.network_rows == N
    assert edited.masks.shape == (len(request_.concepts), 12, 12)
    assert not edited.masks.any()


@every_backbone
@every_solver
def test_starting_at_the_first_warm_up_equals_walking_every_step(backbone: Any, solver: str) -> None:
    inversion = DDPMInversion(num_steps=N, solver=solver)
    request = EditRequest(concepts=(Concept(prompt="hat", guidance_scale=2.0, threshold=0.71, warmup_steps=3),))
    trajectory, short = Engine(backbone, call_size=8).run_one(
        invert_and_edit(source(backbone, 1), request, inversion, observe=True)
    )
    assert [record.step for record in short.history] == [3, 4, 5]
    # A base prompt that is named, but embeds as the empty one does, makes the editor walk every step.
    walked_request = request.model_copy(update={"negative_prompt": "\u2003"})
    engine = Engine(backbone, call_size=8)
    empty = backbone.encode_text("")
    engine._texts._held.update({"": empty, "\u2003": empty})
    walked = engine.run_one(observed(LEditsPP().edit(trajectory, walked_request)))
    assert len(walked.history) == N
    torch.testing.assert_close(walked.latents, short.latents, atol=2e-3, rtol=2e-3)
    assert torch.equal(walked.masks, short.masks)


@every_backbone
def test_the_order_of_concepts_does_not_matter(backbone: Any) -> None:
    request = sunglasses_and_hat()
    turned = EditRequest(concepts=request.concepts[::-1])
    one, other = (
        Engine(backbone, call_size=8).run_one(invert_and_edit(source(backbone, 1), r))[1] for r in (request, turned)
    )
    torch.testing.assert_close(one.latents, other.latents, atol=1e-3, rtol=1e-3)
    assert torch.equal(one.masks, other.masks.flip(0))


@every_backbone
def test_two_identical_concepts_equal_one_of_twice_the_scale(backbone: Any) -> None:
    once = Concept(prompt="hat", guidance_scale=2.0, threshold=0.71)
    doubled = EditRequest(concepts=(once.model_copy(update={"guidance_scale": 4.0}),))
    twice = EditRequest(concepts=(once, once))
    one, two = (
        Engine(backbone, call_size=8).run_one(invert_and_edit(source(backbone, 1), r))[1] for r in (doubled, twice)
    )
    torch.testing.assert_close(one.latents, two.latents, atol=1e-3, rtol=1e-3)


@every_backbone
def test_removing_equals_adding_with_a_negative_scale(backbone: Any) -> None:
    removed = EditRequest(concepts=(Concept(prompt="hat", guidance_scale=2.0, direction="remove"),))
    negative = EditRequest(concepts=(Concept(prompt="hat", guidance_scale=-2.0),))
    one, two = (
        Engine(backbone, call_size=8).run_one(invert_and_edit(source(backbone, 1), r))[1] for r in (removed, negative)
    )
    assert torch.equal(one.latents, two.latents)
    assert torch.equal(one.masks, two.masks)


def test_a_weight_scales_the_direction_after_its_mask() -> None:
    half = EditRequest(concepts=(Concept(prompt="hat", guidance_scale=4.0, weight=0.5),))
    full = EditRequest(concepts=(Concept(prompt="hat", guidance_scale=2.0),))
    one, two = (
        Engine(analytic(), call_size=8).run_one(invert_and_edit(source(analytic(), 1), r))[1] for r in (half, full)
    )
    torch.testing.assert_close(one.latents, two.latents)


def test_a_concept_moves_the_image_towards_its_mean_and_a_removal_moves_it_away() -> None:
    backbone = analytic()
    given = image_latents(backbone, 1)
    mean = backbone.means(backbone.encode_text("hat").embedding[None], 12, 12)[0]
    editor = LEditsPP(mask="noise")
    towards = {}
    for direction in ("add", "remove"):
        concept = Concept(prompt="hat", guidance_scale=1.0, threshold=0.0, direction=direction)
        generator = invert_and_edit(source(backbone, 1), EditRequest(concepts=(concept,)), editor=editor)
        _, edited = Engine(backbone).run_one(generator)
        moved = edited.latents - given
        towards[direction] = float((moved * mean).sum() / (mean * mean).sum())
    assert towards["add"] > 0.1
    assert towards["remove"] == pytest.approx(-towards["add"], rel=1e-3)


@every_backbone
@pytest.mark.parametrize("mode", ["intersect", "attention", "noise", "steady"])
def test_masks_have_the_area_that_their_threshold_leaves(backbone: Any, mode: str) -> None:
    editor = LEditsPP(mask=mode, intersect_from_timestep=1000)
    thresholds = (0.3, 0.83)
    concepts = tuple(Concept(prompt="hat", guidance_scale=2.0, threshold=threshold) for threshold in thresholds)
    generator = invert_and_edit(source(backbone, 1), EditRequest(concepts=concepts), editor=editor, observe=True)
    _, edited = Engine(backbone).run_one(generator)
    assert len(edited.history) == N
    for record in edited.history:
        shares = record.masks.double().mean(dim=(1, 2))
        if mode in ("noise", "steady"):  # one position in 144
            torch.testing.assert_close(shares, 1 - torch.tensor(thresholds).double(), atol=1 / 144 + 1e-6, rtol=0)
        if mode == "attention":  # one position in 9, repeated 4 x 4
            blocks = record.masks.unflatten(1, (3, 4)).unflatten(3, (3, 4))
            assert torch.equal(blocks.all(dim=4).all(dim=2), blocks.any(dim=4).any(dim=2))
    first = edited.history[0].masks
    assert not (first[1] & ~first[0]).any()  # a larger threshold gives a part of the smaller one's region


def test_the_intersection_lies_in_the_attention_mask_from_its_timestep_on() -> None:
    request = sunglasses_and_hat()
    recorded = {}
    for mode in ("intersect", "attention", "noise"):
        generator = invert_and_edit(
            source(tiny_sd(), 1), request, editor=LEditsPP(mask=mode, intersect_from_timestep=1000), observe=True
        )
        recorded[mode] = Engine(tiny_sd(), call_size=8).run_one(generator)[1].history[0].masks
    assert torch.equal(recorded["intersect"], recorded["attention"] & recorded["noise"])
    generator = invert_and_edit(source(tiny_sd(), 1), request, editor=LEditsPP(intersect_from_timestep=0), observe=True)
    early = Engine(tiny_sd(), call_size=8).run_one(generator)[1].history[0].masks
    assert torch.equal(early, recorded["attention"])


def test_a_steady_mask_is_where_all_directions_so_far_changed_the_image_most_and_asks_for_no_attention() -> None:
    """Written out anew: the power of each step's change of the data prediction, blurred, added up, and its quantile."""
    threshold, scale = 0.8, 2.0
    request = EditRequest(concepts=(Concept(prompt="hat", guidance_scale=scale, threshold=threshold),))
    given = source(tiny_sd(), 1)
    asked: list[Denoise] = []
    answers: list[Denoised] = []

    def spied() -> Any:
        steps = invert_and_edit(given, request, editor=LEditsPP(mask="steady"), observe=True)
        answer: Any = None
        while True:
            try:
                call = steps.send(answer)
            except StopIteration as end:
                return end.value
            answer = yield call
            if isinstance(call, Denoise) and len(call.levels) == 2:  # a step of the edit
                asked.append(call)
                answers.append(answer)

    trajectory, edited = Engine(tiny_sd(), call_size=8).run_one(spied())
    assert len(asked) == N
    assert all(call.watch is None for call in asked)
    total = torch.zeros(12, 12)
    for level, answer, record in zip(trajectory.levels, answers, edited.history, strict=True):
        direction = scale * (answer.predictions.noise[1] - answer.predictions.noise[0]) * level.noise / level.signal
        total += smooth_attention(smooth_attention((direction**2).sum(dim=0)[None]))[0]
        expected = total >= total.quantile(threshold)
        assert (record.masks[0] == expected).double().mean() > 0.98  # ties and the last bit may differ


def test_a_user_mask_keeps_the_first_steps_direction_inside_it() -> None:
    mask = torch.zeros((12, 12))
    mask[:, :6] = 1.0
    request = EditRequest(concepts=(Concept(prompt="hat", guidance_scale=3.0, threshold=0.2, warmup_steps=N - 1),))
    given = source(analytic(), 1)
    _, edited = Engine(analytic()).run_one(invert_and_edit(given, request, user_mask=mask))
    changed = (edited.latents - given.latents).abs().amax(dim=0) > 1e-4
    assert changed[:, :6].any()
    assert not changed[:, 6:].any()


@every_backbone
@every_solver
def test_a_kept_background_is_the_sources_outside_the_widened_masks_at_every_step(backbone: Any, solver: str) -> None:
    given, inversion = source(backbone, 1), DDPMInversion(num_steps=N, solver=solver)
    concept = Concept(prompt="hat", guidance_scale=6.0, threshold=0.9)
    engines, results = [], {}
    for keep in (False, True):
        engines.append(Engine(backbone, call_size=8))
        generator = invert_and_edit(
            given,
            EditRequest(concepts=(concept,)),
            inversion,
            editor=LEditsPP(mask="noise", keep_background=keep),
            observe=True,
        )
        results[keep] = engines[-1].run_one(generator)
    trajectory, kept = results[True]
    background = ~dilated(kept.mask, 1)
    assert 0 < background.sum() < background.numel()
    assert torch.equal(kept.latents[:, background], given.latents[:, background])
    assert not torch.equal(kept.latents, given.latents)
    _, drifted = results[False]
    assert not torch.equal(drifted.latents[:, ~dilated(drifted.mask, 1)], given.latents[:, ~dilated(drifted.mask, 1)])
    first = kept.history[0]
    outside = ~dilated(first.masks[0], 1)
    assert torch.equal(first.latents[:, outside], trajectory.latents[1][:, outside])
    assert engines[0].stats.network_rows == engines[1].stats.network_rows


@every_solver
def test_a_kept_background_changes_nothing_where_a_concept_acts_everywhere(solver: str) -> None:
    concept = Concept(prompt="hat", guidance_scale=4.0, threshold=0.0)
    inversion = DDPMInversion(num_steps=N, solver=solver)
    plain, kept = (
        Engine(analytic()).run_one(
            invert_and_edit(
                source(analytic(), 1),
                EditRequest(concepts=(concept,)),
                inversion,
                editor=LEditsPP(mask="noise", keep_background=keep),
            )
        )[1]
        for keep in (False, True)
    )
    assert plain.mask.all()
    assert torch.equal(plain.latents, kept.latents)


def test_a_kept_background_never_reaches_beyond_a_users_mask() -> None:
    mask = torch.zeros((12, 12))
    mask[:, :6] = 1.0
    request = EditRequest(concepts=(Concept(prompt="hat", guidance_scale=6.0, threshold=0.2),))
    given = source(tiny_sd(), 1)
    for keep in (False, True):
        editor = LEditsPP(mask="noise", keep_background=keep)
        _, edited = Engine(tiny_sd(), call_size=8).run_one(
            invert_and_edit(given, request, editor=editor, user_mask=mask)
        )
        assert torch.equal(edited.latents[:, :, 6:], given.latents[:, :, 6:]) == keep
        assert not torch.equal(edited.latents[:, :, :6], given.latents[:, :, :6])


def test_an_unknown_word_is_edited_like_any_other() -> None:
    request = EditRequest(concepts=(Concept(prompt="qwxyzzy \u96ea"),))
    _, edited = Engine(tiny_sd(), call_size=8).run_one(invert_and_edit(source(tiny_sd(), 1), request))
    assert torch.isfinite(edited.latents).all()


def test_attention_masks_at_a_size_without_their_grid_are_refused_with_the_grids() -> None:
    given = source(tiny_sd(), 1, side=10)
    with pytest.raises(EditError, match=r"2\.5x2\.5 here.*10x10, 5x5, 3x3"):
        Engine(tiny_sd(), call_size=8).run_one(invert_and_edit(given, sunglasses_and_hat()))


def test_a_request_that_cannot_act_is_refused() -> None:
    with pytest.raises(PrepareError, match=r"warmup_steps 6.*only 6 steps"):
        LEditsPP().check(EditRequest(concepts=(Concept(prompt="hat", warmup_steps=6),)), DDPMInversion(num_steps=6))
    with pytest.raises(PrepareError, match="target_prompt but no concepts"):
        LEditsPP().check(EditRequest(target_prompt="a dog"), DDPMInversion(num_steps=6))
    with pytest.raises(ValueError, match="would never act"):
        Concept(prompt="hat", warmup_steps=4, cooldown_steps=4)


def test_a_user_mask_is_averaged_down_to_the_latents() -> None:
    latents = torch.zeros((4, 2, 2))
    mask = torch.zeros((16, 16)).numpy()
    mask[:8, :4] = 1.0
    reduced = latent_mask(mask, latents)
    assert reduced is not None
    assert reduced.tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert latent_mask(None, latents) is None
