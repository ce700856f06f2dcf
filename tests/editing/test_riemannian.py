"""Editing along the latent basis: against algebra on the closed-form model, what it shares, what it refuses."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pipeline.diffusion.subspaces import largest_sine
from pipeline.directions import Direction, StoredDirection, one_per_result
from pipeline.editing.reconstruct import Reconstruct
from pipeline.editing.riemannian import Riemannian, guidance
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import Product, Steps
from pipeline.engine.engine import Engine
from pipeline.engine.pullback import LocalBasis, Place
from pipeline.errors import EditError, PrepareError, RecipeError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.models.analytic import AnalyticBackbone
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig, parse_edits, recipe_from
from pipeline.records import EditedLatents, EditRequest, Trajectory
from tests.facts import EditorFacts
from tests.golden.replay import TINY_SDXL, loaded
from tests.methods import analytic, invert_and_edit, levels, source, tiny_sd

QUICK = {"num_vectors": 1, "oversample": 1, "max_iterations": 1, "edit_time": 1.0}
# Two rows of one iteration in both modes and one to finish; 16 moves of 2; then a row per step, and the source's.
FACTS = EditorFacts(rows=2, rows_after={"ddim": 1}, rows_once=2 * 3 + 2 * 16, quick=QUICK, unguided={"move_scale": 0.0})
S = 4
PROMPT = "a red hat"


def trajectory_of(backbone: Any, inversion: Any = None, side: int = 8) -> Trajectory:
    made = inversion or DDIMInversion(num_steps=S)
    found: Trajectory = Engine(backbone, call_size=8).run_one(made.invert(source(backbone, 1, "a cat", side)))
    return found


def request(**direction: Any) -> EditRequest:
    return EditRequest(target_prompt=PROMPT, direction=Direction(**direction))


def edited(editor: Riemannian, trajectory: Trajectory, *requests: EditRequest, backbone: Any = None) -> list[Any]:
    engine = Engine(backbone or tiny_sd(), call_size=8)
    return engine.run_one(editor.edit_all(trajectory, requests))


def basis_of(editor: Riemannian, trajectory: Trajectory, backbone: Any, prompt: str = PROMPT) -> LocalBasis:
    (found,) = Engine(backbone, call_size=64, pad=False).run_one(
        editor.bases(trajectory, [EditRequest(target_prompt=prompt)])
    )
    assert isinstance(found, LocalBasis), found
    return found


# The basis ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit_time", [1.0, 0.3])
def test_on_the_closed_form_model_the_basis_is_that_of_its_orthogonal_rows(edit_time: float) -> None:
    backbone: Any = analytic(torch.float64)
    editor = Riemannian(num_vectors=3, oversample=9, max_iterations=100, tolerance=1e-7, edit_time=edit_time)
    found = basis_of(editor, trajectory_of(backbone, side=4), backbone)
    height, width = found.latent_shape[1:]
    weights = backbone.weights(backbone.encode_text(PROMPT).embedding[None], height, width)
    lengths = avg_pool2d(weights.square(), 2, divisor_override=1).sqrt().flatten()
    expected, order = lengths.sort(descending=True)
    torch.testing.assert_close(found.leading.stretches, expected[:3], rtol=1e-6, atol=0.0)
    rows = torch.eye(len(lengths), dtype=torch.float64)[order[:3]]
    assert largest_sine(found.leading.features, rows) < 1e-5
    assert found.residual < 1e-7


@pytest.mark.parametrize("model", [pytest.param("tiny_sd", marks=pytest.mark.slow), "xl"])
def test_leading_vectors_stay_where_more_are_asked_for_and_pairs_are_pairs(model: str) -> None:
    backbone: Any = tiny_sd(torch.float64) if model == "tiny_sd" else loaded(TINY_SDXL, torch.float64)
    trajectory = trajectory_of(backbone, DDIMInversion(num_steps=2))
    few, more = (
        basis_of(Riemannian(num_vectors=count, oversample=6, max_iterations=60), trajectory, backbone)
        for count in (2, 4)
    )
    torch.testing.assert_close(few.leading.stretches, more.leading.stretches[:2], rtol=1e-6, atol=0.0)
    assert largest_sine(few.leading.tangents, more.leading.tangents[:2]) < 1e-3
    (conditioning,) = [backbone.encode_text(PROMPT)]
    step = Riemannian().step_among(trajectory.levels)
    place = Place(latents=trajectory.latents[step], level=trajectory.levels[step], conditioning=conditioning)
    pushed = Engine(backbone).run_one(place.push(more.leading.tangents)).flatten(1)
    torch.testing.assert_close(pushed, more.leading.stretches[:, None] * more.leading.features, rtol=1e-8, atol=1e-9)


def test_oversampling_needs_fewer_iterations() -> None:
    backbone = tiny_sd(torch.float64)
    trajectory = trajectory_of(backbone, DDIMInversion(num_steps=2))
    plain, sampled = (
        basis_of(Riemannian(num_vectors=2, oversample=more, tolerance=1e-3), trajectory, backbone).iterations
        for more in (0, 6)
    )
    assert sampled < plain <= 50


class Counting(AnalyticBackbone):
    """Counts the rows of products and predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[str] = Counter()

    def product(self, call: Product) -> Tensor:
        self.rows[call.mode] += len(call.levels)
        return super().product(call)


