"""`direct_edit`: against algebra where velocities are known, bit for bit where nothing changes, values taken, and
cost."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from pipeline.diffusion.flow_schedule import level_of
from pipeline.editing.direct_edit import VALUES, DirectEdit
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import Denoise, Denoised, Steps
from pipeline.engine.controls import Control, Layers, Route, resolved
from pipeline.engine.engine import Engine
from pipeline.errors import EditError, PrepareError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.inversion.null_text import NullTextInversion
from pipeline.models.families.sd3 import joint_layers
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig
from pipeline.records import EditRequest
from tests.closed_form_flow import SPREAD, ClosedFormFlow
from tests.facts import EditorFacts
from tests.golden.replay import TINY_FLUX, TINY_SD3
from tests.methods import invert_and_edit, source, tiny_sd

FACTS = EditorFacts(rows=2, rows_once=1, quick={"attn_ratio": 0.4})
CAT, DOG = "a cat on a mat", "a dog on a mat"
REQUEST = EditRequest(source_prompt=CAT, target_prompt=DOG)
SAME = EditRequest(source_prompt=CAT, target_prompt=CAT)
SIDE = 4


@cache
def tiny(name: str) -> Any:
    if name == "tiny_sd":
        return tiny_sd()
    folder = {"sd3": TINY_SD3, "flux": TINY_FLUX}[name]
    return load_backbone(ModelConfig(name=str(folder), text_tokens=8), device="cpu")


every_model = pytest.mark.parametrize("name", ["sd3", "flux", "tiny_sd"])


def run(
    backbone: Backbone, editor: DirectEdit, request: EditRequest = REQUEST, call_size: int = 4, **options: Any
) -> tuple[Any, Any, int]:
    """Trajectory, result, and network rows of both."""
    engine = Engine(backbone, call_size=call_size)
    given = source(backbone, 1, CAT, 12 if backbone is tiny_sd() else SIDE)
    inversion = options.pop("inversion", DDIMInversion(num_steps=5))
    trajectory, found = engine.run_one(invert_and_edit(given, request, inversion, editor, **options))
    return trajectory, found, engine.stats.network_rows


def test_the_offset_follows_the_difference_of_known_velocities() -> None:
    """Of Gaussian images v = a x - b mean + ..., and both branches have the same x but for the offset."""
    backbone = ClosedFormFlow(torch.float64)
    trajectory, found, _ = run(backbone, DirectEdit(guidance_scale=3.0, attn_ratio=0.0))
    target, shown = 3.0 * backbone.mean_of(DOG), backbone.mean_of(CAT)
    offset = torch.zeros_like(found.latents)
    for start, end in trajectory.solver.steps:
        sigma = start.noise  # what the network is told; the latents stand at the level below
        total = ((1 - sigma) * SPREAD) ** 2 + sigma**2
        slope = (sigma - (1 - sigma) * SPREAD**2) / total
        shift = (1 - sigma) * slope + 1.0
        offset = offset + (end.noise - sigma) * (slope * offset - shift * (target - shown))
    torch.testing.assert_close(found.latents, trajectory.latents[-1] + offset)
    assert float(offset.abs().max()) > 0.1


@every_model
@pytest.mark.parametrize("attn_ratio", [0.0, 0.5])
@pytest.mark.parametrize("skip_steps", [0, 2])
def test_equal_prompts_return_the_image_bit_for_bit_with_values_taken_or_not(
    name: str, attn_ratio: float, skip_steps: int
) -> None:
    """In calls of one row, or of one group: elsewhere a row's last bits may depend on the size of its call."""
    editor = DirectEdit(guidance_scale=1.0, attn_ratio=attn_ratio)
    inversion = DDIMInversion(num_steps=5, skip_steps=skip_steps)
    trajectory, found, _ = run(tiny(name), editor, SAME, call_size=2, inversion=inversion)
    if attn_ratio == 0.0:
        assert torch.equal(found.latents, trajectory.latents[-1])
    torch.testing.assert_close(found.latents, trajectory.latents[-1], atol=1e-5, rtol=0)
    assert not torch.allclose(run(tiny(name), editor)[1].latents, found.latents, atol=1e-2)


@every_model
def test_values_are_taken_for_a_row_more_in_the_steps_that_take_them(name: str) -> None:
    _, free, rows = run(tiny(name), DirectEdit(attn_ratio=0.0))
    _, taking, more = run(tiny(name), DirectEdit(attn_ratio=0.4))
    assert more == rows + 2
    assert not torch.allclose(taking.latents, free.latents, atol=1e-2)


