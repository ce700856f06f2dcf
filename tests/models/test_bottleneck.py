"""The bottleneck of a UNet and products with its Jacobian: against a hook, against each other, beside neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.engine.calls import NetworkCall, Product, Steps
from pipeline.engine.engine import Engine
from pipeline.errors import EditError
from pipeline.models import attention
from pipeline.models.attention import explicit_attention, fused_attention
from pipeline.models.stable_diffusion import StableDiffusion
from tests.closed_form_flow import ClosedFormFlow
from tests.golden.replay import TINY_SDXL, loaded
from tests.methods import analytic, levels, tiny_sd

MODELS = {"stable diffusion": lambda: tiny_sd(torch.float64), "xl": lambda: loaded(TINY_SDXL, torch.float64)}
SHAPE = (16, 16)  # latents
PROMPTS = ("a cat", "", "a red hat")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def call(model: Any, given: Tensor, mode: Any, prompts: tuple[str, ...] = PROMPTS) -> Product:
    rows = len(prompts)
    return Product(
        latents=vectors(rows, model.latent_channels, *SHAPE, seed=1, dtype=given.dtype),
        levels=levels(model, [701, 301, 21][:rows]),
        conditioning=[model.encode_text(prompt) for prompt in prompts],
        vectors=given,
        mode=mode,
    )


def bottlenecks(model: StableDiffusion, one: Product) -> tuple[Tensor, Tensor]:
    """As the model computes them alone, and as a hook sees them in a whole call."""
    times, embeddings, added = model._told(one)
    with torch.no_grad():
        alone = model._network.bottleneck(one.latents, times, embeddings, added or None)
    seen: list[Tensor] = []
    hook = model.unet.mid_block.register_forward_hook(lambda module, given, output: seen.append(output))
    try:
        model.denoise(NetworkCall(one.latents, one.levels, one.conditioning))
    finally:
        hook.remove()
    return alone, seen[0]


def test_the_bottleneck_is_what_the_middle_block_of_a_whole_call_puts_out(model: Any) -> None:
    one = call(model, vectors(3, model.latent_channels, *SHAPE), "push")
    alone, hooked = bottlenecks(model, one)
    assert torch.equal(alone, hooked)
    assert tuple(alone.shape[1:]) == model.offers.bottleneck.shape(*SHAPE)


def test_both_modes_multiply_with_one_jacobian_which_is_that_of_the_plain_network(model: Any) -> None:
    tangents = vectors(3, model.latent_channels, *SHAPE)
    cotangents = vectors(3, *model.offers.bottleneck.shape(*SHAPE), seed=2)
    pushed = model.product(call(model, tangents, "push"))
    pulled = model.product(call(model, cotangents, "pull"))
    torch.testing.assert_close(
        (pushed * cotangents).flatten(1).sum(1), (tangents * pulled).flatten(1).sum(1), rtol=1e-9, atol=0.0
    )
    step = 1e-5
    one = call(model, tangents, "push")
    times, embeddings, added = model._told(one)
    with torch.no_grad():
        after, before = (
            model._network.bottleneck(one.latents + sign * step * tangents, times, embeddings, added or None)
            for sign in (1, -1)
        )
    torch.testing.assert_close(pushed, (after - before) / (2 * step), rtol=1e-5, atol=1e-7)


def test_a_product_leaves_nothing_behind_for_the_next_call_even_where_it_fails() -> None:
    model: Any = tiny_sd()
    latents = vectors(1, 4, *SHAPE, seed=1, dtype=torch.float32)
    plain = NetworkCall(latents, levels(model, [501]), [model.encode_text("a cat")])
    before = model.denoise(plain).predictions.noise
    model.product(call(model, vectors(1, 4, *SHAPE, dtype=torch.float32), "push", ("a cat",)))
    with pytest.raises(RuntimeError):
        model.product(call(model, vectors(1, 4, 3, 3, dtype=torch.float32), "push", ("a cat",)))
    assert not model._network._now.explicit
    assert torch.equal(model.denoise(plain).predictions.noise, before)


@pytest.mark.parametrize("queries", [1024, 5])
def test_explicit_attention_is_the_fused_one_within_rounding(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERIES", queries)
    query, key, value = (vectors(2, 3, length, 16, seed=length) for length in (12, 77, 77))
    explicit = explicit_attention(query, key, value, 0.25)
    torch.testing.assert_close(explicit, fused_attention(query, key, value, None, 0.25), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_a_product_has_the_same_bits_alone_and_beside_any_neighbours(mode: Any) -> None:
    model: Any = tiny_sd()
    shape = (model.latent_channels, *SHAPE) if mode == "push" else model.offers.bottleneck.shape(*SHAPE)
    whole = call(model, vectors(3, *shape, dtype=torch.float32), mode)

    def row(at: int) -> Steps[Tensor]:
        answer: Tensor = yield Product(
            whole.latents[at : at + 1],
            whole.levels[at : at + 1],
            whole.conditioning[at : at + 1],
            whole.vectors[at : at + 1],
            mode,
        )
        return answer

    def all_rows() -> Iterator[Steps[Tensor]]:
        return (row(at) for at in (2, 0, 1))

    alone = [Engine(model, call_size=16).run_one(row(at)) for at in range(3)]
    together = {one.index: one.value for one in Engine(model, call_size=16).run(all_rows())}
    assert all(torch.equal(alone[at], together[(1, 2, 0)[at]]) for at in range(3))


def test_a_call_of_products_has_a_quarter_of_the_rows() -> None:
    made: list[int] = []

    class Counting(type(analytic())):  # type: ignore[misc]
        def product(self, one: Product) -> Tensor:
            made.append(len(one.levels))
            return super().product(one)

    model = Counting()
    one = call(model, vectors(3, model.latent_channels, *SHAPE, dtype=torch.float32), "push")

    def ask() -> Steps[Tensor]:
        return (yield one)

    engine = Engine(model, call_size=8)
    engine.run_one(ask())
    assert made == [2, 2]
    assert (engine.stats.network_rows, engine.stats.padded_rows) == (3, 1)


def test_a_model_without_products_says_so_and_unequal_rows_are_refused() -> None:
    flow = ClosedFormFlow()
    assert flow.offers.bottleneck is None
    model = analytic()
    one = call(model, vectors(3, model.latent_channels, *SHAPE, dtype=torch.float32), "push")
    with pytest.raises(EditError, match="no Jacobian products"):
        flow.product(one)
    short = Product(one.latents, one.levels[:2], one.conditioning, one.vectors, "push")

    def ask() -> Steps[Tensor]:
        return (yield short)

    with pytest.raises(ValueError, match="one level, prompt and vector"):
        Engine(model).run_one(ask())