@pytest.mark.parametrize("iterations", [1, 3])
def test_products_and_rows_are_the_least_that_lose_nothing(iterations: int) -> None:
    backbone = Counting()
    trajectory = trajectory_of(backbone)
    editor = Riemannian(num_vectors=2, oversample=1, max_iterations=iterations, tolerance=1e-30, edit_time=1.0)
    engine = Engine(backbone, call_size=4, pad=False)
    requests = [request(vectors=(v,), strengths=(m,)) for v in (0, 1) for m in (-2, 1, 3, 0)]
    engine.run_one(editor.edit_all(trajectory, requests))
    assert backbone.rows == {"push": 3 * iterations + 3, "pull": 3 * iterations}
    # Of each vector one way of 2 and one of 3 moves; all four ways begin with one row. Then S steps of eight results,
    # of which the unmoved image is asked for twice and computed once.
    moves = 1 + 2 * (1 + 2 * 1) + 2 * (1 + 2 * 2)
    assert engine.stats.network_rows - engine.stats.shared_rows <= sum(backbone.rows.values()) + moves + 8 * S
    assert engine.stats.network_rows == sum(backbone.rows.values()) + moves + 8 * S


# Moves --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_on_the_closed_form_model_each_move_adds_the_same_step(sign: int) -> None:
    backbone: Any = analytic(torch.float64)
    (level,) = levels(backbone, [601])
    latents = source(backbone, 2).latents
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    place = Place(latents=latents, level=level, conditioning=backbone.encode_text(PROMPT))
    path = Engine(backbone).run_one(guidance(place, sign * 0.5 * direction, 0.2, 3))
    slope = level.noise / (level.signal**2 * backbone.spread**2 + level.noise**2)
    for moves, moved in enumerate(path):
        torch.testing.assert_close(moved, latents + moves * sign * 0.2 * slope * 0.5 * direction)


@pytest.mark.parametrize(
    ("settings", "strength"), [({}, 0), ({"move_scale": 0.0}, 2), ({"step_size": 0.0}, 2)], ids=str
)
@pytest.mark.parametrize("inversion", [DDIMInversion, DirectInversion])
def test_what_moves_nothing_is_the_unedited_sample_bit_for_bit(settings: Any, strength: int, inversion: Any) -> None:
    trajectory = trajectory_of(tiny_sd(), inversion(num_steps=S))
    (result,) = edited(Riemannian(**{**QUICK, **settings}), trajectory, request(strengths=(strength,)))
    if inversion is DDIMInversion:
        whole = Engine(tiny_sd(), call_size=8).run_one(Reconstruct().edit(trajectory, EditRequest()))
        assert torch.equal(result.latents, whole.latents)
    else:
        torch.testing.assert_close(result.latents, trajectory.latents[-1], rtol=0.0, atol=1e-3)


