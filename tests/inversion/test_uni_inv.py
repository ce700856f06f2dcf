"""`uni_inv`: where it predicts, what that costs, and that it comes back closer than DDIM inversion does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import prediction_of
from pipeline.diffusion.steps import along
from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import NetworkAnswer, NetworkCall
from pipeline.engine.engine import Engine
from pipeline.inversion.base import Inversion
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.uni_inv import UniInv
from pipeline.records import EditRequest, Trajectory
from tests.closed_form_flow import ClosedFormFlow
from tests.facts import InversionFacts
from tests.methods import analytic, invert_and_edit, network_calls, source, tiny_sd

FACTS = InversionFacts(rows=2, quick={"skip_steps": 0})
PROMPT = "a cat"


def round_trip(backbone: Backbone, inversion: Inversion) -> tuple[Trajectory, float]:
    """The trajectory, and how far off the image is that walking it back gives."""
    given = source(backbone, 1, PROMPT)
    found = invert_and_edit(given, EditRequest(source_prompt=PROMPT), inversion, Reconstruct())
    trajectory, back = Engine(backbone, call_size=4).run_one(found)
    return trajectory, float((back.latents - given.latents).norm() / given.latents.norm())


class Drift(ClosedFormFlow):
    """A velocity of the level alone."""

    @override
    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        told = torch.tensor([level.timestep for level in call.levels], dtype=self.dtype)
        velocity = (1.0 + told / 500.0)[:, None, None, None].expand_as(call.latents)
        return NetworkAnswer(prediction_of("velocity", velocity, call.latents, call.levels))


@pytest.mark.parametrize("first_look", [True, False])
def test_a_velocity_that_latents_do_not_change_brings_the_image_back(first_look: bool) -> None:
    _, error = round_trip(Drift(torch.float64), UniInv(num_steps=4, skip_steps=2, first_look=first_look))
    assert error < 1e-12


@pytest.mark.parametrize("backbone", [ClosedFormFlow(torch.float64), analytic(torch.float64)], ids=["flow", "vp"])
def test_it_comes_back_closer_than_ddim_inversion(backbone: Backbone) -> None:
    trajectory, ours = round_trip(backbone, UniInv(num_steps=9, skip_steps=1))
    others, theirs = round_trip(backbone, DDIMInversion(num_steps=9, skip_steps=1))
    assert trajectory.levels == others.levels
    assert trajectory.skipped_steps == others.skipped_steps == 1
    assert trajectory.level_above == others.level_above
    assert ours < theirs / 1.5


@pytest.mark.parametrize(("first_look", "rows"), [(True, 10), (False, 9)])
def test_it_costs_one_row_per_step_and_one_for_the_first_look(first_look: bool, rows: int) -> None:
    engine = Engine(ClosedFormFlow(), call_size=4)
    engine.run_one(UniInv(first_look=first_look).invert(source(ClosedFormFlow(), 1)))
    assert engine.stats.network_rows == rows


@pytest.mark.parametrize("make", [tiny_sd, ClosedFormFlow], ids=["tiny_sd", "flow"])
def test_each_prediction_is_asked_for_at_the_level_that_its_step_leads_to(make: Any) -> None:
    backbone = make()
    engine = Engine(backbone, call_size=1)
    calls = network_calls(engine)
    trajectory = engine.run_one(UniInv(num_steps=3, skip_steps=1).invert(source(backbone, 1, PROMPT)))
    told = [call.levels[0].timestep for call in calls]
    assert told == [0.0, *trajectory.timesteps[::-1]]
    assert torch.equal(calls[0].latents[0], trajectory.latents[-1])
    for number, call in enumerate(calls[1:]):
        assert call.levels[0][:2] == trajectory.levels[-1 - number][:2]
        assert not torch.equal(call.latents[0], trajectory.latents[-1 - number])  # it looks ahead


def test_a_step_up_is_undone_by_its_own_prediction_in_either_frame() -> None:
    latents, output = torch.randn((2, 4, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for backbone, kind in ((ClosedFormFlow(), "velocity"), (tiny_sd(), "epsilon")):
        for start, end in backbone.schedule.steps(4, (6, 6))[1:]:

            def moved(at: Tensor, low: Any, high: Any, kind: Any = kind) -> Tensor:
                return along(at, prediction_of(kind, output[None], latents[None], [high])[0], low, high)

            there = moved(latents, end, start)
            back = along(there, prediction_of(kind, output[None], latents[None], [start])[0], start, end)
            torch.testing.assert_close(back, latents)
            if kind == "velocity":
                torch.testing.assert_close(there, latents + (start.noise - end.noise) * output)


def test_a_schedule_of_too_many_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="make a schedule of 1006 steps"):
        UniInv(num_steps=1000)
