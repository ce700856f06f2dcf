"""Ways to run a network: the same predictions but for rounding, and the way back to the very same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.engine.calls import NetworkCall
from pipeline.engine.tuning import UNTUNED, Tuning, tune
from pipeline.models.graphs import Replayed
from pipeline.models.kernels import VECTOR_WIDTH, asking_first, exact_float32
from pipeline.models.loading import load_backbone
from pipeline.models.stable_diffusion import WAYS, StableDiffusion
from pipeline.recipe import ModelConfig
from tests.golden.replay import TINY_SD, TINY_SDXL
from tests.methods import levels, source

TUNED = [
    Tuning(attention="flash"),
    Tuning(attention="efficient"),
    Tuning(layout="channels_last"),
    Tuning(projections="joined"),
    Tuning(attention="flash", layout="channels_last", projections="joined"),
]


@pytest.fixture(scope="module", params=[TINY_SD, TINY_SDXL], ids=["sd", "sdxl"])
def model(request: pytest.FixtureRequest) -> StableDiffusion:
    loaded = load_backbone(ModelConfig(name=str(request.param)), device="cpu")
    assert isinstance(loaded, StableDiffusion)
    return loaded


def call_of(model: StableDiffusion) -> NetworkCall:
    latents = torch.stack([source(model, number).latents for number in range(4)])
    prompts = [model.encode_text(prompt) for prompt in ("", "red hat", "a dog", "")]
    return NetworkCall(latents, levels(model, [401, 201, 401, 1]), prompts)


@pytest.mark.parametrize("tuning", TUNED, ids=str)
def test_a_tuned_network_predicts_what_it_did_before(model: StableDiffusion, tuning: Tuning) -> None:
    before = model.denoise(call_of(model)).predictions.noise
    model.tune(tuning)
    found = model.denoise(call_of(model)).predictions.noise
    torch.testing.assert_close(found, before, atol=1e-5, rtol=1e-4)
    model.tune(UNTUNED)
    assert torch.equal(model.denoise(call_of(model)).predictions.noise, before)


def test_joined_projections_are_one_product_over_weights_that_are_held_once(model: StableDiffusion) -> None:
    model.tune(Tuning(projections="joined"))
    attentions = [module for module in model.unet.modules() if hasattr(module, "to_q")]
    for attention in attentions:
        names = ("to_k", "to_v") if attention.is_cross_attention else ("to_q", "to_k", "to_v")
        places = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in names}
        assert places == {attention.joined.untyped_storage().data_ptr()}
    products = 0

    def count(*_: Any) -> None:
        nonlocal products
        products += 1

    hooks = [getattr(one, name).register_forward_hook(count) for one in attentions for name in ("to_k", "to_v")]
    model.denoise(call_of(model))
    for hook in hooks:
        hook.remove()
    model.tune(UNTUNED)
    assert products == 0


def test_narrow_heads_are_filled_up_on_a_cpu_beside_the_networks_own_weights(model: StableDiffusion) -> None:
    for attention in (module for module in model.unet.modules() if hasattr(module, "to_q")):
        width, wide = attention.to_q.out_features // attention.heads, attention.wide
        assert (wide is None) == (width >= VECTOR_WIDTH)
        if wide is not None:
            own = wide.key.unflatten(0, (attention.heads, VECTOR_WIDTH))
            assert torch.equal(own[:, :width].flatten(0, 1), attention.to_k.weight)
            assert not own[:, width:].any()
            assert wide.out.shape == (attention.to_out[0].out_features, attention.heads * VECTOR_WIDTH)


def test_the_ways_of_a_network_are_found_by_trying(model: StableDiffusion) -> None:
    assert not model.ways  # on a CPU
    ways = {name: values for name, values in WAYS.items() if name != "execution"}
    found = tune(model, call_of(model), ways)
    assert found.tuning == model.tuning
    assert {"as loaded", "flash", "efficient"} <= found.rows_per_second.keys()
    model.tune(UNTUNED)


def test_kernels_that_are_asked_first_leave_the_others_to_what_they_cannot_do() -> None:
    query = torch.randn((1, 2, 8, 16), dtype=torch.float64)
    mask = torch.zeros((8, 8), dtype=torch.float64)
    attend = torch.nn.functional.scaled_dot_product_attention
    for attention in ("default", "flash", "cudnn", "efficient"):
        with asking_first(attention):
            found = attend(query, query, query, attn_mask=mask)  # with a mask, which flash kernels do not take
        torch.testing.assert_close(found, attend(query, query, query, attn_mask=mask))


@pytest.mark.parametrize(("device", "dtype"), [("cuda", "float32"), ("cuda", "bfloat16"), ("cpu", "float32")])
def test_float32_is_exact_on_a_gpu_and_the_process_keeps_its_setting(device: str, dtype: str) -> None:
    inputs: Any = SimpleNamespace(device=torch.device(device), dtype=getattr(torch, dtype))
    assert torch.backends.cudnn.allow_tf32  # torch's own default
    with suppress(KeyError), exact_float32(inputs):
        assert torch.backends.cudnn.allow_tf32 == ((device, dtype) != ("cuda", "float32"))
        raise KeyError
    assert torch.backends.cudnn.allow_tf32


class FakeCaptures:
    """In place of CUDA graphs: to launch again is to call the function again, and to write its answer where it was."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captured += 1
        answer = function()

        def again() -> None:
            for place, own in zip(tensors_of(answer), tensors_of(function()), strict=True):
                place.copy_(own)

        return again, answer


def tensors_of(answer: Any) -> Iterator[Tensor]:
    return (one for one in answer if isinstance(one, Tensor))


class Bundle(NamedTuple):
    layout: object
    numbers: Tensor


def test_a_graph_is_captured_once_per_kind_of_call_and_given_every_number_anew() -> None:
    captures = FakeCaptures()

    def work(latents: Tensor, bundle: Bundle | None, added: dict[str, Tensor] | None) -> tuple[Tensor, None]:
        made = latents * 2
        made = made if bundle is None else made + bundle.numbers
        return made if added is None else made + added["text"], None

    replayed = Replayed(work, captures)
    layout, other = object(), object()
    kinds = [
        lambda n: (torch.full((2,), n), None, None),
        lambda n: (torch.full((3,), n), None, None),
        lambda n: (torch.full((2,), n), Bundle(layout, torch.full((2,), n + 1)), None),
        lambda n: (torch.full((2,), n), Bundle(other, torch.full((2,), n + 2)), {"text": torch.full((2,), n)}),
    ]
    for n in (1.0, 5.0, 7.0):
        for kind in kinds:
            given = kind(n)
            (found, nothing), (expected, _) = replayed(*given), work(*given)
            assert torch.equal(found, expected)
            assert nothing is None
    assert captures.captured == len(kinds)
