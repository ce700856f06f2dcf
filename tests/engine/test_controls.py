"""Controls: rows that share a call, what a hook sees and changes, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import Denoise, Denoised, EncodeText, NetworkAnswer, NetworkCall, Steps
from pipeline.engine.controls import Block, Control, Hook, Layer, Routes, attention_probabilities
from pipeline.engine.engine import Engine
from pipeline.errors import EditError
from pipeline.models.analytic import AnalyticBackbone
from tests.methods import analytic, network_calls, source, tiny_sd


@dataclass(frozen=True)
class Given(Control):
    """A control whose hook is made by a function."""

    make: Any

    def hook(self, height: int, width: int, device: torch.device) -> Hook:
        return self.make()


class Nothing(Hook):
    """Changes nothing; answers with the layers that it has seen."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, scale: float, attended: Tensor) -> Tensor:
        self.layers.append(layer)
        return attended

    def answer(self) -> list[Layer]:
        return self.layers


class SelfFromFirst(Hook):
    """All rows attend to themselves with the first row's queries, keys and values."""

    def routes(self, layer: Layer) -> Routes | None:
        return Routes([0, 0], [0, 0], [0, 0]) if layer.kind == "self" else None


class Explicit(Hook):
    """Computes cross-attention by its formula."""

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, scale: float, attended: Tensor) -> Tensor:
        return attention_probabilities(query, key, scale).to(value) @ value


class Doubled(Hook):
    """Doubles a decoder block's features."""

    def features(self, block: Block, hidden: Tensor) -> Tensor:
        return hidden * 2 if (block.index, block.index_in_block) == (1, 1) else hidden


class Broken(Hook):
    """Raises in the UNet."""

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, scale: float, attended: Tensor) -> Tensor:
        raise ValueError("a word too many")


