"""Flow matching's levels: bit for bit those of diffusers' scheduler, at any number of steps and size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from pipeline.diffusion.flow_schedule import FittedShift, FlowSchedule, SizeShift, level_of
from pipeline.diffusion.levels import prediction_of
from pipeline.diffusion.steps import DDIM, ddim_move
from pipeline.errors import ModelError

SIZE = (6, 10)
TOKENS = 15
STEPS = (1, 2, 3, 7, 28, 50, 999)
BY_SIZE: dict[str, Any] = {"use_dynamic_shifting": True, "shift": 3.0}


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"shift": 2.5}, BY_SIZE], ids=str)
def test_levels_to_the_lowest_are_those_of_diffusers_scheduler(config: dict[str, Any], num_steps: int) -> None:
    ours, theirs = FlowSchedule.from_config(config, "to_lowest"), FlowMatchEulerDiscreteScheduler(**config)
    theirs.set_timesteps(num_steps, mu=None if ours.by_size is None else ours.by_size.mu(TOKENS, num_steps))
    assert ours.sigmas(num_steps, SIZE) == theirs.sigmas.tolist()
    assert [step.start.timestep for step in ours.steps(num_steps, SIZE)] == theirs.timesteps.tolist()


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("more", [{}, {"time_shift_type": "linear"}, {"shift_terminal": 0.02}], ids=str)
def test_levels_of_an_even_ramp_are_those_that_diffusers_pipeline_of_flux_asks_for(
    more: dict[str, Any], num_steps: int
) -> None:
    if "shift_terminal" in more and num_steps == 1:
        pytest.skip("diffusers stretches one level to nothing at all")
    ours, theirs = FlowSchedule.from_config(BY_SIZE | more, "even"), FlowMatchEulerDiscreteScheduler(**BY_SIZE, **more)
    assert ours.by_size is not None
    ramp = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
    theirs.set_timesteps(sigmas=ramp, mu=ours.by_size.mu(TOKENS, num_steps))
    assert ours.sigmas(num_steps, SIZE) == theirs.sigmas.tolist()


def test_mu_runs_through_its_two_points_and_beyond() -> None:
    shift = SizeShift()
    assert [shift.mu(tokens, 28) for tokens in (256, 4096)] == pytest.approx([0.5, 1.15])
    assert shift.mu(6144, 28) > 1.15


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("size", [SIZE, (128, 128), (132, 132)], ids=str)  # 15, 4096 and 4356 tokens
def test_levels_of_a_fitted_shift_are_those_that_diffusers_pipeline_of_flux_2_asks_for(
    size: tuple[int, int], num_steps: int
) -> None:
    ours, theirs = FlowSchedule.from_config(BY_SIZE, "even", FittedShift()), FlowMatchEulerDiscreteScheduler(**BY_SIZE)
    ramp = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
    theirs.set_timesteps(sigmas=ramp, mu=compute_empirical_mu(size[0] * size[1] // 4, num_steps))
    assert ours.sigmas(num_steps, size) == theirs.sigmas.tolist()


def test_a_fitted_shift_stands_for_one_by_size_alone() -> None:
    constant = FlowSchedule.from_config({"shift": 3.0}, "even", FittedShift())
    assert constant == FlowSchedule.from_config({"shift": 3.0}, "even")
    assert FittedShift().mu(4300, 10) != FittedShift().mu(4300, 50)
    assert FittedShift().mu(4301, 10) == FittedShift().mu(4301, 50)


def test_a_step_is_eulers_and_its_inverse_undoes_it() -> None:
    solver = DDIM(steps=FlowSchedule.from_config({"shift": 3.0}, "to_lowest").steps(5, SIZE))
    generator = torch.Generator().manual_seed(0)
    latents, velocity = torch.randn((2, 1, 4, 6, 10), generator=generator, dtype=torch.float64)
    for number, (start, end) in enumerate(solver.steps):
        down = solver.transition(number, latents, prediction_of("velocity", velocity, latents, [start]), None).mean
        torch.testing.assert_close(down, latents + (end.noise - start.noise) * velocity)
        told = solver.level_below(number)
        assert told.timestep == start.timestep
        torch.testing.assert_close(solver.inverse(number, prediction_of("velocity", velocity, down, [told])), latents)
    clean = ddim_move(prediction_of("velocity", velocity, latents, [level_of(1.0)]), level_of(0.0))
    torch.testing.assert_close(clean, latents - velocity)


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_steps_that_there_are_not_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match="possible are 1 to 1000"):
        FlowSchedule(ramp="even").steps(num_steps, SIZE)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"_class_name": "DDIMScheduler"}, "scheduler is DDIMScheduler; known for a flow-matching model"),
        ({"stochastic_sampling": True}, "it draws fresh noise at every step"),
        ({"invert_sigmas": True}, "its levels run the other way"),
        ({"num_train_timesteps": 500}, "has num_train_timesteps 500"),
        ({"shift": "3"}, "has shift '3', which is no positive number"),
        ({**BY_SIZE, "base_shift": float("nan")}, "has base_shift nan"),
    ],
)
def test_levels_that_nothing_here_can_follow_are_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        FlowSchedule.from_config(config, "even")
