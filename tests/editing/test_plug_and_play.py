"""Plug-and-Play: what is injected where, what is not, and what it costs."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest
import torch

from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.plug_and_play import DECODER, FEATURES, PlugAndPlay, injection, resampled
from pipeline.engine.calls import Denoise
from pipeline.engine.controls import ResidualBlock, Route, TakeFeatures, resolved
from pipeline.engine.engine import Engine
from pipeline.errors import PrepareError, RecipeError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.looking.counting import RowCounter
from pipeline.models.unet import openings_of
from pipeline.recipe import recipe_from
from pipeline.records import EditRequest
from tests.facts import EditorFacts
from tests.methods import analytic, invert_and_edit, source, tiny_sd

FACTS = EditorFacts(
    rows=4,
    rows_after={"direct": 3},
    unguided={"feature_steps": 0.0, "attention_steps": 0.0},  # it reads the source under the empty prompt
)
N = 5
DOG = EditRequest(source_prompt="a photo of a cat", target_prompt="a photo of a dog")


def run(backbone: Any, inversion: Any, editor: PlugAndPlay, request: EditRequest = DOG, **options: Any) -> Any:
    generator = invert_and_edit(source(backbone, 1, request.source_prompt), request, inversion, editor, **options)
    return Engine(backbone, call_size=8).run_one(generator)


@pytest.mark.parametrize(
    ("inversion", "settings", "rows"),
    [
        ("direct", {}, 4 * 3 + 2),  # features in 4 of 5 steps, attention in 2
        ("direct", {"guidance_scale": 1.0}, 4 * 2 + 1),
        ("direct", {"feature_steps": 0.0, "attention_steps": 0.0}, N * 2),
        ("direct", {"feature_steps": 1.0}, N * 3),
        ("ddim", {}, 3 + 4 * 3 + 2),  # latents of 4 levels, the first of which is where the walk starts
        ("ddim", {"compat_shift": True}, 4 + 4 * 3 + 2),
        ("ddim", {"feature_steps": 0.0, "attention_steps": 0.0}, N * 2),
    ],
)
def test_rows_are_those_of_the_windows_and_a_plan_counts_the_same(
    inversion: str, settings: dict[str, Any], rows: int
) -> None:
    sections = {
        "source": {"shards": "-"},
        "sink": {"folder": "-"},
        "inversion": {"method": inversion, "num_steps": N},
        "editing": {"method": "plug_and_play", **settings},
    }
    recipe = recipe_from(sections)
    engine = Engine(analytic(), call_size=8)
    generator = invert_and_edit(source(analytic(), 1, DOG.source_prompt), DOG, recipe.inversion, recipe.editing)
    engine.run_one(generator)
    assert engine.stats.network_rows == N + rows
    assert RowCounter(recipe).rows({"edit": DOG}) == N + rows


def test_without_windows_it_is_plain_guided_sampling() -> None:
    off = PlugAndPlay(feature_steps=0.0, attention_steps=0.0)
    plain = DOG.model_copy(update={"negative_prompt": off.negative_prompt})
    _, edited = run(tiny_sd(), DirectInversion(num_steps=N), off)
    generator = invert_and_edit(
        source(tiny_sd(), 1, DOG.source_prompt), plain, DirectInversion(num_steps=N), ClassifierFreeGuidance()
    )
    _, sampled = Engine(tiny_sd(), call_size=8).run_one(generator)
    assert torch.equal(edited.latents, sampled.latents)


@pytest.mark.parametrize("window", ["feature_steps", "attention_steps"])
def test_each_window_changes_the_edit(window: str) -> None:
    off = {"feature_steps": 0.0, "attention_steps": 0.0}
    inversion = DirectInversion(num_steps=2)
    plain = run(tiny_sd(), inversion, PlugAndPlay(**off))[1]
    injected = run(tiny_sd(), inversion, PlugAndPlay(**{**off, window: 0.5}), observe=True)[1]
    assert not torch.allclose(plain.latents, injected.latents, atol=1e-3)


def test_a_target_that_says_what_the_source_says_follows_it() -> None:
    backbone = tiny_sd(torch.float64)
    editor = PlugAndPlay(guidance_scale=1.0, feature_steps=1.0, attention_steps=1.0)
    _, edited = run(backbone, DDIMInversion(num_steps=3), editor, EditRequest(), observe=True)
    for record in edited.history:
        torch.testing.assert_close(record.latents, record.source_latents, atol=1e-6, rtol=1e-6)


def test_the_pinned_source_is_the_trajectory_whatever_is_predicted_for_it() -> None:
    trajectory, edited = run(tiny_sd(), DirectInversion(num_steps=N), PlugAndPlay(), observe=True)
    assert torch.equal(torch.stack([record.source_latents for record in edited.history]), trajectory.latents[1:])


def test_the_source_row_has_the_empty_prompt_and_the_targets_the_edits_own() -> None:
    trajectory = Engine(analytic()).run_one(
        DirectInversion(num_steps=N).invert(source(analytic(), 1, DOG.source_prompt))
    )
    generator = PlugAndPlay().edit(trajectory, DOG)
    prompts = next(generator).prompts
    call = generator.send([analytic().encode_text(prompt) for prompt in prompts])
    assert isinstance(call, Denoise)
    assert [row.prompt for row in call.conditioning] == ["", PlugAndPlay().negative_prompt, DOG.target_prompt]
    own = PlugAndPlay().edit(trajectory, DOG.model_copy(update={"negative_prompt": "snow"}))
    assert "snow" in next(own).prompts


def test_resampling_returns_the_levels_that_are_read_and_leaves_the_others() -> None:
    engine = Engine(analytic())
    trajectory = engine.run_one(DDIMInversion(num_steps=N).invert(source(analytic(), 1, DOG.source_prompt)))
    walked = engine.run_one(resampled(trajectory, N, shift=False)).latents
    part = engine.run_one(resampled(trajectory, 2, shift=False))
    assert part.pinned
    assert torch.equal(part.latents[:3], walked[:3])
    assert torch.equal(part.latents[3:], trajectory.latents[3:])
    assert not torch.equal(walked[-1], trajectory.latents[-1])  # what inversion and sampling disagree by
    shifted = engine.run_one(resampled(trajectory, N, shift=True)).latents
    assert torch.equal(shifted[:-1], walked[1:])


def test_an_image_has_the_same_bits_alone_and_beside_neighbours() -> None:
    alone = run(tiny_sd(), DDIMInversion(num_steps=2), PlugAndPlay())[1].latents
    edits = [
        invert_and_edit(source(tiny_sd(), number, prompt), DOG, inversion, PlugAndPlay(guidance_scale=scale))
        for number, prompt, inversion, scale in (
            (2, "snow", DirectInversion(num_steps=3), 1.0),
            (1, DOG.source_prompt, DDIMInversion(num_steps=2), 7.5),
            (3, "", DirectInversion(num_steps=2), 7.5),
        )
    ]
    results = {finished.index: finished.value for finished in Engine(tiny_sd(), call_size=8).run(edits)}
    assert torch.equal(results[1][1].latents, alone)


def test_outside_of_a_users_mask_the_image_stays() -> None:
    mask = torch.zeros((12, 12))
    mask[:, :6] = 1.0
    trajectory, edited = run(tiny_sd(), DirectInversion(num_steps=2), PlugAndPlay(), user_mask=mask)
    assert torch.equal(edited.latents[:, :, 6:], trajectory.latents[-1][:, :, 6:])
    assert not torch.equal(edited.latents[:, :, :6], trajectory.latents[-1][:, :, :6])


def test_in_stable_diffusion_it_acts_on_the_layers_and_the_block_of_the_paper() -> None:
    openings = tiny_sd().offers.openings
    assert resolved(DECODER, openings) == frozenset(range(8, 16))
    (block,) = [block for block in openings.residuals if FEATURES.picks(block)]
    assert block == ResidualBlock(index=1, index_in_block=1, factor=4)


def test_it_acts_in_a_smaller_unet_too() -> None:
    from diffusers import UNet2DConditionModel

    config = json.loads((files("pipeline.models.demo") / "weights" / "unet" / "config.json").read_text())
    openings = openings_of(UNet2DConditionModel.from_config(config))
    decoder = [layer for layer in openings.layers if layer.place == "up"]
    assert [layer for layer in decoder if DECODER.picks(layer)] == decoder[1:]
    assert len([block for block in openings.residuals if FEATURES.picks(block)]) == 1


def test_every_row_but_the_source_takes_what_the_windows_say() -> None:
    def kinds(**windows: bool) -> list[tuple[str, int]]:
        return [(type(part).__name__, part.row) for part in injection(1, 3, **windows).parts]

    assert kinds(features=True, attention=False) == [("TakeFeatures", 0), ("TakeFeatures", 2)]
    assert kinds(features=False, attention=True) == [("Route", 0), ("Route", 2)]
    for part in injection(1, 3, features=True, attention=True).parts:
        if isinstance(part, Route):
            assert (part.query, part.key, part.value, part.layers) == (1, 1, None, DECODER)
        else:
            assert isinstance(part, TakeFeatures)
            assert (part.source, part.blocks) == (1, FEATURES)


def test_bad_input_is_refused() -> None:
    with pytest.raises(PrepareError, match="target_prompt"):
        PlugAndPlay().check(EditRequest(source_prompt="a cat"), DDIMInversion(num_steps=N))
    sections = {
        "source": {"shards": "-"},
        "sink": {"folder": "-"},
        "editing": {"method": "plug_and_play", "compat_shift": True},
    }
    with pytest.raises(RecipeError, match="compat_shift shifts the source that is resampled"):
        recipe_from({**sections, "inversion": {"method": "direct"}})
    with pytest.raises(RecipeError, match="works with: ddim, direct"):
        recipe_from({**sections, "inversion": {"method": "null_text"}})