def asks(
    backbone: Backbone, rows: int = 2, make: Any = Nothing, number: int = 1, prompts: Sequence[str] = ("a cat", "a dog")
) -> Steps[Denoised]:
    """One call of `rows` rows, half of them with each prompt."""
    conditioning = yield EncodeText(tuple(prompts))
    latents = torch.stack([source(backbone, number).latents * (1 + 0.1 * row) for row in range(rows)])
    control = None if make is None else Given(make)
    denoised: Denoised = yield Denoise(
        latents, [401] * rows, [conditioning[row * len(prompts) // rows] for row in range(rows)], control=control
    )
    return denoised


def test_groups_share_a_call_and_none_is_cut() -> None:
    engine = Engine(analytic(), call_size=8)
    calls = network_calls(engine)
    results = list(engine.run(asks(analytic(), rows=3, number=n) for n in range(4)))
    assert [result.error for result in results] == [None] * 4
    assert (len(calls), engine.stats.network_rows, engine.stats.padded_rows) == (2, 12, 0)


def test_groups_of_different_sizes_and_rows_without_control_go_separate_ways() -> None:
    engine = Engine(analytic(), call_size=8)
    calls = network_calls(engine)
    generators = [asks(analytic(), rows=3), asks(analytic(), rows=2), asks(analytic(), rows=5, make=None)]
    assert sum(len(result.value.noise_preds) for result in engine.run(generators)) == 10
    assert len(calls) == 3


def test_a_group_that_is_larger_than_a_call_is_an_error_that_names_both() -> None:
    with pytest.raises(EditError, match=r"5 rows.*call, which has 4 rows.*run\.call_size to 5"):
        Engine(analytic(), call_size=4).run_one(asks(analytic(), rows=5))


def test_every_control_gets_its_own_answer() -> None:
    def counting(number: int) -> Any:
        class Told(Hook):
            def answer(self) -> int:
                return number

        return Told

    engine = Engine(analytic(), call_size=8)
    calls = network_calls(engine)
    seen = {one.index: one.value.seen for one in engine.run(asks(analytic(), make=counting(n)) for n in range(4))}
    assert seen == {0: 0, 1: 1, 2: 2, 3: 3}
    assert len(calls) == 1


@pytest.mark.parametrize("backbone", [analytic(), tiny_sd()], ids=["analytic", "tiny_sd"])
def test_a_control_that_fails_takes_nobody_with_it(backbone: Any) -> None:
    makes = [Nothing, Broken, Nothing]
    results = list(Engine(backbone, call_size=8).run(asks(backbone, make=make, number=2) for make in makes))
    errors = {result.index: str(result.error) for result in results if result.error}
    assert errors == {1: "a word too many"}
    alone = Engine(backbone, call_size=8).run_one(asks(backbone, number=2))
    for result in results:
        if result.error is None:
            assert torch.equal(result.value.noise_preds, alone.noise_preds)


class Small(AnalyticBackbone):
    """Has memory for so many rows and no more."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest
        self.made: list[Tensor] = []  # latents of the calls that it had memory for

    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        if len(call.timesteps) > self.largest:
            raise torch.OutOfMemoryError("pretended")
        self.made.append(call.latents)
        return super().denoise(call)


def test_out_of_memory_halves_calls_of_groups_and_keeps_them_whole_and_in_order() -> None:
    backbone = Small(largest=4)
    engine = Engine(backbone, call_size=16)
    results = list(engine.run(asks(analytic(), rows=3, number=n) for n in range(5)))
    assert [result.error for result in results] == [None] * 5
    assert engine.call_size == 4
    assert len(backbone.made) == 5
    for latents in backbone.made:
        torch.testing.assert_close(latents, torch.stack([latents[0] * (1 + 0.1 * row) for row in range(3)]))


def test_out_of_memory_fails_the_groups_that_fit_no_more_and_serves_the_rest() -> None:
    engine = Engine(Small(largest=2), call_size=8)
    results = list(engine.run([asks(analytic(), rows=3), asks(analytic(), rows=2), asks(analytic(), 7, None)]))
    errors = {result.index: type(result.error).__name__ for result in results if result.error}
    assert errors == {0: "OutOfMemoryError"}
    assert engine.call_size == 2


def test_a_hook_sees_every_layer_once_in_the_order_in_which_they_run() -> None:
    layers = Engine(tiny_sd(), call_size=8).run_one(asks(tiny_sd())).seen
    assert [(layer.kind, layer.index) for layer in layers] == [(k, n) for n in range(16) for k in ("self", "cross")]
    selfs = [layer for layer in layers if layer.kind == "self"]
    assert [layer.factor for layer in selfs] == [1, 1, 2, 2, 4, 4, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1]
    assert [layer.place for layer in selfs] == ["down"] * 6 + ["mid"] + ["up"] * 9
    assert [layer.index_in_place for layer in selfs] == [*range(6), 0, *range(9)]


def test_a_control_that_does_nothing_changes_nothing() -> None:
    controlled = Engine(tiny_sd(), call_size=8).run_one(asks(tiny_sd()))
    free = Engine(tiny_sd(), call_size=8).run_one(asks(tiny_sd(), make=None))
    assert torch.equal(controlled.noise_preds, free.noise_preds)


def test_an_explicit_formula_agrees_with_fused_attention() -> None:
    explicit = Engine(tiny_sd(), call_size=8).run_one(asks(tiny_sd(), make=Explicit))
    free = Engine(tiny_sd(), call_size=8).run_one(asks(tiny_sd(), make=None))
    torch.testing.assert_close(explicit.noise_preds, free.noise_preds, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("make", [SelfFromFirst, Doubled, Explicit])
def test_what_a_control_does_stays_in_its_group_and_its_call(make: Any) -> None:
    backbone = tiny_sd()
    engine = Engine(backbone, call_size=8)
    before = engine.run_one(asks(backbone, number=3))
    changed, beside = sorted(
        engine.run([asks(backbone, make=make, number=3), asks(backbone, number=3)]), key=lambda result: result.index
    )
    after = engine.run_one(asks(backbone, number=3))
    assert not torch.equal(changed.value.noise_preds, before.noise_preds)
    assert torch.equal(beside.value.noise_preds, before.noise_preds)
    assert torch.equal(after.noise_preds, before.noise_preds)


def test_a_route_leaves_the_row_that_it_reads_as_it_was() -> None:
    backbone = tiny_sd()
    before = Engine(backbone, call_size=8).run_one(asks(backbone))
    routed = Engine(backbone, call_size=8).run_one(asks(backbone, make=SelfFromFirst))
    assert torch.equal(routed.noise_preds[0], before.noise_preds[0])
    assert not torch.equal(routed.noise_preds[1], before.noise_preds[1])


def test_rows_that_are_equal_stay_so_whichever_of_them_is_read() -> None:
    class Swapped(Hook):
        def routes(self, layer: Layer) -> Routes:
            return Routes([1, 0], [1, 0], [1, 0])

    def equal_rows(make: Any) -> Steps[Denoised]:
        (prompt,) = yield EncodeText(("a cat",))
        latents = source(tiny_sd(), 1).latents.expand(2, -1, -1, -1)
        return (yield Denoise(latents, [401] * 2, [prompt] * 2, control=Given(make)))

    one, other = (Engine(tiny_sd(), call_size=8).run_one(equal_rows(make)) for make in (Nothing, Swapped))
    torch.testing.assert_close(one.noise_preds, other.noise_preds)


def asks_gradients(backbone: Backbone, cotangent: Any, rows: int = 2) -> Steps[Denoised]:
    prompts = yield EncodeText(("a cat", "a dog"))
    latents = torch.stack([source(backbone, row).latents for row in range(rows)])
    return (yield Denoise(latents, [401] * rows, prompts[:rows], cotangent=cotangent))


@pytest.mark.parametrize("make", [analytic, tiny_sd], ids=["analytic", "tiny_sd"])
def test_gradients_are_those_of_the_function_by_finite_differences(make: Any) -> None:
    backbone = make(torch.float64)
    weights = torch.randn(source(backbone, 0).latents.shape, generator=torch.Generator().manual_seed(0)).double()
    # The function: the weighted sum of squares of the prediction.
    answer = Engine(backbone, call_size=8).run_one(
        asks_gradients(backbone, lambda noise_pred: 2 * weights * noise_pred)
    )
    assert answer.embedding_grads is not None
    prompt = backbone.encode_text("a cat").embedding
    shift = torch.randn(prompt.shape, generator=torch.Generator().manual_seed(1)).double() * 1e-5

    def value(embedding: Tensor) -> float:
        call = NetworkCall(source(backbone, 0).latents[None], [401], [embedding])
        return float((weights * backbone.denoise(call).noise_preds[0] ** 2).sum())

    expected = (value(prompt + shift) - value(prompt - shift)) / 2
    assert float((answer.embedding_grads[0] * shift).sum()) == pytest.approx(expected, rel=1e-4)


def test_gradients_equal_autograds_on_the_whole_unet() -> None:
    backbone: Any = tiny_sd(torch.float64)
    answer = Engine(backbone, call_size=8).run_one(asks_gradients(backbone, torch.cos))
    embeddings = torch.stack([backbone.encode_text(text).embedding for text in ("a cat", "a dog")]).requires_grad_()
    latents = torch.stack([source(backbone, row).latents for row in range(2)])
    with torch.enable_grad():
        noise_preds = backbone.unet(latents, torch.tensor([401, 401]), encoder_hidden_states=embeddings).sample
        noise_preds.sin().sum().backward()
    torch.testing.assert_close(answer.embedding_grads, embeddings.grad)
    torch.testing.assert_close(answer.noise_preds, noise_preds.detach())


def test_a_row_with_a_gradient_costs_three_and_leaves_no_graph() -> None:
    engine = Engine(tiny_sd(), call_size=8)
    (finished,) = engine.run([asks_gradients(tiny_sd(), torch.zeros_like)])
    assert finished.network_rows == 6
    assert not finished.value.noise_preds.requires_grad
    assert not finished.value.embedding_grads.requires_grad
    assert not finished.value.embedding_grads.any()


def test_gradients_have_the_same_bits_beside_any_neighbours() -> None:
    def ours() -> Steps[Denoised]:
        return asks_gradients(tiny_sd(), torch.cos)

    alone = Engine(tiny_sd(), call_size=8).run_one(ours())
    neighbours = [asks_gradients(tiny_sd(), torch.sin, rows=1), asks(tiny_sd()), ours(), asks(tiny_sd(), 5, None)]
    together = {one.index: one.value for one in Engine(tiny_sd(), call_size=8).run(neighbours)}[2]
    assert torch.equal(together.embedding_grads, alone.embedding_grads)
    assert torch.equal(together.noise_preds, alone.noise_preds)
