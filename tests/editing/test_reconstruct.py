"""No edit: a trajectory is walked back under the inversion's own prediction, whatever a request asks for."""

from __future__ import annotations

import torch

from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.engine import Engine
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.records import EditRequest
from tests.facts import EditorFacts
from tests.methods import invert_and_edit, source, sunglasses_and_hat, tiny_sd

FACTS = EditorFacts(rows=2, rows_after={"ddim": 1, "direct": 1, "negative_prompt": 1, "noise": 1})


def test_replaying_with_a_guided_source_prompt_returns_the_image() -> None:
    given = source(tiny_sd(torch.float64), 1, prompt="a photo of a cat")
    inversion = DDPMInversion(num_steps=6, source_guidance_scale=2.0)
    engine = Engine(tiny_sd(torch.float64), call_size=8)
    _, rebuilt = engine.run_one(invert_and_edit(given, EditRequest(), inversion, Reconstruct()))
    torch.testing.assert_close(rebuilt.latents, given.latents, atol=1e-8, rtol=1e-8)
    assert engine.stats.network_rows == 2 * 12


def test_what_is_asked_for_is_not_read_and_no_region_is_reported() -> None:
    results = []
    for request in (EditRequest(), EditRequest(target_prompt="a dog", negative_prompt="snow"), sunglasses_and_hat()):
        generator = invert_and_edit(source(tiny_sd(), 1, "a cat"), request, DDIMInversion(num_steps=3), Reconstruct())
        engine = Engine(tiny_sd(), call_size=8)
        results.append(engine.run_one(generator)[1])
        assert engine.stats.network_rows == 3 + 3
        assert results[-1].masks.shape[0] == 0
    assert all(torch.equal(one.latents, results[0].latents) for one in results)