def test_results_of_one_request_are_those_of_each_strength_alone() -> None:
    trajectory = trajectory_of(tiny_sd())
    editor = Riemannian(num_vectors=2, oversample=0, max_iterations=1, move_scale=0.5)
    several = one_per_result({"e": request(vectors=(0, 1), strengths=(-2, 1))})
    assert list(several) == ["e-v0-2", "e-v0+1", "e-v1-2", "e-v1+1"]
    together = edited(editor, trajectory, *several.values())
    for one, result in zip(several.values(), together, strict=True):
        (alone,) = edited(editor, trajectory, one)
        assert torch.equal(alone.latents, result.latents)
    distinct = {tuple(result.latents.flatten().tolist()[:8]) for result in together}
    assert len(distinct) == len(together)


def test_the_other_way_is_the_opposite_and_edits_under_two_prompts_come_back_in_their_order() -> None:
    backbone: Any = analytic(torch.float64)
    trajectory = trajectory_of(backbone)
    editor = Riemannian(num_vectors=1, oversample=1, max_iterations=2)
    requests = [
        EditRequest(target_prompt=prompt, direction=Direction(strengths=(strength,)))
        for prompt, strength in ((PROMPT, 2), ("", 2), (PROMPT, -2), ("", 0), (PROMPT, 0))
    ]
    together = [one.latents for one in edited(editor, trajectory, *requests, backbone=backbone)]
    for one, latents in zip(requests, together, strict=True):
        (alone,) = edited(editor, trajectory, one, backbone=backbone)
        torch.testing.assert_close(alone.latents, latents)
    forth, other_prompt, back, _, unmoved = together
    assert float((forth - unmoved).abs().max()) > 0.01
    assert not torch.allclose(forth, other_prompt, atol=0.01)
    torch.testing.assert_close(forth - unmoved, unmoved - back)  # the model is affine


def test_late_noise_is_the_images_own_and_drawn_below_its_level_only() -> None:
    trajectory = trajectory_of(tiny_sd())
    one, again, none, above = (
        edited(Riemannian(**QUICK, late_noise=late), trajectory, request(strengths=(1,)))[0].latents
        for late in (0.3, 0.3, 0.0, 1e-9)
    )
    assert torch.equal(one, again)
    assert torch.equal(none, above)
    assert not torch.allclose(one, none, rtol=0.1)


# Stored directions --------------------------------------------------------------------------------------------------


def with_stored(trajectory: Trajectory, **stored: StoredDirection) -> Trajectory:
    return dataclasses.replace(trajectory, source=dataclasses.replace(trajectory.source, stored={"file": stored}))


def stored(basis: LocalBasis, vector: int = 0, **changes: Any) -> StoredDirection:
    given = {
        "name": "smile",
        "feature": basis.leading.features[vector].double(),
        "shape": basis.shape,
        "layer": "mid_block",
        "timestep": basis.timestep,
        "model_digest": "0",
        "model": "m",
    }
    return StoredDirection(**{**given, **changes})


def test_a_stored_direction_of_the_image_itself_moves_it_like_its_own() -> None:
    backbone = tiny_sd(torch.float64)
    trajectory = trajectory_of(backbone)
    editor = Riemannian(num_vectors=2, oversample=1, max_iterations=1, directions="file", move_scale=0.1)
    direction = stored(basis_of(editor, trajectory, backbone), 1)
    own, carried = edited(
        editor,
        with_stored(trajectory, smile=direction),
        request(vectors=(1,), strengths=(2,)),
        request(stored="smile", strengths=(2,)),
        backbone=backbone,
    )
    torch.testing.assert_close(own.latents, carried.latents, rtol=1e-5, atol=1e-5)


