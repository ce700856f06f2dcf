"""Edit-friendly inversion: what replaying returns, noise maps and seeds, skipped steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.engine import Engine
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.records import EditRequest
from tests.facts import InversionFacts
from tests.methods import BACKBONES, analytic, invert_and_edit, network_calls, source, tiny_sd

FACTS = InversionFacts(rows=2, guidance=3.5, guided_by={"source_guidance_scale": 3.5})
every_backbone = pytest.mark.parametrize("backbone", [make() for make in BACKBONES.values()], ids=list(BACKBONES))
SETTINGS = {
    "dpm": {},
    "ddim": {"solver": "ddim"},
    "eta 0.5": {"solver": "ddim", "eta": 0.5},
    "skip": {"solver": "ddim", "skip_steps": 4},
    "few steps": {"num_steps": 2, "skip": 0.9},
}


@every_backbone
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_replaying_the_noise_maps_returns_the_image(backbone: Any, settings: dict[str, Any]) -> None:
    given = source(backbone, 1)
    inversion = DDPMInversion(**{"num_steps": 8, **settings})
    generator = invert_and_edit(given, EditRequest(), inversion, Reconstruct())
    trajectory, rebuilt = Engine(backbone, call_size=8).run_one(generator)
    tolerance = 1e-5 if backbone is analytic() else 2e-4  # a random UNet amplifies the rounding of every step
    torch.testing.assert_close(rebuilt.latents, given.latents, atol=tolerance, rtol=tolerance)
    assert torch.equal(trajectory.latents[-1], given.latents)


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


def test_edit_friendly_predictions_are_asked_for_in_one_go() -> None:
    engine = Engine(analytic(), call_size=32)
    calls = network_calls(engine)
    engine.run_one(DDPMInversion(num_steps=30).invert(source(analytic(), 1)))
    assert len(calls) == 1


def test_settings_that_would_not_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="eta acts with solver: ddim only"):
        DDPMInversion(eta=0.5)
    with pytest.raises(ValueError, match="skip and skip_steps"):
        DDPMInversion(skip=0.2, skip_steps=3)
    with pytest.raises(ValueError, match="greater than 0"):
        DDPMInversion(solver="ddim", eta=0.0)