@pytest.mark.parametrize(("name", "rows"), [("sd3", 99), ("flux", 64)])
def test_the_authors_settings_cost_the_fewest_rows(name: str, rows: int) -> None:
    assert run(tiny(name), DirectEdit(), inversion=DDIMInversion(num_steps=30))[2] == rows


def test_values_are_taken_in_a_share_of_the_whole_schedule() -> None:
    trajectory, _, _ = run(tiny("sd3"), DirectEdit(), inversion=DDIMInversion(num_steps=3, skip_steps=3))
    assert DirectEdit(attn_ratio=0.5).steps_taking_values(trajectory, told=False) == 3
    assert [DirectEdit().steps_taking_values(trajectory, told=told) for told in (False, True)] == [1, 0]


def test_a_mask_keeps_what_is_outside_to_the_bit() -> None:
    half = torch.zeros((SIDE, SIDE))
    half[:, 2:] = 1.0
    trajectory, masked, _ = run(tiny("sd3"), DirectEdit(), user_mask=half)
    assert torch.equal(masked.latents[..., :2], trajectory.latents[-1][..., :2])
    assert not torch.allclose(masked.latents[..., 2:], trajectory.latents[-1][..., 2:], atol=1e-2)
    white = run(tiny("sd3"), DirectEdit(), user_mask=torch.ones((SIDE, SIDE)))[1].latents
    torch.testing.assert_close(white, run(tiny("sd3"), DirectEdit())[1].latents)


def test_layers_that_swap_values_are_those_of_the_authors_code() -> None:
    flux, sd3, unet = (tiny(name).offers.openings for name in ("flux", "sd3", "tiny_sd"))
    assert resolved(VALUES, flux) == {2, 3, 4}  # two blocks of two streams, then three of one
    assert resolved(VALUES, sd3) == {0, 1, 2, 3}
    assert {layer.index for layer in joint_layers(38) if VALUES.picks(layer)} == set(range(37))
    assert resolved(VALUES, unet) == {layer.index for layer in unet.layers}


def asked(name: str, control: Control | None, rows: int) -> Any:
    """Predictions for `rows` different rows of one call."""
    backbone = tiny(name)
    latents = torch.randn((rows, 16, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    told = [backbone.encode_text(prompt) for prompt in (CAT, DOG, "snow")[:rows]]

    def ask() -> Steps[Any]:
        denoised: Denoised = yield Denoise(latents, [level_of(0.6)] * rows, told, control=control)
        return denoised.predictions.data

    return Engine(backbone, call_size=rows).run_one(ask())


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_one_row_takes_values_and_the_others_and_the_next_call_know_nothing_of_it(name: str) -> None:
    before = asked(name, None, 3)
    taking = asked(name, Control((Route(row=2, value=0, layers=VALUES),)), 3)
    assert torch.equal(taking[:2], before[:2])
    assert not torch.allclose(taking[2], before[2], rtol=1e-2)
    assert torch.equal(asked(name, None, 3), before)
    own = asked(name, Control((Route(row=2, value=2, layers=VALUES),)), 3)
    assert torch.equal(own, before)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_other_controls_are_refused_by_joint_attention(name: str) -> None:
    with pytest.raises(EditError, match="lets nothing in but other rows' values"):
        asked(name, Control((Route(row=1, key=0, layers=Layers(kind="joint")),)), 2)


def test_what_cannot_work_is_refused() -> None:
    assert DirectEdit.fits(DDIMInversion)
    assert DirectEdit.fits(DirectInversion)
    assert not DirectEdit.fits(NoiseStart)
    assert not DirectEdit.fits(NullTextInversion)
    assert "Leave them at 1" in next(DirectEdit().pair_problems(DirectInversion(offset_scale=0.5)))
    assert not list(DirectEdit().pair_problems(DirectInversion()))
    (problem,) = DirectEdit().model_problems(ClosedFormFlow.offers)
    assert "Set editing.attn_ratio: 0" in problem
    assert not list(DirectEdit(attn_ratio=0.0).model_problems(ClosedFormFlow.offers))
    with pytest.raises(PrepareError, match="leaves no place for the edit's negative_prompt"):
        run(tiny("flux"), DirectEdit(), REQUEST.model_copy(update={"negative_prompt": "snow"}))
