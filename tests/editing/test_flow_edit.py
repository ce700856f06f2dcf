"""`flow_edit`: against algebra where velocities are known, bit for bit where nothing changes, and what it costs."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.editing.flow_edit import FlowEdit
from pipeline.engine.backbone import Backbone
from pipeline.engine.engine import Engine
from pipeline.errors import PrepareError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.looking.counting import RowCounter
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig, recipe_from
from pipeline.records import EditRequest, Trajectory
from tests.closed_form_flow import SPREAD, ClosedFormFlow
from tests.facts import EditorFacts
from tests.golden.replay import TINY_FLUX, TINY_SD3
from tests.methods import analytic, source, tiny_sd

FACTS = EditorFacts(rows=4, quick={"n_max": 3, "guidance_scale": 5.0})
CAT, DOG = "a cat on a mat", "a dog on a mat"
REQUEST = EditRequest(source_prompt=CAT, target_prompt=DOG)
SIDE = 4


@cache
def tiny(name: str) -> Any:
    folder = {"sd3": TINY_SD3, "flux": TINY_FLUX}[name]
    return load_backbone(ModelConfig(name=str(folder), text_tokens=8), device="cpu")


MODELS = {
    "flux": lambda: tiny("flux"),
    "sd3": lambda: tiny("sd3"),
    "tiny_sd": tiny_sd,
    "analytic": analytic,
    "closed-form flow": ClosedFormFlow,
}


def start(backbone: Backbone, num_steps: int, side: int = SIDE) -> Trajectory:
    given = source(backbone, 1, CAT, side)
    trajectory: Trajectory = Engine(backbone).run_one(NoiseStart(num_steps=num_steps).invert(given))
    return trajectory


def edited(backbone: Backbone, editor: FlowEdit, request: EditRequest = REQUEST, **options: Any) -> tuple[Any, int]:
    """The latents of an edit of 5 steps or `num_steps`, and the network rows that it took."""
    trajectory = start(backbone, options.pop("num_steps", 5), options.pop("side", SIDE))
    engine = Engine(backbone, call_size=4)
    latents: Tensor = engine.run_one(editor.edit(trajectory, request, **options)).latents
    return latents, engine.stats.network_rows


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (3.0, 2.0)], ids=["unguided", "guided"])
def test_the_offset_follows_the_difference_of_known_velocities(guidance: tuple[float, float]) -> None:
    """Of Gaussian images v = a x - b mean + ..., so that no noise is left in the offset."""
    backbone = ClosedFormFlow(torch.float64)
    ours, _ = edited(backbone, FlowEdit(n_max=4, guidance_scale=guidance[0], source_guidance_scale=guidance[1]))
    trajectory = start(backbone, 5)
    target, shown = guidance[0] * backbone.mean_of(DOG), guidance[1] * backbone.mean_of(CAT)  # against zeros
    offset = torch.zeros_like(ours)
    for start_, end in trajectory.solver.steps[1:]:
        sigma = start_.noise
        total = ((1 - sigma) * SPREAD) ** 2 + sigma**2
        slope = (sigma - (1 - sigma) * SPREAD**2) / total
        offset = offset + (end.noise - sigma) * (slope * offset - sigma / total * (target - shown))
    torch.testing.assert_close(ours, trajectory.source.latents + offset)
    assert float(offset.abs().max()) > 0.1


@pytest.mark.parametrize("backbone", MODELS.values(), ids=list(MODELS))
def test_equal_prompts_and_guidance_return_the_image_bit_for_bit(backbone: Any) -> None:
    editor = FlowEdit(n_max=4, n_avg=2, guidance_scale=3.0, source_guidance_scale=3.0)
    side = 12 if backbone is tiny_sd else SIDE
    latents, _ = edited(backbone(), editor, EditRequest(source_prompt=CAT, target_prompt=CAT), side=side)
    assert torch.equal(latents, start(backbone(), 5, side).source.latents)
    changed, _ = edited(backbone(), editor, side=side)
    assert not torch.allclose(changed, latents, atol=1e-2)


@pytest.mark.parametrize(("name", "num_steps", "rows"), [("flux", 28, 48), ("sd3", 50, 132)])
def test_the_authors_settings_cost_the_fewest_rows_and_planning_counts_them(
    name: str, num_steps: int, rows: int
) -> None:
    """One row a branch where the network is told its guidance, two where it is guided."""
    _, asked = edited(tiny(name), FlowEdit(), num_steps=num_steps)
    assert asked == rows
    sections = {"source": {"shards": "-"}, "sink": {"folder": "-"}, "editing": {"method": "flow_edit"}}
    recipe = recipe_from(
        {**sections, "edits": REQUEST.model_dump(), "inversion": {"method": "noise", "num_steps": num_steps}}
    )
    assert RowCounter(recipe, told_guidance=name == "flux").rows({"edit": REQUEST}) == rows


def test_guidance_is_told_to_a_network_that_takes_it() -> None:
    weak, _ = edited(tiny("flux"), FlowEdit(n_max=4, guidance_scale=1.0))
    strong, rows = edited(tiny("flux"), FlowEdit(n_max=4, guidance_scale=9.0))
    assert rows == 8
    assert not torch.allclose(weak, strong, rtol=0.01)
    with pytest.raises(PrepareError, match="leaves no place for the edit's negative_prompt"):
        edited(tiny("flux"), FlowEdit(), REQUEST.model_copy(update={"negative_prompt": "snow"}))


def test_several_edits_of_an_image_share_what_the_source_predicts_and_get_their_own_bits() -> None:
    trajectory, editor = start(tiny("sd3"), 5), FlowEdit(n_max=4, n_min=1, n_avg=2)
    requests = [EditRequest(source_prompt=CAT, target_prompt=prompt) for prompt in (DOG, "snow", "a hat")]
    engine = Engine(tiny("sd3"), call_size=4)
    together = engine.run_one(editor.edit_all(trajectory, requests))
    # Unguided and guided row, 3 steps, 2 draws: the source once, each target; and the last step of each target.
    assert engine.stats.network_rows + engine.stats.shared_rows <= 12 + 3 * (12 + 2)
    for request, one in zip(requests, together, strict=True):
        alone, _ = edited(tiny("sd3"), editor, request)
        assert torch.equal(one.latents, alone)


def test_the_mean_over_draws_is_over_draws() -> None:
    """Twice the same noise is once that noise."""
    backbone = tiny("sd3")
    given = start(backbone, 5)
    noise = source(backbone, 1, CAT, SIDE).draw_noise()
    alike = dataclasses.replace(given, source=dataclasses.replace(given.source, editing_noise=lambda: lambda: noise))
    once, twice = (
        Engine(backbone, call_size=4).run_one(FlowEdit(n_max=4, n_avg=count).edit(alike, REQUEST)).latents
        for count in (1, 2)
    )
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_min", [0, 2])
def test_a_mask_keeps_what_is_outside_and_a_white_one_keeps_nothing(n_min: int) -> None:
    editor = FlowEdit(n_max=4, n_min=n_min)
    clean = start(tiny("sd3"), 5).source.latents
    whole, _ = edited(tiny("sd3"), editor)
    white, _ = edited(tiny("sd3"), editor, user_mask=torch.ones((SIDE, SIDE)))
    torch.testing.assert_close(white, whole, atol=1e-5, rtol=1e-5)
    half = torch.zeros((SIDE, SIDE))
    half[:, 2:] = 1.0
    masked, _ = edited(tiny("sd3"), editor, user_mask=half)
    torch.testing.assert_close(masked[..., :2], clean[..., :2], atol=0, rtol=0)
    assert not torch.allclose(masked[..., 2:], clean[..., 2:], atol=1e-2)


def test_last_steps_that_only_sample_draw_once_more_and_leave_the_image_behind() -> None:
    kept, _ = edited(tiny("sd3"), FlowEdit(n_max=5))
    sampled, rows = edited(tiny("sd3"), FlowEdit(n_max=5, n_min=3))
    clean = start(tiny("sd3"), 5).source.latents
    assert rows == 4 * 2 + 2 * 3
    assert not torch.allclose(sampled, kept, atol=1e-2)
    unmoved, _ = edited(tiny("sd3"), FlowEdit(n_max=5, n_min=3), EditRequest(source_prompt=CAT, target_prompt=CAT))
    assert not torch.allclose(unmoved, clean, atol=1e-2)


def test_more_steps_move_the_image_further() -> None:
    clean = start(ClosedFormFlow(), 10).source.latents
    distances = [
        float((edited(ClosedFormFlow(), FlowEdit(n_max=count), num_steps=10)[0] - clean).norm()) for count in (2, 5, 9)
    ]
    assert distances[0] < distances[1] < distances[2]


def test_settings_that_leave_nothing_to_do_are_refused() -> None:
    def problems(editor: FlowEdit, **settings: Any) -> list[str]:
        return list(editor.pair_problems(NoiseStart(num_steps=10, **settings)))

    assert problems(FlowEdit()) == []
    assert "n_max 11 is more than the 10 steps" in problems(FlowEdit(n_max=11))[0]
    assert "n_min 4 leaves none of the 4 steps" in problems(FlowEdit(n_max=4, n_min=4))[0]
    assert "inversion.eta is 0.5" in problems(FlowEdit(), eta=0.5)[0]
    with pytest.raises(PrepareError, match="no target_prompt"):
        FlowEdit().check(EditRequest(source_prompt=CAT), NoiseStart())
    assert not FlowEdit.fits(DDIMInversion)  # whose rows would be wasted


ALIGN = FlowEdit(guided_against="source_prompt", guidance_scale=3.0, pull=0.1)


def test_flow_align_walks_all_steps_by_three_rows_and_pulls_the_clean_latents_together() -> None:
    """As its authors write it: the latents' predictions, not offsets."""
    backbone = ClosedFormFlow(torch.float64)
    ours, rows = edited(backbone, ALIGN)
    trajectory = start(backbone, 5)
    assert rows == 3 * 5
    clean, draw = trajectory.source.latents, trajectory.source.editing_noise()
    offset = torch.zeros_like(clean)
    for start_, end in trajectory.solver.steps:
        sigma, noised = start_.noise, start_.noised(clean, draw())
        total = ((1 - sigma) * SPREAD) ** 2 + sigma**2
        slope = (sigma - (1 - sigma) * SPREAD**2) / total

        def velocity(latents: Tensor, mean: Tensor, slope: float = slope, sigma: float = sigma) -> Tensor:
            return slope * (latents - (1 - sigma) * mean) - mean

        source_velocity = velocity(noised, backbone.mean_of(CAT))
        away = velocity(noised + offset, backbone.mean_of(CAT))
        target_velocity = away + 3.0 * (velocity(noised + offset, backbone.mean_of(DOG)) - away)
        pulled = (noised - sigma * source_velocity) - (noised + offset - sigma * target_velocity)
        offset = offset + (end.noise - sigma) * (target_velocity - source_velocity) + 0.1 * pulled
    torch.testing.assert_close(ours, clean + offset)
    assert float(offset.abs().max()) > 0.1


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_flow_align_of_equal_prompts_returns_the_image_bit_for_bit(name: str) -> None:
    latents, _ = edited(tiny(name), ALIGN, EditRequest(source_prompt=CAT, target_prompt=CAT))
    assert torch.equal(latents, start(tiny(name), 5).source.latents)


def test_flow_align_guides_a_network_that_is_told_its_guidance_against_the_source_too() -> None:
    weak, rows = edited(tiny("flux"), ALIGN.model_copy(update={"guidance_scale": 1.5}))
    strong, _ = edited(tiny("flux"), ALIGN)
    assert rows == 3 * 5
    assert not torch.allclose(weak, strong, rtol=0.01)


def test_what_is_guided_against_the_source_prompt_takes_no_negative_prompt() -> None:
    (problem,) = ALIGN.problems(REQUEST.model_copy(update={"negative_prompt": "snow"}), NoiseStart())
    assert "reads no negative_prompt" in problem.text
