"""Inversions: what replaying returns, what is stored, what it costs."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.engine.engine import Engine
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.inversion.noise import NoiseStart
from tests.methods import analytic, source


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
