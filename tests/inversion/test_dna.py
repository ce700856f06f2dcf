"""`dna`: where it predicts, what it records for `direct_edit`, and what that makes of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pipeline.editing import EDITORS
from pipeline.editing.direct_edit import DirectEdit
from pipeline.engine.backbone import Backbone
from pipeline.engine.engine import Engine
from pipeline.inversion.dna import DNAInversion
from pipeline.inversion.uni_inv import UniInv
from pipeline.records import EditRequest, Trajectory
from tests.closed_form_flow import ClosedFormFlow
from tests.facts import InversionFacts
from tests.methods import invert_and_edit, network_calls, source, tiny_sd

FACTS = InversionFacts(rows=1, quick={"skip_steps": 0})
CAT, DOG = "a cat on a mat", "a dog on a mat"
BACKBONES: dict[str, Any] = {"flow": lambda: ClosedFormFlow(torch.float64), "vp": lambda: tiny_sd(torch.float64)}


def inverted(backbone: Backbone, inversion: DNAInversion) -> tuple[Trajectory, list[Any]]:
    engine = Engine(backbone, call_size=1)
    calls = network_calls(engine)
    trajectory: Trajectory = engine.run_one(inversion.invert(source(backbone, 1, CAT)))
    return trajectory, calls


@pytest.mark.parametrize("name", BACKBONES)
def test_it_looks_towards_the_noise_once_and_then_along_its_own_predictions(name: str) -> None:
    backbone = BACKBONES[name]()
    trajectory, calls = inverted(backbone, DNAInversion(num_steps=4, skip_steps=1))
    assert trajectory.velocities is not None
    assert trajectory.predicted_at is not None
    given = source(backbone, 1, CAT)
    at, velocity = given.latents / trajectory.solver.steps[-1].end.scale, None
    noise = given.draw_noise()
    for number, call in enumerate(calls):
        step = 3 - number
        start, end = trajectory.solver.steps[step]
        up = start.share - end.share
        ahead = at + up * velocity if velocity is not None else at + up / (1 - end.share) * (noise - at)
        torch.testing.assert_close(call.latents[0], start.scale * ahead)
        assert torch.equal(call.latents[0], trajectory.predicted_at[step])
        assert call.levels[0] == start
        velocity = trajectory.velocities[step]
        at = at + up * velocity
        torch.testing.assert_close(trajectory.latents[step], start.scale * at)


def test_after_its_first_step_it_is_uni_inv() -> None:
    """Where the random noise is the one that lies along the prediction at the image."""
    backbone = ClosedFormFlow(torch.float64)
    looked = Engine(backbone).run_one(UniInv(num_steps=4, skip_steps=1).invert(source(backbone, 1, CAT)))
    engine = Engine(backbone)
    calls = network_calls(engine)
    engine.run_one(UniInv(num_steps=4, skip_steps=1).invert(source(backbone, 1, CAT)))
    given = source(backbone, 1, CAT)
    end, first = looked.solver.steps[-1].end, looked.solver.steps[-1].start
    towards = (calls[1].latents[0] - given.latents) / (first.share - end.share)
    aimed = dataclasses.replace(given, draw_noise=lambda: given.latents + towards)
    ours = Engine(backbone).run_one(DNAInversion(num_steps=4, skip_steps=1).invert(aimed))
    torch.testing.assert_close(ours.latents, looked.latents)


@pytest.mark.parametrize("name", BACKBONES)
def test_equal_prompts_return_the_image_bit_for_bit_and_a_target_does_not(name: str) -> None:
    backbone = BACKBONES[name]()
    editor = DirectEdit(guidance_scale=1.0, attn_ratio=0.0)
    results = {}
    for prompt in (CAT, DOG):
        request = EditRequest(source_prompt=CAT, target_prompt=prompt)
        found = invert_and_edit(source(backbone, 1, CAT), request, DNAInversion(num_steps=4, skip_steps=1), editor)
        _, results[prompt] = Engine(backbone, call_size=1).run_one(found)
    assert torch.equal(results[CAT].latents, source(backbone, 1, CAT).latents)
    assert float((results[DOG].latents - results[CAT].latents).abs().max()) > 1e-2


def test_the_target_share_draws_towards_the_image_that_moved_along() -> None:
    """The authors' loop, in states instead of offsets."""
    backbone = ClosedFormFlow(torch.float64)
    request = EditRequest(source_prompt=CAT, target_prompt=DOG)
    editor = DirectEdit(guidance_scale=3.0, attn_ratio=0.0, target_share=0.8)
    engine = Engine(backbone, call_size=2)
    calls = network_calls(engine)
    found = invert_and_edit(source(backbone, 1, CAT), request, DNAInversion(num_steps=4, skip_steps=1), editor)
    trajectory, result = engine.run_one(found)
    state, reference = trajectory.latents[0], trajectory.latents[-1]
    for step, (start, end) in enumerate(trajectory.solver.steps):
        shift = trajectory.predicted_at[step] - trajectory.latents[step]
        asked = calls[4 + step].latents[0]
        torch.testing.assert_close(asked, state + shift)
        cond, empty = (backbone.encode_text(prompt) for prompt in (DOG, ""))
        predictions = backbone.denoise(
            dataclasses.replace(calls[4 + step], conditioning=[empty, cond], latents=torch.stack([asked, asked]))
        ).predictions
        velocity = (predictions[0] + (predictions[1] - predictions[0]) * 3.0).velocity
        down = end.share - start.share
        reference = reference + down * (velocity - trajectory.velocities[step])
        state = state + down * (0.8 * velocity + 0.2 * (state - reference) / start.share)
    torch.testing.assert_close(result.latents, state)


def test_only_an_editor_that_displaces_its_target_goes_with_it() -> None:
    assert [name for name, editor in EDITORS.items() if editor.fits(DNAInversion)] == ["direct_edit"]


def test_a_schedule_of_too_many_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="make a schedule of 1013 steps"):
        DNAInversion(num_steps=1000)
