"""ProxMasaCtrl: what it leaves of an edit, and how its source is walked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.editing.masactrl import MasaCtrl
from pipeline.editing.prox_masactrl import ProxMasaCtrl
from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.engine import Engine
from pipeline.errors import RecipeError
from pipeline.inversion.direct import DirectInversion
from pipeline.inversion.negative_prompt import NegativePromptInversion
from pipeline.recipe import recipe_from
from pipeline.records import EditedLatents, EditRequest, Trajectory
from tests.facts import EditorFacts
from tests.methods import BACKBONES, analytic, invert_and_edit, source, tiny_sd

FACTS = EditorFacts(rows=4, rows_after={"negative_prompt": 3}, quick={"start_step": 1}, unguided={"prox": "none"})
N = 4
CAT, DOG = "a photo of a cat on grass", "a photo of a dog on grass"
NPI = NegativePromptInversion(num_steps=N)
HUGE = -50.0  # as a quantile: a fixed threshold that nothing exceeds
every_backbone = pytest.mark.parametrize(
    "backbone", [make(torch.float64) for make in BACKBONES.values()], ids=list(BACKBONES)
)


def edit(
    editor: Any, backbone: Any = None, target: str = DOG, inversion: Any = NPI
) -> tuple[Trajectory, EditedLatents, int]:
    backbone = tiny_sd(torch.float64) if backbone is None else backbone
    engine = Engine(backbone, call_size=8)
    generator = invert_and_edit(
        source(backbone, 1, CAT), EditRequest(target_prompt=target), inversion, editor, observe=True
    )
    trajectory, edited = engine.run_one(generator)
    return trajectory, edited, engine.stats.network_rows


def test_prox_masactrl_walks_the_source_unguided_and_at_three_rows() -> None:
    _, rebuilt, _ = edit(Reconstruct())
    _, edited, rows = edit(ProxMasaCtrl(start_step=1))
    torch.testing.assert_close(edited.history[-1].source_latents, rebuilt.latents, atol=1e-8, rtol=1e-8)
    assert rows == N + 3 * N


@pytest.mark.parametrize("inject", ["src", "joint", "none"])
def test_prox_masactrl_without_a_direction_returns_the_source(inject: Any) -> None:
    editor = ProxMasaCtrl(quantile=HUGE, start_step=0, start_layer=0, inject_cond=inject, inject_uncond=inject)
    _, edited, _ = edit(editor, tiny_sd(torch.float64))
    torch.testing.assert_close(edited.latents, edited.history[-1].source_latents, atol=1e-6, rtol=1e-6)


def test_prox_masactrl_without_threshold_after_a_pinned_source_is_masactrl() -> None:
    settings: dict[str, Any] = {"guidance_scale": 2.0, "start_step": 1}
    _, plain, _ = edit(MasaCtrl(**settings), inversion=DirectInversion(num_steps=N))
    _, ours, _ = edit(ProxMasaCtrl(**settings, quantile=0.0), inversion=DirectInversion(num_steps=N))
    assert torch.equal(ours.latents, plain.latents)
    _, late, _ = edit(ProxMasaCtrl(**settings, prox_step=N), inversion=DirectInversion(num_steps=N))
    assert torch.equal(late.latents, plain.latents)


def test_prox_masactrl_injects_into_the_halves_separately() -> None:
    base: dict[str, Any] = {"guidance_scale": 2.0, "start_step": 0, "quantile": 0.0}
    inverted = NegativePromptInversion(num_steps=N, npi_interp=1.0)
    results = [
        edit(ProxMasaCtrl(**base, inject_cond=cond, inject_uncond=uncond), inversion=inverted)[1].latents
        for cond, uncond in (("src", "src"), ("none", "src"), ("src", "none"), ("joint", "src"), ("none", "none"))
    ]
    for at, one in enumerate(results):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in results[:at])


def test_prox_masactrl_with_an_inversion_that_lacks_what_it_needs_is_refused_by_the_recipe() -> None:
    recipe: dict[str, Any] = {
        "source": {"shards": "data/*.tar"},
        "edits": {"target_prompt": DOG},
        "inversion": {"method": "ddim"},
        "editing": {"method": "prox_masactrl"},
        "sink": {"folder": "out"},
    }
    with pytest.raises(RecipeError, match="It works with: direct, negative_prompt"):
        recipe_from(recipe)
    recipe["inversion"] = {"method": "direct"}
    recipe["editing"]["npi_step"] = 2
    with pytest.raises(RecipeError, match="npi_step is 2"):
        recipe_from(recipe)
    del recipe["editing"]["npi_step"]
    recipe_from(recipe)


def test_the_first_steps_may_take_the_empty_prompt() -> None:
    base: dict[str, Any] = {"guidance_scale": 2.0, "start_step": N, "quantile": 0.0}
    _, always, _ = edit(ProxMasaCtrl(**base, npi_step=N), analytic())
    _, interpolated, _ = edit(
        ProxMasaCtrl(**base), analytic(), inversion=NegativePromptInversion(num_steps=N, npi_interp=1.0)
    )
    _, never, _ = edit(ProxMasaCtrl(**base), analytic())
    torch.testing.assert_close(always.latents, interpolated.latents)
    assert not torch.allclose(always.latents, never.latents, atol=1e-2)
