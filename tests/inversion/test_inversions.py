"""Inversions: what replaying returns, what is stored, what it costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.engine import Engine
from pipeline.errors import PrepareError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.records import EditRequest
from tests.methods import BACKBONES, analytic, invert_and_edit, network_calls, source, tiny_sd

every_backbone = pytest.mark.parametrize("backbone", [make() for make in BACKBONES.values()], ids=list(BACKBONES))
DDPM_SETTINGS = {
    "dpm": {},
    "ddim": {"solver": "ddim"},
    "eta 0.5": {"solver": "ddim", "eta": 0.5},
    "skip": {"solver": "ddim", "skip_steps": 4},
    "few steps": {"num_steps": 2, "skip": 0.9},
}


@every_backbone
@pytest.mark.parametrize("settings", DDPM_SETTINGS.values(), ids=list(DDPM_SETTINGS))
def test_replaying_the_noise_maps_returns_the_image(backbone: Any, settings: dict[str, Any]) -> None:
    given = source(backbone, 1)
    inversion = DDPMInversion(**{"num_steps": 8, **settings})
    generator = invert_and_edit(given, EditRequest(), inversion, Reconstruct())
    trajectory, rebuilt = Engine(backbone, call_size=8).run_one(generator)
    tolerance = 1e-5 if backbone is analytic() else 2e-4  # a random UNet amplifies the rounding of every step
    torch.testing.assert_close(rebuilt.latents, given.latents, atol=tolerance, rtol=tolerance)
    assert torch.equal(trajectory.latents[-1], given.latents)


def test_a_start_from_noise_has_the_image_at_the_level_of_every_step() -> None:
    given = source(analytic(), 1)
    trajectory = Engine(analytic()).run_one(NoiseStart(num_steps=4).invert(given))
    noise = source(analytic(), 1).draw_noise()
    assert torch.equal(trajectory.latents[0], noise)
    assert torch.equal(trajectory.latents[-1], given.latents)
    for latents, level in list(zip(trajectory.latents, trajectory.levels, strict=False))[1:]:
        torch.testing.assert_close(latents, level.noised(given.latents, noise))


def test_replaying_with_a_guided_source_prompt_returns_the_image() -> None:
    given = source(tiny_sd(torch.float64), 1, prompt="a photo of a cat")
    inversion = DDPMInversion(num_steps=6, source_guidance_scale=2.0)
    engine = Engine(tiny_sd(torch.float64), call_size=8)
    _, rebuilt = engine.run_one(invert_and_edit(given, EditRequest(), inversion, Reconstruct()))
    torch.testing.assert_close(rebuilt.latents, given.latents, atol=1e-8, rtol=1e-8)
    assert engine.stats.network_rows == 2 * 12


@every_backbone
def test_noise_maps_follow_the_seed_and_the_reconstruction_does_not(backbone: Any) -> None:
    trajectories = []
    for seed in (1, 2):
        given = source(backbone, 1)
        noise = source(backbone, seed).draw_noise
        seeded = dataclasses.replace(given, prompt="", draw_noise=noise)
        trajectories.append(Engine(backbone, call_size=8).run_one(DDPMInversion(num_steps=6).invert(seeded)))
    one, other = trajectories
    assert not torch.allclose(one.noise_maps, other.noise_maps, atol=0.1)
    assert torch.equal(one.latents[-1], other.latents[-1])


def test_the_skipped_steps_do_not_change_the_noise_of_the_kept_ones() -> None:
    whole = Engine(analytic()).run_one(
        DDPMInversion(solver="ddim", num_steps=10, skip_steps=0).invert(source(analytic(), 1))
    )
    part = Engine(analytic()).run_one(
        DDPMInversion(solver="ddim", num_steps=6, skip_steps=4).invert(source(analytic(), 1))
    )
    assert whole.timesteps[4:] == part.timesteps
    assert torch.equal(whole.latents[4:], part.latents)
    torch.testing.assert_close(whole.noise_maps[4:], part.noise_maps)


@pytest.mark.parametrize(("num_steps", "skip", "total"), [(30, 0.15, 34), (100, 0.15, 114), (75, 0.36, 101)])
def test_the_schedules_length_truncates_as_the_maintained_implementation_does(
    num_steps: int, skip: float, total: int
) -> None:
    assert DDPMInversion(num_steps=num_steps, skip=skip).schedule_steps == total


def test_the_inexact_last_step_returns_the_last_prediction_of_the_image() -> None:
    given = source(tiny_sd(), 1)
    generator = invert_and_edit(given, EditRequest(), DDPMInversion(num_steps=6, exact_last_step=False), Reconstruct())
    trajectory, rebuilt = Engine(tiny_sd(), call_size=8).run_one(generator)
    assert not trajectory.noise_maps[-1].any()
    torch.testing.assert_close(trajectory.latents[-1], trajectory.data_preds[-1])
    assert (rebuilt.latents - given.latents).abs().max() > 0.1


@pytest.mark.parametrize(
    ("inversion", "prompt", "per_step"),
    [
        (DDIMInversion(num_steps=5), "a cat", 1),
        (DDIMInversion(num_steps=5, guidance_scale=0.0), "a cat", 1),
        (DDIMInversion(num_steps=5, guidance_scale=2.0), "a cat", 2),
        (DDIMInversion(num_steps=5, guidance_scale=2.0), "", 1),
        (DDPMInversion(num_steps=5), "", 1),
        (DDPMInversion(num_steps=5), "a cat", 2),
        (NoiseStart(num_steps=5), "a cat", 0),
    ],
)
def test_rows_equal_the_formula(inversion: Any, prompt: str, per_step: int) -> None:
    engine = Engine(analytic())
    trajectory = engine.run_one(inversion.invert(source(analytic(), 1, prompt)))
    assert engine.stats.network_rows == 5 * per_step
    assert trajectory.latents.shape[0] == len(trajectory.timesteps) + 1 == 6
    assert trajectory.method == inversion.method


def test_edit_friendly_predictions_are_asked_for_in_one_go() -> None:
    engine = Engine(analytic(), call_size=32)
    calls = network_calls(engine)
    engine.run_one(DDPMInversion(num_steps=30).invert(source(analytic(), 1)))
    assert len(calls) == 1


def test_ddim_inversion_of_a_smooth_model_returns_the_image() -> None:
    given = source(analytic(), 1, "hat")
    generator = invert_and_edit(given, EditRequest(), DDIMInversion(num_steps=100), Reconstruct())
    _, rebuilt = Engine(analytic()).run_one(generator)
    assert (rebuilt.latents - given.latents).abs().max() < 0.1


def test_text_to_image_from_pure_noise_does_not_look_at_the_image() -> None:
    request = EditRequest(target_prompt="a cat", negative_prompt="snow")
    results = []
    for number in (1, 2):
        given = source(tiny_sd(), number)
        draw = source(tiny_sd(), 5).draw_noise
        seeded = dataclasses.replace(given, prompt="", draw_noise=draw)
        generator = invert_and_edit(seeded, request, NoiseStart(num_steps=4), ClassifierFreeGuidance())
        results.append(Engine(tiny_sd(), call_size=8).run_one(generator)[1].latents)
    assert torch.equal(results[0], results[1])


@every_backbone
def test_more_skipped_steps_stay_closer_to_the_image(backbone: Any) -> None:
    request = EditRequest(target_prompt="a cat")
    distances = []
    for start_step in (0, 6, 9, 10):
        given = source(backbone, 1)
        editor = ClassifierFreeGuidance(start_step=start_step, guidance_scale=1.0)
        generator = invert_and_edit(given, request, NoiseStart(num_steps=10), editor)
        _, edited = Engine(backbone, call_size=8).run_one(generator)
        distances.append(float((edited.latents - given.latents).abs().mean()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0.0


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 1), (0.0, 1), (7.5, 2)])
def test_guidance_of_one_or_zero_takes_one_row_a_step(scale: float, rows: int) -> None:
    engine = Engine(analytic())
    editor = ClassifierFreeGuidance(guidance_scale=scale)
    request = EditRequest(target_prompt="hat")
    engine.run_one(invert_and_edit(source(analytic(), 1), request, NoiseStart(num_steps=5), editor))
    assert engine.stats.network_rows == 5 * rows


def test_cfg_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(PrepareError, match="target_prompt"):
        ClassifierFreeGuidance().check(EditRequest(), DDIMInversion(num_steps=10))
    late = ClassifierFreeGuidance(start_step=10).pair_problems(DDIMInversion(num_steps=10))
    assert "start_step 10 leaves none of the 10 steps" in next(late)
    request, mask = EditRequest(target_prompt="hat"), torch.ones((12, 12))
    generator = invert_and_edit(
        source(analytic(), 1), request, NoiseStart(num_steps=2), ClassifierFreeGuidance(), user_mask=mask
    )
    with pytest.raises(PrepareError, match="cannot keep to a mask"):
        Engine(analytic()).run_one(generator)


def test_settings_that_would_not_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="eta acts with solver: ddim only"):
        DDPMInversion(eta=0.5)
    with pytest.raises(ValueError, match="skip and skip_steps"):
        DDPMInversion(skip=0.2, skip_steps=3)
    with pytest.raises(ValueError, match="greater than 0"):
        DDPMInversion(solver="ddim", eta=0.0)
