"""Controls: rows that share a call, what is refused, who is given what was recorded; gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.levels import Prediction
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import Denoise, Denoised, EncodeText, NetworkAnswer, NetworkCall, Steps
from pipeline.engine.controls import (
    Add,
    Adds,
    Blend,
    Blends,
    Control,
    GivenClasses,
    Layers,
    Mix,
    Plan,
    Read,
    Reads,
    Record,
    Records,
    Residuals,
    Route,
    TakeFeatures,
    Watch,
    WatchedClasses,
)
from pipeline.engine.engine import Engine
from pipeline.errors import EditError
from pipeline.models.analytic import AnalyticBackbone
from tests.methods import analytic, levels, network_calls, source, tiny_sd

NOTHING = Control(())
EVERY_LAYER = Layers()
SELF_FROM_FIRST = Control((Route(row=1, query=0, key=0, value=0, layers=EVERY_LAYER),))
FEATURES = Residuals(factor=4, index_in_block=1)
FEATURES_FROM_FIRST = Control((TakeFeatures(1, 0, FEATURES),), Plan(takes=(FEATURES,)))
TEXT_FROM_FIRST = Control((Mix(row=1, source=0, take=torch.eye(77), keep=torch.zeros(77)),))


def asks(
    backbone: Backbone,
    rows: int = 2,
    control: Control | None = NOTHING,
    number: int = 1,
    prompts: Sequence[str] = ("a cat", "a dog"),
) -> Steps[Denoised]:
    """One call of `rows` rows, half of them with each prompt."""
    conditioning = yield EncodeText(tuple(prompts))
    latents = torch.stack([source(backbone, number).latents * (1 + 0.1 * row) for row in range(rows)])
    denoised: Denoised = yield Denoise(
        latents,
        levels(backbone, [401] * rows),
        [conditioning[row * len(prompts) // rows] for row in range(rows)],
        control=control,
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
    generators = [asks(analytic(), rows=3), asks(analytic(), rows=2), asks(analytic(), rows=5, control=None)]
    assert sum(len(result.value.predictions.noise) for result in engine.run(generators)) == 10
    assert len(calls) == 3


def test_a_group_that_is_larger_than_a_call_is_an_error_that_names_both() -> None:
    with pytest.raises(EditError, match=r"5 rows.*call, which has 4 rows.*run\.call_size to 5"):
        Engine(analytic(), call_size=4).run_one(asks(analytic(), rows=5))


def test_every_control_gets_what_it_watched() -> None:
    def watching(number: int) -> Control:
        """The second row watches so many tokens in its second sum."""
        weights = torch.zeros((2, 77))
        weights[1, :number] = 1.0
        return Control((Watch(1, weights),))

    engine = Engine(analytic(), call_size=8)
    calls = network_calls(engine)
    generators = [asks(analytic(), control=watching(n), prompts=("a dog",)) for n in range(1, 5)]
    watched = {one.index: one.value.seen.watched for one in engine.run(generators)}
    one_token = watched[0][1, 1]
    assert one_token.any()
    for number in range(4):
        assert watched[number].shape == (2, 4, *one_token.shape)
        assert torch.equal(watched[number][1, 1], (number + 1) * one_token)
        assert not watched[number][0].any()
        assert not watched[number][1, [0, 2, 3]].any()
    assert len(calls) == 1


def test_a_control_that_does_not_watch_is_told_so_beside_one_that_does() -> None:
    engine = Engine(tiny_sd(), call_size=8)
    calls = network_calls(engine)
    generators = [asks(tiny_sd()), asks(tiny_sd(), control=Control((Watch(0, torch.ones((1, 77))),)))]
    seen = {one.index: one.value.seen for one in engine.run(generators)}
    assert len(calls) == 1
    assert seen[0].watched is None
    torch.testing.assert_close(seen[1].watched[0, 0], torch.ones((3, 3)))


def test_what_is_recorded_goes_to_its_control_in_the_order_in_which_it_was_asked_for() -> None:
    up, mid = ("up", 1), ("mid", 0)
    plan = Plan(records=(Records(where=up, slots=2), Records(where=mid, slots=1)))
    control = Control((Record(1, up), Record(0, mid), Record(0, up)), plan)
    engine = Engine(tiny_sd(), call_size=8)
    calls = network_calls(engine)
    runs = [asks(tiny_sd(), control=control, number=1), asks(tiny_sd(), control=control, number=2)]
    both = {one.index: one.value.seen.recorded for one in engine.run(runs)}
    assert len(calls) == 1
    assert [tuple(tensor.shape) for tensor in both[0]] == [(32, 3, 3), (32, 2, 2), (32, 3, 3)]
    swapped = Control((Record(0, up), Record(1, up)), plan)
    other = Engine(tiny_sd(), call_size=8).run_one(asks(tiny_sd(), control=swapped, number=1)).seen.recorded
    assert torch.equal(other[0], both[0][2])
    assert torch.equal(other[1], both[0][0])
    assert not torch.equal(both[0][0], both[1][0])


CLASSES = GivenClasses(torch.ones((12, 12)).long(), torch.ones((1, 12, 12)).long())
WATCHED = WatchedClasses(own=0, theirs=1, threshold=0.5, image=torch.ones((3, 3), dtype=torch.bool))
ROUTE = Route(row=1, query=0, layers=Layers(min_index=3))
READ = Read(row=1, sources=(0,), layers=Layers(place="up"), classes=CLASSES)
BLEND = Blend(
    row=1, layers=Layers(indices=frozenset({4})), sources=torch.zeros(9), places=torch.zeros(9), shares=torch.ones(9)
)
READS = Reads(layers=READ.layers, slots=2, classes="given")
REFUSED: dict[str, tuple[Any, Plan, str]] = {
    "a row that is not there": ((Route(row=0, key=2, layers=EVERY_LAYER),), Plan(routes=True), "names row 2"),
    "two mixes": (TEXT_FROM_FIRST.parts * 2, Plan(mixes=2), "Mix of row 1 and .*Mix of row 1 exclude each other"),
    "two reads": ((READ, Read(row=1, sources=(0,), layers=READ.layers)), Plan(reads=(READS,)), "exclude each other"),
    "a route and a read": ((ROUTE, READ), Plan(routes=True, reads=(READS,)), r"exclude .*layer \(7,\)"),
    "two routes": ((ROUTE, SELF_FROM_FIRST.parts[0]), Plan(routes=True), "exclude each other"),
    "two watches": ((Watch(0, torch.ones((1, 77))),) * 2, Plan(sums=1), "exclude each other"),
    "more sums than planned": ((Watch(0, torch.ones((2, 77))),), Plan(sums=1), "sums=2"),
    "routes that were not planned": ((ROUTE,), Plan(), "routes=True"),
    "features that were not planned": (FEATURES_FROM_FIRST.parts, Plan(), "takes="),
    "more reads than planned": (
        (READ, Read(row=0, sources=(1,), layers=READ.layers)),
        Plan(reads=(Reads(layers=READ.layers, slots=1, classes="given"),)),
        "no room for its Read of row 0",
    ),
    "weights of another length": ((Watch(0, torch.ones((1, 76))),), Plan(sums=1), r"\(1, 76\), and \(1, 77\)"),
    "classes of another size": (
        (Read(row=1, sources=(0,), layers=READ.layers, classes=GivenClasses(CLASSES.own[:6], CLASSES.theirs)),),
        Plan(reads=(READS,)),
        "own classes of shape",
    ),
    "classes from what nobody watches": (
        (Read(row=1, sources=(0,), layers=READ.layers, classes=WATCHED),),
        Plan(reads=(Reads(layers=READ.layers, slots=1, classes="watched"),)),
        "row 0, which watches nothing",
    ),
    "blends of layers of two sizes": (
        (Blend(row=1, layers=EVERY_LAYER, sources=BLEND.sources, places=BLEND.places, shares=BLEND.shares),),
        Plan(blends=(Blends(layers=EVERY_LAYER, slots=1),)),
        "sources of shape",
    ),
    "a block that the model lacks": (
        (Record(0, ("up", 9)),),
        Plan(records=(Records(where=("up", 9), slots=1),)),
        "up 8",
    ),
    "a direction of another width": (
        (Add(row=0, where=("up", 0), directions=torch.ones((1, 3)), maps=torch.ones((1, 3, 3))),),
        Plan(adds=(Adds(where=("up", 0), slots=1),)),
        "directions of shape",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused_before_any_network_call(what: str) -> None:
    parts, plan, match = REFUSED[what]
    engine = Engine(tiny_sd(), call_size=8)
    calls = network_calls(engine)
    with pytest.raises((ValueError, EditError), match=match):
        engine.run_one(asks(tiny_sd(), control=Control(tuple(parts), plan)))
    assert len(calls) == 0


def test_parts_that_meet_in_no_layer_may_be_of_one_row() -> None:
    below = Route(row=1, query=0, layers=Layers(place="down"))
    control = Control(
        (below, READ, BLEND), Plan(routes=True, reads=(READS,), blends=(Blends(layers=BLEND.layers, slots=1),))
    )
    found, idle = (
        Engine(tiny_sd(), call_size=8).run_one(asks(tiny_sd(), control=one)).predictions.noise
        for one in (control, Control((), control.plan))
    )
    assert torch.equal(found[0], idle[0])
    assert not torch.equal(found[1], idle[1])


def test_a_call_with_a_control_watches_by_its_parts() -> None:
    def both() -> Steps[Denoised]:
        (prompt,) = yield EncodeText(("a cat",))
        latents = source(tiny_sd(), 1).latents[None]
        return (yield Denoise(latents, levels(tiny_sd(), [401]), [prompt], watch=[(1,)], control=NOTHING))

    with pytest.raises(ValueError, match="Watch parts"):
        Engine(tiny_sd(), call_size=8).run_one(both())


class Picky(AnalyticBackbone):
    """Fails in calls that watch the last token."""

    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        if call.watch is not None and call.watch[..., -1].any():
            raise ValueError("a word too many")
        return super().denoise(call)


def test_a_control_that_fails_takes_nobody_with_it() -> None:
    watching = Control((Watch(0, torch.eye(77)[-1:]),))
    backbone = Picky()
    generators = [asks(backbone, control=control, number=2) for control in (NOTHING, watching, NOTHING)]
    results = list(Engine(backbone, call_size=8).run(generators))
    errors = {result.index: str(result.error) for result in results if result.error}
    assert errors == {1: "a word too many"}
    alone = Engine(backbone, call_size=8).run_one(asks(backbone, number=2))
    for result in results:
        if result.error is None:
            assert torch.equal(result.value.predictions.noise, alone.predictions.noise)


class Small(AnalyticBackbone):
    """Has memory for so many rows and no more."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest
        self.made: list[Tensor] = []  # latents of the calls that it had memory for

    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        if len(call.levels) > self.largest:
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


