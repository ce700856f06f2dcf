"""Levels and predictions: one rule for all that networks put out, down to a level without signal."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from pipeline.diffusion.levels import Level, OutputKind, Prediction, Step, prediction_of
from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.diffusion.steps import DDIM, LastMap, SDEDPMSolver
from tests.closed_form_flow import FlowSchedule

ZERO_SNR = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction", "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}  # fmt: skip
SIZE = (6, 6)
NOISE = Level(0.0, 1.0, 999)


def draws(count: int) -> torch.Tensor:
    return torch.randn((count, 1, 4, *SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def on_sphere(angle: float) -> Level:
    return Level(math.cos(angle), math.sin(angle), 500)


@pytest.mark.parametrize(
    ("kind", "level"),
    [("epsilon", on_sphere(0.4)), ("v_prediction", on_sphere(0.4)), ("velocity", Level(0.7, 0.3, 300.0))],
)
def test_the_true_output_gives_the_true_noise_and_data(kind: OutputKind, level: Level) -> None:
    clean, noise = draws(2)
    output = {
        "epsilon": noise,
        "v_prediction": level.signal * noise - level.noise * clean,
        "velocity": noise - clean,
    }[kind]
    found = prediction_of(kind, output, level.noised(clean, noise), [level])
    torch.testing.assert_close(found.noise, noise)
    torch.testing.assert_close(found.data, clean)


@pytest.mark.parametrize("kind", ["v_prediction", "velocity"])
def test_a_level_without_signal_still_says_what_the_image_is(kind: OutputKind) -> None:
    clean, noise = draws(2)
    output = -clean if kind == "v_prediction" else noise - clean
    found = prediction_of(kind, output, noise, [NOISE])
    torch.testing.assert_close(found.data, clean)
    torch.testing.assert_close(found.noise, noise)


def test_without_signal_two_predictions_differ_in_their_contrast_alone() -> None:
    output, other, noise = draws(3)
    one, two = (prediction_of("v_prediction", v, noise, [NOISE]) for v in (output, other))
    assert not (one - two).noise.any()
    torch.testing.assert_close((one - two).contrast, output - other)


def test_the_zero_snr_schedule_is_diffusers_and_its_steps_too() -> None:
    theirs = DDIMScheduler(**ZERO_SNR)
    schedule = NoiseSchedule.from_config(theirs.config)
    torch.testing.assert_close(torch.tensor(schedule.alpha_bars), theirs.alphas_cumprod, atol=3e-7, rtol=0)
    assert schedule.alpha_bars[-1] == 0.0
    theirs.set_timesteps(10)
    assert list(schedule.ddim_timesteps(10)) == theirs.timesteps.tolist()
    solver = DDIM(steps=schedule.steps(10, SIZE))
    output, latents = draws(2)
    for step, (start, _) in enumerate(solver.steps):
        ours = solver.transition(step, latents[0], prediction_of("v_prediction", output, latents, [start])[0], None)
        expected = theirs.step(output, int(start.timestep), latents, eta=0.0).prev_sample
        torch.testing.assert_close(ours.mean[None], expected, atol=1e-5, rtol=1e-5)


def test_a_multistep_solver_starts_where_there_is_no_signal() -> None:
    """The first step is of the data prediction and fresh noise, the second has no use for the first one's history."""
    levels = [NOISE, on_sphere(1.2), on_sphere(0.8), on_sphere(0.1)]
    solver = SDEDPMSolver.along(levels)
    output, latents, noise = (one[0] for one in draws(3))
    first = solver.transition(0, latents, Prediction(noise, output), None)
    torch.testing.assert_close(first.mean, levels[1].signal * output)
    assert first.sigma == pytest.approx(levels[1].noise)
    with_history = solver.transition(1, latents, Prediction(noise, output), noise)
    without = solver.transition(1, latents, Prediction(noise, output), None)
    assert torch.equal(with_history.mean, without.mean)
    third = solver.transition(2, latents, Prediction(noise, output), noise)
    assert not torch.equal(third.mean, solver.transition(2, latents, Prediction(noise, output), None).mean)


def test_a_ddim_step_of_flow_is_eulers_and_so_is_its_inverse() -> None:
    solver = DDIM(steps=FlowSchedule().steps(5, SIZE))
    velocity, latents = draws(2)
    for step, (start, end) in enumerate(solver.steps):
        down = prediction_of("velocity", velocity, latents, [start])
        stepped = solver.transition(step, latents[0], down[0], None).mean
        torch.testing.assert_close(stepped, (latents + (end.noise - start.noise) * velocity)[0])
        below = solver.level_below(step)
        assert (below.noise, below.timestep) == (end.noise, start.timestep)
        up = prediction_of("velocity", velocity, latents, [below])
        torch.testing.assert_close(solver.inverse(step, up[0]), (latents + (start.noise - end.noise) * velocity)[0])


@pytest.mark.parametrize(("last_map", "sigma"), [("residual", 1.0), ("as others", 0.0), ("none", 0.0)])
def test_a_last_step_to_clean_latents_is_exact_with_a_map_of_what_is_missing(last_map: LastMap, sigma: float) -> None:
    steps = FlowSchedule().steps(4, SIZE)
    predicted = Prediction(*(one[0] for one in draws(2)))
    levels = (steps[0].start, *(step.end for step in steps))
    for solver in (
        DDIM(steps=steps, eta=1.0, last_map=last_map),
        SDEDPMSolver.along(levels, last_map),
    ):
        assert solver.transition(3, predicted.noise, predicted, None).sigma == sigma
        assert 0.0 < solver.transition(2, predicted.noise, predicted, None).sigma < 1.0


def test_fresh_noise_keeps_the_level() -> None:
    """Signal and noise after a step of any eta are those of its end: the noise left and the noise added make it up."""
    for start, end in ((on_sphere(1.0), on_sphere(0.5)), (Level(0.3, 0.7, 700.0), Level(0.6, 0.4, 400.0))):
        for eta in (0.0, 0.4, 1.0):
            solver = DDIM(steps=(Step(start, end), Step(end, on_sphere(0.1))), eta=eta)
            one = torch.ones(1, 1, 1)
            of_noise = solver.transition(0, one, Prediction(one, 0 * one), None)
            assert math.hypot(float(of_noise.mean), of_noise.sigma) == pytest.approx(end.noise)
            assert float(solver.transition(0, one, Prediction(0 * one, one), None).mean) == pytest.approx(end.signal)