def test_too_little_of_a_direction_another_size_or_a_name_that_is_not_there_fail_alone() -> None:
    trajectory = trajectory_of(tiny_sd())
    editor = Riemannian(**QUICK, directions="file", min_kept=0.9)
    basis = basis_of(editor, trajectory, tiny_sd())
    numbers = basis.leading.features.shape[1]
    lost = stored(basis, feature=torch.nn.functional.normalize(torch.arange(numbers).double(), dim=0))
    other = stored(basis, shape=(1, 2, 3))
    results = edited(
        editor,
        with_stored(trajectory, lost=lost, other=other),
        *(request(stored=name, strengths=(1,)) for name in ("lost", "other", "none")),
        request(strengths=(1,)),
    )
    assert [type(result) for result in results] == [EditError, EditError, EditError, EditedLatents]
    texts = ("less than editing.min_kept 0.9", "bottleneck of 1x2x3", "no direction 'none'")
    for result, text in zip(results[:3], texts, strict=True):
        assert text in str(result)


# Refusals -----------------------------------------------------------------------------------------------------------


def recipe(**editing: Any) -> Any:
    return recipe_from(
        {
            "source": {"shards": "-"},
            "model": editing.pop("model", {}),
            "edits": editing.pop("edits", {"target_prompt": PROMPT}),
            "inversion": editing.pop("inversion", {"method": "ddim"}),
            "editing": {"method": "riemannian", **editing},
            "sink": {"folder": "-"},
        }
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"edits": {"direction": {"vectors": [2]}}}, "vector 2 is asked for, and the basis has 2"),
        ({"edits": {"direction": {"stored": "smile"}}}, "Set editing.directions"),
        ({"edits": {"direction": {"strengths": [1, 1]}}}, "strengths has a number twice"),
        ({"edits": {"direction": {"stored": "smile", "vectors": [1]}}, "directions": "f"}, "both choose a direction"),
        ({"edits": {"e" * 62: {"direction": {"strengths": [1, -1, 100]}}}}, "is longer than 64 characters"),
        ({"edits": {"a": {"direction": {"strengths": [1, 2]}}, "a+1": {}}}, "stands there twice"),
        ({"late_noise": 0.2, "inversion": {"method": "direct"}}, "late_noise draws noise"),
        ({"inversion": {"method": "ddpm"}}, "works with: ddim, direct"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_with_the_way_out(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match="problem") as caught:
        recipe(**settings)
    assert text in str(caught.value)


def test_a_rows_own_request_is_taken_apart_too_and_its_results_are_counted() -> None:
    found = parse_edits({"direction": {"strengths": [-1, 1]}}, "row")
    assert {name: one.direction.strength for name, one in found.items() if one.direction} == {"edit-1": -1, "edit+1": 1}
    with pytest.raises(PrepareError, match="asks for 6 concepts, more than"):
        parse_edits({"direction": {"vectors": [0, 1], "strengths": [1, 2, 3]}}, "row", most=5)
    assert parse_edits(found["edit-1"].model_dump(), "row")["edit"] == found["edit-1"]


def test_a_model_without_products_and_a_basis_larger_than_the_latents_are_refused_before_the_run() -> None:
    with pytest.raises(RecipeError, match=r"Jacobian of the network's bottleneck.*Stable Diffusion"):
        recipe().refuse_what_lacks(Offers(), "m")
    offers = load_backbone(ModelConfig(name="demo"), device="cpu").offers
    small = offers.at_size(64).bottleneck
    assert small is not None
    rank = small.rank(small.side, small.side)
    assert rank == min(4 * small.side**2, 128 * (small.side // small.factor) ** 2)
    at_most = recipe(num_vectors=rank, oversample=0, model={"size": 64})
    at_most.refuse_what_lacks(offers, "demo")
    more = recipe(num_vectors=rank, oversample=1, model={"size": 64})
    with pytest.raises(RecipeError, match=f"latents of {small.side} x {small.side} have at most {rank} "):
        more.refuse_what_lacks(offers, "demo")


def test_latents_smaller_than_the_basis_fail_as_a_row() -> None:
    def edit() -> Steps[Any]:
        given = source(tiny_sd(), 1, side=4)
        return (yield from invert_and_edit(given, request(), DDIMInversion(num_steps=1), Riemannian(num_vectors=90)))

    with pytest.raises(EditError, match="have 64 numbers"):
        Engine(tiny_sd()).run_one(edit())
