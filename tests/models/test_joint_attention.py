"""Joint attention that is watched: by which formula, and that a call leaves nothing behind."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_flux2
from torch import Tensor

from pipeline.diffusion.flow_schedule import level_of
from pipeline.engine.calls import Denoise, Steps
from pipeline.engine.controls import Control, Layers, Route
from pipeline.engine.engine import Engine
from pipeline.models.joint_attention import attended
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig
from tests.golden.replay import TINY_FLUX, TINY_SD3

PROMPTS = ("a cat on a mat", "a dog with a hat", "snow")


@cache
def tiny(folder: Path) -> Any:
    return load_backbone(ModelConfig(name=str(folder), text_tokens=16), device="cpu")


@pytest.fixture(params=["sd3", "flux", "klein"])
def backbone(request: pytest.FixtureRequest) -> Any:
    folder = {"sd3": TINY_SD3, "flux": TINY_FLUX}.get(request.param)
    return tiny(folder or request.getfixturevalue("tiny_klein"))


def asked(
    backbone: Any,
    watched: list[list[int]] | None,
    rows: int = 3,
    call_size: int = 3,
    control: Control | None = None,
) -> Any:
    latents = torch.randn((rows, backbone.latent_channels, 6, 8), generator=torch.Generator().manual_seed(0))
    told = [backbone.encode_text(prompt) for prompt in PROMPTS[:rows]]

    def ask() -> Steps[Any]:
        return (yield Denoise(latents, [level_of(0.6)] * rows, told, watch=watched, control=control))

    return Engine(backbone, call_size=call_size).run_one(ask())


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("sums", [1, 3, 9])  # more than a head is wide, too
def test_sums_of_attention_are_those_of_its_explicit_map(text_first: bool, sums: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key, weights = drawn(2, 3, 6, 4), drawn(2, 3, 11, 4), drawn(2, sums, 5)
    probabilities = (query @ key.mT / 2.0).softmax(dim=-1)
    text = probabilities[..., :5] if text_first else probabilities[..., 6:]
    expected = torch.einsum("rhnl,rsl->rsn", text, weights) / 3
    torch.testing.assert_close(attended(query, key, weights, text_first=text_first), expected)
    there = torch.tensor([[True, True, True, False, False], [True] * 5])
    scores = query @ key.mT / 2.0
    scores[0, :, :, slice(3, 5) if text_first else slice(9, 11)] = float("-inf")
    text = scores.softmax(dim=-1)[..., :5] if text_first else scores.softmax(dim=-1)[..., 6:]
    expected = torch.einsum("rhnl,rsl->rsn", text, weights) / 3
    torch.testing.assert_close(attended(query, key, weights, text_first=text_first, there=there), expected)


def test_watching_changes_no_prediction_and_leaves_nothing_behind(backbone: Any) -> None:
    before = asked(backbone, None)
    places = [list(backbone.encode_text(prompt).positions) for prompt in PROMPTS]
    seen = asked(backbone, places)
    after = asked(backbone, None)
    assert torch.equal(seen.predictions.noise, before.predictions.noise)
    assert torch.equal(after.predictions.noise, before.predictions.noise)
    assert after.attention is None
    assert seen.attention.shape == (3, 3, 4)  # half the latents' side
    assert bool((seen.attention > 0).all())
    assert bool((seen.attention < 1).all())


def test_a_row_that_watches_nothing_sees_nothing_and_others_have_their_own_bits(backbone: Any) -> None:
    places = [list(backbone.encode_text(prompt).positions) for prompt in PROMPTS]
    together = asked(backbone, [places[0], [], places[2]]).attention
    assert not together[1].any()
    alone = asked(backbone, [places[0]], rows=1).attention
    assert torch.equal(alone[0], together[0])


def test_all_of_the_text_and_all_of_the_image_make_one() -> None:
    """The softmax is over all keys: what is not attended to of the text is attended to of the image."""
    backbone = tiny(TINY_FLUX)
    length = backbone.encode_text("").length
    everything = asked(backbone, [[*range(length)]], rows=1).attention
    halves = [asked(backbone, [[*half]], rows=1).attention for half in (range(8), range(8, length))]
    torch.testing.assert_close(halves[0] + halves[1], everything)
    assert float(everything.max()) < 1.0


def test_what_is_watched_in_both_kinds_of_flux_2s_blocks_is_what_they_computed(
    tiny_klein: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = copy.copy(tiny(tiny_klein))
    openings = backbone.offers.openings
    every_layer = frozenset(layer.index for layer in openings.joint)
    backbone.offers = dataclasses.replace(backbone.offers, openings=dataclasses.replace(openings, watched=every_layer))
    genuine = transformer_flux2.dispatch_attention_fn
    maps: list[Tensor] = []

    def spying(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        scores = torch.einsum("rnhd,rmhd->rhnm", query, key) / query.shape[-1] ** 0.5
        maps.append(scores.softmax(dim=-1).mean(dim=1))  # (R, places, keys)
        answer: Tensor = genuine(query, key, value, **options)
        return answer

    monkeypatch.setattr(transformer_flux2, "dispatch_attention_fn", spying)
    words = [list(backbone.encode_text(prompt).positions) for prompt in PROMPTS]
    seen = asked(backbone, words)
    assert len(maps) == len(every_layer) == 5
    mean, num_text = torch.stack(maps).mean(dim=0), backbone.encode_text("").length
    expected = torch.stack([mean[row, num_text:, places].sum(dim=-1) for row, places in enumerate(words)])
    torch.testing.assert_close(seen.attention, expected.unflatten(-1, (3, 4)))


def test_of_what_one_module_makes_of_a_row_the_values_alone_are_taken_from_another(tiny_klein: Path) -> None:
    backbone = tiny(tiny_klein)
    attention = backbone.velocity.transformer.single_transformer_blocks[1].attn
    module, width = attention.to_qkv_mlp_proj, attention.inner_dim
    made: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda one, given, output: made.append((one.forward(*given), output)))
    values = Layers(kind="any", swapping_values=True)
    asked(backbone, None, control=Control((Route(row=2, value=0, layers=values),)))
    hook.remove()
    ((own, taken),) = made
    assert torch.equal(taken[:2], own[:2])
    of_values = slice(2 * width, 3 * width)
    assert torch.equal(taken[2, :, of_values], own[0, :, of_values])
    for others in (slice(0, 2 * width), slice(3 * width, None)):  # queries and keys, and the feed-forward
        assert torch.equal(taken[2, :, others], own[2, :, others])
        assert not torch.allclose(own[2, :, others], own[0, :, others], rtol=0.1)