def test_a_control_that_does_nothing_changes_nothing() -> None:
    controlled = Engine(tiny_sd(), call_size=8).run_one(asks(tiny_sd()))
    free = Engine(tiny_sd(), call_size=8).run_one(asks(tiny_sd(), control=None))
    assert torch.equal(controlled.predictions.noise, free.predictions.noise)


@pytest.mark.parametrize("control", [SELF_FROM_FIRST, FEATURES_FROM_FIRST, TEXT_FROM_FIRST])
def test_what_a_control_does_stays_in_its_group_and_its_call(control: Control) -> None:
    backbone = tiny_sd()
    engine = Engine(backbone, call_size=8)
    idle = Control((), control.plan)
    before = engine.run_one(asks(backbone, control=idle, number=3))
    changed, beside = sorted(
        engine.run([asks(backbone, control=control, number=3), asks(backbone, control=idle, number=3)]),
        key=lambda result: result.index,
    )
    after = engine.run_one(asks(backbone, control=idle, number=3))
    assert not torch.equal(changed.value.predictions.noise, before.predictions.noise)
    assert torch.equal(beside.value.predictions.noise, before.predictions.noise)
    assert torch.equal(after.predictions.noise, before.predictions.noise)


def test_a_route_leaves_the_row_that_it_reads_as_it_was() -> None:
    backbone = tiny_sd()
    before = Engine(backbone, call_size=8).run_one(asks(backbone))
    routed = Engine(backbone, call_size=8).run_one(asks(backbone, control=SELF_FROM_FIRST))
    assert torch.equal(routed.predictions.noise[0], before.predictions.noise[0])
    assert not torch.equal(routed.predictions.noise[1], before.predictions.noise[1])


