"""Classifier-free guidance: how far from the image, at which cost, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.engine.engine import Engine
from pipeline.errors import PrepareError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.records import EditRequest
from tests.facts import EditorFacts
from tests.methods import BACKBONES, analytic, invert_and_edit, source

FACTS = EditorFacts(rows=2)
every_backbone = pytest.mark.parametrize("backbone", [make() for make in BACKBONES.values()], ids=list(BACKBONES))


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
