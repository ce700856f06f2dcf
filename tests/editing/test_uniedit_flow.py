"""`uniedit_flow`: what its weights are made of, what stays where nothing changes or a mask says so, and its cost."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.levels import Prediction
from pipeline.editing.reconstruct import Reconstruct
from pipeline.editing.uniedit_flow import UniEditFlow
from pipeline.engine.backbone import Backbone, Offers
from pipeline.engine.engine import Engine
from pipeline.errors import PrepareError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.inversion.uni_inv import UniInv
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig
from pipeline.records import EditRequest, InversionPrompts, Placement
from tests.closed_form_flow import ClosedFormFlow
from tests.facts import EditorFacts
from tests.golden.replay import TINY_FLUX
from tests.methods import analytic, invert_and_edit, source, tiny_sd

FACTS = EditorFacts(rows=2, unguided={"inverts": "source"}, finds_region=True)
CAT, DOG = "a cat on a mat", "a dog on a mat"
REQUEST = EditRequest(source_prompt=CAT, target_prompt=DOG)
SIDE = 12


@cache
def tiny_flux() -> Any:
    return load_backbone(ModelConfig(name=str(TINY_FLUX), text_tokens=8), device="cpu")


def run(backbone: Backbone, editor: Any, request: EditRequest = REQUEST, **options: Any) -> tuple[Any, Any, int]:
    """Trajectory, result, and network rows of both."""
    engine = Engine(backbone, call_size=4)
    inversion = options.pop("inversion", UniInv(num_steps=4, skip_steps=2))
    trajectory, found = engine.run_one(invert_and_edit(source(backbone, 1), request, inversion, editor, **options))
    return trajectory, found, engine.stats.network_rows


def strength(difference: Tensor, editor: UniEditFlow, **changes: Any) -> Tensor:
    given = dataclasses.replace(source(tiny_sd(), 1), **changes)
    return editor.strength(Prediction(difference / 2, -difference / 2), given)


def a_difference() -> Tensor:
    return torch.randn((4, SIDE, SIDE), generator=torch.Generator().manual_seed(0))


def test_strengths_run_from_nothing_to_all_and_know_no_factor() -> None:
    difference, editor = a_difference(), UniEditFlow()
    found = strength(difference, editor)
    mean = difference.abs().mean(dim=0)
    assert float(found.flatten()[mean.argmin()]) == 0.0
    assert float(found.flatten()[mean.argmax()]) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(strength(3.0 * difference, editor), found, atol=1e-5, rtol=0)
    assert not strength(torch.zeros_like(difference), editor).any()


def test_absolute_strengths_know_no_sign_and_signed_ones_do() -> None:
    difference = a_difference()
    absolute, signed = UniEditFlow(), UniEditFlow(weight="signed")
    assert torch.equal(strength(difference, absolute), strength(-difference, absolute))
    mean = difference.mean(dim=0)
    least, most = mean.min(), mean.max()
    torch.testing.assert_close(strength(difference, signed), (mean - least) / (most - least), atol=1e-5, rtol=0)
    torch.testing.assert_close(strength(-difference, signed), 1 - strength(difference, signed), atol=1e-5, rtol=0)


def test_a_cell_has_one_strength_also_where_it_is_cut_off() -> None:
    found = strength(a_difference()[..., :11], UniEditFlow(cell=2))
    assert found.shape == (SIDE, 11)
    assert torch.equal(found[::2], found[1::2])
    assert torch.equal(found[:, :10:2], found[:, 1:10:2])
    assert len(found.unique()) > 30


def test_padding_has_no_say_in_the_range() -> None:
    difference = a_difference()
    difference[..., 6:] *= 100.0
    half = Placement(original=(96, 48), crop=(0, 0, 96, 48), scaled=(96, 48), offset=(0, 0), canvas=(96, 96))
    found = strength(difference, UniEditFlow(), placement=half)
    torch.testing.assert_close(found[:, :6], strength(difference[..., :6], UniEditFlow()))
    assert float(found.max()) == 1.0


@pytest.mark.parametrize("backbone", [tiny_flux, tiny_sd, ClosedFormFlow], ids=["flux", "tiny_sd", "flow"])
def test_equal_prompts_walk_back_under_the_source_prompt_bit_for_bit(backbone: Any) -> None:
    request = EditRequest(source_prompt=CAT, target_prompt=CAT)
    trajectory, found, _ = run(backbone(), UniEditFlow(), request)
    under = dataclasses.replace(trajectory, source=dataclasses.replace(trajectory.source, prompt=CAT))
    walked = Engine(backbone(), call_size=4).run_one(Reconstruct().edit(under, request))
    assert torch.equal(found.latents, walked.latents)
    assert not found.mask.any()


def test_more_omega_goes_further_towards_the_target() -> None:
    backbone = ClosedFormFlow(torch.float64)
    towards = backbone.mean_of(DOG) - backbone.mean_of(CAT)
    moved = [float((run(backbone, UniEditFlow(omega=omega))[1].latents * towards).sum()) for omega in (0, 1, 3)]
    assert moved[0] < moved[1] < moved[2]


def test_the_authors_settings_cost_28_rows() -> None:
    assert run(tiny_flux(), UniEditFlow(), inversion=UniInv())[2] == 28


def test_outside_of_a_mask_the_image_stays_to_the_bit_and_a_white_one_changes_nothing() -> None:
    left = torch.zeros((SIDE, SIDE))
    left[:, :6] = 1.0
    trajectory, whole, _ = run(ClosedFormFlow(), UniEditFlow())
    _, white, _ = run(ClosedFormFlow(), UniEditFlow(), user_mask=torch.ones((SIDE, SIDE)))
    _, masked, _ = run(ClosedFormFlow(), UniEditFlow(), user_mask=left)
    torch.testing.assert_close(white.latents, whole.latents)
    assert torch.equal(masked.latents[..., 6:], trajectory.latents[-1][..., 6:])
    assert not torch.allclose(masked.latents[..., :6], trajectory.latents[-1][..., :6], atol=1e-2)


def test_it_goes_with_ddim_too_and_with_nothing_that_does_not_lead_back() -> None:
    assert torch.isfinite(run(analytic(), UniEditFlow(), inversion=DDIMInversion(num_steps=4))[1].latents).all()
    assert UniEditFlow.fits(UniInv)
    assert not UniEditFlow.fits(NoiseStart)


def test_the_image_is_inverted_under_no_prompt_unless_that_is_asked_for() -> None:
    assert UniEditFlow().inverts_under(REQUEST) == InversionPrompts("")
    assert UniEditFlow(inverts="source").inverts_under(REQUEST) == InversionPrompts(CAT)


def test_guidance_is_told_to_a_network_that_takes_it_and_refused_elsewhere() -> None:
    plain, told = (run(tiny_flux(), UniEditFlow(guidance_scale=scale))[1].latents for scale in (None, 2.0))
    assert not torch.allclose(plain, told, rtol=1e-3)
    assert torch.equal(run(tiny_flux(), UniEditFlow(guidance_scale=1.0))[1].latents, plain)
    (problem,) = UniEditFlow(guidance_scale=2.0).model_problems(Offers())
    assert "this model's takes none" in problem
    assert not list(UniEditFlow(guidance_scale=2.0).model_problems(Offers(embedded_guidance=True)))


def test_a_negative_prompt_that_nobody_would_read_is_refused() -> None:
    with pytest.raises(PrepareError, match="reads no negative_prompt"):
        UniEditFlow().check(REQUEST.model_copy(update={"negative_prompt": "snow"}), UniInv())
