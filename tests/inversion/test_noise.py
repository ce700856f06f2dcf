"""A start from noise: the image under every level of it, and nothing of the image at the first."""

from __future__ import annotations

import dataclasses

import torch

from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.engine.engine import Engine
from pipeline.inversion.noise import NoiseStart
from pipeline.records import EditRequest
from tests.facts import InversionFacts
from tests.methods import analytic, invert_and_edit, source, tiny_sd

FACTS = InversionFacts(rows=0)


def test_a_start_from_noise_has_the_image_at_the_level_of_every_step() -> None:
    given = source(analytic(), 1)
    trajectory = Engine(analytic()).run_one(NoiseStart(num_steps=4).invert(given))
    noise = source(analytic(), 1).draw_noise()
    assert torch.equal(trajectory.latents[0], noise)
    assert torch.equal(trajectory.latents[-1], given.latents)
    for latents, level in list(zip(trajectory.latents, trajectory.levels, strict=False))[1:]:
        torch.testing.assert_close(latents, level.noised(given.latents, noise))


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
