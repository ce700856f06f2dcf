"""Schedules, steps, guidance and masks against diffusers and against algebra."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from pipeline.diffusion.guidance import classifier_free_guidance, edit_directions, multi_edit_guidance
from pipeline.diffusion.levels import Level, Prediction, prediction_of
from pipeline.diffusion.masks import attention_mask, noise_mask, quantile_of, smooth_attention, strongest_region
from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.diffusion.steps import DDIM, SDEDPMSolver, ddim_move
from pipeline.errors import ModelError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
      "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "sd": SD,
    "linear": {**SD, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "set_alpha_to_one": True},
    "trained": {**SD, "trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
    "trailing": {**SD, "timestep_spacing": "trailing"},
    "linspace": {**SD, "timestep_spacing": "linspace"},
    "v": {**SD, "prediction_type": "v_prediction"},
}


SIZE = (6, 6)  # of latents; these schedules do not depend on it


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("num_steps", [1, 7, 10, 30, 50])
def test_schedule_and_ddim_steps_equal_diffusers(config: dict[str, Any], num_steps: int) -> None:
    theirs = DDIMScheduler(**config)
    theirs.set_timesteps(num_steps)
    schedule = NoiseSchedule.from_config(theirs.config)
    timesteps = schedule.ddim_timesteps(num_steps)
    assert list(timesteps) == theirs.timesteps.tolist()
    assert schedule.alpha_bars == tuple(theirs.alphas_cumprod.tolist())
    solver = DDIM(steps=schedule.steps(num_steps, SIZE), eta=0.5)
    generator = torch.Generator().manual_seed(0)
    latents, output, noise = torch.randn((3, 1, 4, 6, 6), generator=generator)
    for step, timestep in enumerate(timesteps):
        prediction = prediction_of(schedule.prediction_type, output, latents, [schedule.level(timestep)])
        mean, sigma, _ = solver.transition(step, latents[0], prediction[0], None)
        expected = theirs.step(output, timestep, latents, eta=0.5, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean[None] + sigma * noise, expected, atol=2e-5, rtol=2e-5)


def test_a_last_level_that_is_not_stated_is_that_of_timestep_0() -> None:
    stated = {key: value for key, value in SD.items() if key != "set_alpha_to_one"}
    schedule = NoiseSchedule.from_config(stated)
    assert schedule.alpha_bar(-1) == schedule.alpha_bar(0) < 1.0
    assert NoiseSchedule.from_config({**stated, "set_alpha_to_one": True}).alpha_bar(-1) == 1.0


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("num_steps", [10, 20])
def test_dpm_solver_steps_equal_diffusers(final: str, num_steps: int) -> None:
    # Their last step falls back to first order on short schedules unless told not to; ours does so at "zero" alone.
    theirs = DPMSolverMultistepScheduler(
        **{k: v for k, v in SD.items() if k not in ("clip_sample", "set_alpha_to_one")},
        algorithm_type="sde-dpmsolver++", timestep_spacing="leading", final_sigmas_type=final, lower_order_final=False,
    )  # fmt: skip
    theirs.set_timesteps(num_steps)
    schedule = NoiseSchedule.from_config(SD)
    timesteps = schedule.dpm_timesteps(num_steps)
    assert list(timesteps) == theirs.timesteps.tolist()
    solver = SDEDPMSolver.along(schedule.multistep_levels(num_steps, SIZE, to_lowest=final == "sigma_min"))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((1, 4, 6, 6), generator=generator)
    previous = None
    for step, timestep in enumerate(timesteps):
        output, noise = torch.randn((2, 1, 4, 6, 6), generator=generator)
        prediction = prediction_of("epsilon", output, latents, [schedule.level(timestep)])
        mean, sigma, previous = solver.transition(step, latents[0], prediction[0], previous)
        expected = theirs.step(output, timestep, latents, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean[None] + sigma * noise, expected, atol=1e-4, rtol=1e-4)
        latents = expected


def test_a_step_undoes_its_inverse() -> None:
    schedule = NoiseSchedule.from_config(SD)
    solver = DDIM(steps=schedule.steps(10, SIZE))
    generator = torch.Generator().manual_seed(0)
    latents, noise_pred = torch.randn((2, 1, 4, 6, 6), generator=generator, dtype=torch.float64)

    def predicted(at: torch.Tensor, level: Level) -> Prediction:
        return prediction_of("epsilon", noise_pred, at, [level])

    for step in range(10):
        raised = solver.inverse(step, predicted(latents, solver.level_below(step)))
        there = predicted(raised, solver.steps[step].start)
        torch.testing.assert_close(solver.transition(step, raised, there, None).mean, latents)
    low, high = schedule.level(100), schedule.level(900)
    moved = ddim_move(predicted(latents, low), high)
    torch.testing.assert_close(ddim_move(predicted(moved, high), low), latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"prediction_type": "flow"}, "flow"),
        ({"timestep_spacing": "karras"}, "karras"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with prediction_type epsilon"),
        ({"thresholding": True}, "thresholding"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"beta_start": "0.1"}, "beta_start '0.1', which is no number"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0"),
        ({"trained_betas": [0.1, None]}, "trained_betas None"),
    ],
)
def test_a_scheduler_that_cannot_be_followed_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        NoiseSchedule.from_config({**SD, **change})


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps: int) -> None:
    schedule = NoiseSchedule.from_config(SD)
    with pytest.raises(ValueError, match="1 to"):
        schedule.ddim_timesteps(num_steps)
    with pytest.raises(ValueError, match="1 to"):
        schedule.dpm_timesteps(num_steps)


def test_guidance_at_one_is_conditional_and_at_zero_unconditional() -> None:
    halves = torch.randn((4, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    uncond, cond = Prediction(*halves[:2]), Prediction(*halves[2:])
    guided = classifier_free_guidance(uncond, cond, 1.0)
    torch.testing.assert_close(guided.noise, cond.noise)
    torch.testing.assert_close(guided.data, cond.data)
    unguided = classifier_free_guidance(uncond, cond, 0.0)
    assert torch.equal(unguided.noise, uncond.noise)
    assert torch.equal(unguided.data, uncond.data)


def test_guidance_is_untouched_where_every_mask_is_false() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = Prediction(*torch.randn((2, 4, 4, 8, 8), generator=generator))
    uncond = predictions[0]
    directions = edit_directions(uncond, predictions[1:], torch.tensor([3.0, -2.0, 5.0]))
    masks = noise_mask(directions.contrast, torch.tensor([0.9, 0.8, 0.7]))
    guided = multi_edit_guidance(uncond, directions, masks, torch.ones(3))
    outside = ~masks.any(dim=0)
    assert outside.any()
    for ours, plain in ((guided.noise, uncond.noise), (guided.data, uncond.data)):
        assert torch.equal(ours[:, outside], plain[:, outside])
        assert not torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_quantile_has_the_bits_of_torchs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 9, 64, 256, 1000):
        for made in (torch.randn(count, generator=generator), torch.randint(0, 4, (count,), generator=generator)):
            values = made.to(dtype)
            for share in (0.0, 0.1, 0.5, 0.7, 0.81, 0.9, 0.999, 1.0, *torch.rand(20, generator=generator).tolist()):
                assert torch.equal(quantile_of(values, share), torch.quantile(values, torch.tensor(share, dtype=dtype)))
    assert quantile_of(torch.tensor([1.0, torch.nan]), 0.5).isnan()


@pytest.mark.parametrize("threshold", [0.0, 0.33, 0.9, 0.99])
def test_the_strongest_region_is_the_share_above_the_threshold(threshold: float) -> None:
    scores = torch.rand((2, 16, 16), generator=torch.Generator().manual_seed(0))
    region = strongest_region(scores, torch.tensor([threshold, 0.5]))
    assert float(region[0].double().mean()) == pytest.approx(1 - threshold, abs=1 / 256)
    assert scores[0][region[0]].min() >= torch.quantile(scores[0], threshold)
    expected = np.quantile(scores[1].numpy(), 0.5)
    np.testing.assert_array_equal(region[1].numpy(), scores[1].numpy() >= expected)


def test_smoothing_keeps_a_constant_and_the_total_of_an_inner_peak() -> None:
    constant = torch.full((1, 5, 5), 0.3)
    torch.testing.assert_close(smooth_attention(constant), constant)
    peak = torch.zeros((1, 5, 5))
    peak[0, 2, 2] = 1.0
    smooth = smooth_attention(peak)
    assert float(smooth.sum()) == pytest.approx(1.0)
    edge = np.exp(-1.0)
    assert float(smooth[0, 2, 2]) == pytest.approx(1 / (1 + 2 * edge) ** 2)


def test_an_attention_mask_is_made_of_whole_cells() -> None:
    attention = torch.rand((1, 4, 4), generator=torch.Generator().manual_seed(1))
    mask = attention_mask(attention, torch.tensor([0.77]), (16, 16))
    cells = mask.unflatten(1, (4, 4)).unflatten(3, (4, 4))
    assert mask.shape == (1, 16, 16)
    assert torch.equal(cells.any(dim=4).any(dim=2), cells.all(dim=4).all(dim=2))
    assert mask.any()
    assert not mask.all()


def test_shapes_are_checked() -> None:
    with pytest.raises(Exception, match="E"):
        noise_mask(torch.zeros((2, 4, 8, 8)), torch.zeros((3,)))
