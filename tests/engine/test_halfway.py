"""Steps of second order: how fast their error shrinks, what they cost, where they predict, and who walks by them."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from pipeline.diffusion.levels import Level
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.direct_edit import DirectEdit
from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.backbone import Backbone
from pipeline.engine.engine import Engine
from pipeline.engine.halfway import SecondOrder, halfway
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.null_text import NullTextInversion
from pipeline.records import EditRequest
from tests.closed_form_flow import ClosedFormFlow
from tests.methods import analytic, invert_and_edit, network_calls, source, tiny_sd

CAT = "a cat"
KINDS: tuple[SecondOrder, ...] = get_args(SecondOrder)
every_kind = pytest.mark.parametrize("kind", KINDS)


def noised(num_steps: int, solver: Any) -> torch.Tensor:
    """The noisiest latents of an inversion on the closed-form model."""
    backbone = ClosedFormFlow(torch.float64)
    inversion = DDIMInversion(num_steps=num_steps, solver=solver)
    return Engine(backbone).run_one(inversion.invert(source(backbone, 1, CAT))).latents[0]


@every_kind
def test_twice_the_steps_quarter_the_error_at_least_where_those_of_first_order_halve_it(kind: SecondOrder) -> None:
    exact = noised(400, "rf_solver")
    few, many = (float((noised(steps, kind) - exact).norm()) for steps in (16, 32))
    assert few / many > 3.2
    few, many = (float((noised(steps, "first_order") - exact).norm()) for steps in (16, 32))
    assert 1.6 < few / many < 2.5


def round_trip(backbone: Backbone, inversion: DDIMInversion, **request: str) -> tuple[Any, float, int]:
    given = source(backbone, 1, CAT)
    engine = Engine(backbone, call_size=4)
    asked = EditRequest(source_prompt=CAT, **request)
    trajectory, back = engine.run_one(invert_and_edit(given, asked, inversion, Reconstruct()))
    return trajectory, float((back.latents - given.latents).norm() / given.latents.norm()), engine.stats.network_rows


@every_kind
@pytest.mark.parametrize("backbone", [ClosedFormFlow(torch.float64), analytic(torch.float64)], ids=["flow", "vp"])
def test_the_image_comes_back_closer_than_by_ddim_whatever_the_model(backbone: Backbone, kind: SecondOrder) -> None:
    _, theirs, _ = round_trip(backbone, DDIMInversion(num_steps=8, skip_steps=1))
    trajectory, ours, _ = round_trip(backbone, DDIMInversion(num_steps=8, skip_steps=1, solver=kind))
    assert trajectory.velocities is None
    assert (trajectory.skipped_steps, trajectory.second_order) == (1, kind)
    assert ours < theirs / 4


@pytest.mark.parametrize(("kind", "rows"), [("rf_solver", 4 * 5), ("fireflow", 2 * 6)])
def test_both_ways_cost_two_rows_a_step_or_one_and_one_more(kind: SecondOrder, rows: int) -> None:
    assert round_trip(ClosedFormFlow(), DDIMInversion(num_steps=5, solver=kind))[2] == rows


@pytest.mark.parametrize("make", [tiny_sd, ClosedFormFlow], ids=["vp", "flow"])
def test_levels_half_way_are_those_of_the_model(make: Any) -> None:
    backbone = make()
    engine = Engine(backbone, call_size=1)
    calls = network_calls(engine)
    trajectory = engine.run_one(DDIMInversion(num_steps=3, solver="rf_solver").invert(source(backbone, 1, CAT)))
    for number, step in enumerate(reversed(trajectory.solver.steps)):
        low, between = (calls[2 * number + place].levels[0] for place in (0, 1))
        assert low.share == step.end.share
        assert low.timestep == max(step.end.timestep, 0.0)
        assert between.share == pytest.approx((step.start.share + step.end.share) / 2)
        assert between.timestep == pytest.approx((step.start.timestep + low.timestep) / 2)
        frame = between.signal**2 + between.noise**2 if make is tiny_sd else between.scale
        assert frame == pytest.approx(1.0)


def test_between_clean_and_noisy_latents_of_a_flow_no_scale_comes_in() -> None:
    assert halfway(Level(1.0, 0.0, 0.0), Level(0.5, 0.5, 500.0)) == Level(0.75, 0.25, 250.0)


def test_an_edit_is_walked_down_by_the_rule_of_its_inversion() -> None:
    backbone = ClosedFormFlow(torch.float64)
    request = EditRequest(source_prompt=CAT, target_prompt=CAT)
    editor = ClassifierFreeGuidance(guidance_scale=1.0)
    distances = {}
    for solver in ("first_order", *KINDS):
        inversion = DDIMInversion(num_steps=8, solver=solver)  # type: ignore[arg-type]
        given = source(backbone, 1, CAT)
        _, edited = Engine(backbone).run_one(invert_and_edit(given, request, inversion, editor))
        distances[solver] = float((edited.latents - given.latents).norm())
    assert max(distances[kind] for kind in KINDS) < distances["first_order"] / 4


def test_what_needs_plain_steps_says_so_or_takes_them() -> None:
    (problem,) = DirectEdit().pair_problems(DDIMInversion(solver="fireflow"))
    assert "Leave inversion.solver out" in problem
    optimised = NullTextInversion(num_steps=2, num_inner_steps=0, solver="rf_solver")
    trajectory = Engine(analytic()).run_one(optimised.invert(source(analytic(), 1, CAT)))
    assert trajectory.second_order is None