def test_rows_that_are_equal_stay_so_whichever_of_them_is_read() -> None:
    def equal_rows(control: Control) -> Steps[Denoised]:
        (prompt,) = yield EncodeText(("a cat",))
        latents = source(tiny_sd(), 1).latents.expand(2, -1, -1, -1)
        return (yield Denoise(latents, levels(tiny_sd(), [401] * 2), [prompt] * 2, control=control))

    swapped = Control(
        tuple(Route(row=row, query=1 - row, key=1 - row, value=1 - row, layers=EVERY_LAYER) for row in range(2))
    )
    one, other = (Engine(tiny_sd(), call_size=8).run_one(equal_rows(control)) for control in (NOTHING, swapped))
    torch.testing.assert_close(one.predictions.noise, other.predictions.noise)


def of_noise(function: Callable[[Tensor], Tensor]) -> Callable[[Prediction], Prediction]:
    """A gradient by the noise alone."""
    return lambda prediction: Prediction(function(prediction.noise), torch.zeros_like(prediction.data))


def asks_gradients(backbone: Backbone, cotangent: Any, rows: int = 2) -> Steps[Denoised]:
    prompts = yield EncodeText(("a cat", "a dog"))
    latents = torch.stack([source(backbone, row).latents for row in range(rows)])
    return (yield Denoise(latents, levels(backbone, [401] * rows), prompts[:rows], cotangent=cotangent))


@pytest.mark.parametrize("make", [analytic, tiny_sd], ids=["analytic", "tiny_sd"])
def test_gradients_are_those_of_the_function_by_finite_differences(make: Any) -> None:
    backbone = make(torch.float64)
    weights = torch.randn(source(backbone, 0).latents.shape, generator=torch.Generator().manual_seed(0)).double()
    # The function: the weighted sum of squares of the prediction.
    answer = Engine(backbone, call_size=8).run_one(
        asks_gradients(backbone, of_noise(lambda noise_pred: 2 * weights * noise_pred))
    )
    assert answer.embedding_grads is not None
    prompt = backbone.encode_text("a cat")
    shift = torch.randn(prompt.embedding.shape, generator=torch.Generator().manual_seed(1)).double() * 1e-5

    def value(embedding: Tensor) -> float:
        changed = prompt.replacing(embedding=embedding)
        call = NetworkCall(source(backbone, 0).latents[None], levels(backbone, [401]), [changed])
        return float((weights * backbone.denoise(call).predictions.noise[0] ** 2).sum())

    expected = (value(prompt.embedding + shift) - value(prompt.embedding - shift)) / 2
    assert float((answer.embedding_grads[0] * shift).sum()) == pytest.approx(expected, rel=1e-4)


def test_gradients_equal_autograds_on_the_whole_unet() -> None:
    backbone: Any = tiny_sd(torch.float64)
    answer = Engine(backbone, call_size=8).run_one(asks_gradients(backbone, of_noise(torch.cos)))
    embeddings = torch.stack([backbone.encode_text(text).embedding for text in ("a cat", "a dog")]).requires_grad_()
    latents = torch.stack([source(backbone, row).latents for row in range(2)])
    with torch.enable_grad():
        noise_preds = backbone.unet(latents, torch.tensor([401, 401]), encoder_hidden_states=embeddings).sample
        noise_preds.sin().sum().backward()
    torch.testing.assert_close(answer.embedding_grads, embeddings.grad)
    torch.testing.assert_close(answer.predictions.noise, noise_preds.detach())


def test_a_row_with_a_gradient_costs_three_and_leaves_no_graph() -> None:
    engine = Engine(tiny_sd(), call_size=8)
    (finished,) = engine.run([asks_gradients(tiny_sd(), of_noise(torch.zeros_like))])
    assert finished.network_rows == 6
    assert not finished.value.predictions.noise.requires_grad
    assert not finished.value.embedding_grads.requires_grad
    assert not finished.value.embedding_grads.any()


def test_gradients_have_the_same_bits_beside_any_neighbours() -> None:
    def ours() -> Steps[Denoised]:
        return asks_gradients(tiny_sd(), of_noise(torch.cos))

    alone = Engine(tiny_sd(), call_size=8).run_one(ours())
    neighbours = [
        asks_gradients(tiny_sd(), of_noise(torch.sin), rows=1),
        asks(tiny_sd()),
        ours(),
        asks(tiny_sd(), 5, None),
    ]
    together = {one.index: one.value for one in Engine(tiny_sd(), call_size=8).run(neighbours)}[2]
    assert torch.equal(together.embedding_grads, alone.embedding_grads)
    assert torch.equal(together.predictions.noise, alone.predictions.noise)
