"""Every part of a control inside a UNet, against its formula; what it leaves alone; what reaches the device."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.engine.calls import Conditioning, NetworkCall
from pipeline.engine.controls import (
    ANY,
    BACKGROUND,
    FOREGROUND,
    GROUPED,
    HIDDEN,
    Add,
    Adds,
    Blend,
    Blends,
    Control,
    GivenClasses,
    Layers,
    Mix,
    MixQueries,
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
from pipeline.engine.stacking import Shape, Stacked, seen_by, stack
from pipeline.models import attention
from pipeline.models.attention import readable
from pipeline.models.loading import load_backbone
from pipeline.models.stable_diffusion import StableDiffusion
from pipeline.models.unet import OpenedUNet
from pipeline.recipe import ModelConfig
from tests.golden.replay import TINY_SD
from tests.methods import levels, tiny_sd
from tests.models.plain_controls import Groups, PlainControls

SIDE, LENGTH, GROUP, ROWS = 8, 77, 3, 9  # two groups of three rows, and one that is missing
DECODER = Layers(place="up")
COARSE = Layers(place="up", min_factor=2, max_factor=2)
BLOCK = ("up", 1)


def unet(dtype: torch.dtype) -> Any:
    """A small one whose weights amplify no rounding, unlike the tiny Stable Diffusion's."""
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=SIDE,
        layers_per_block=1,
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=32,
    )
    return made.to(dtype).eval().requires_grad_(False)


@cache
def opened(dtype: torch.dtype) -> OpenedUNet:
    return OpenedUNet(unet(dtype))


@cache
def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((ROWS, 4, SIDE, SIDE), generator=generator, dtype=torch.float64)
    context = torch.randn((ROWS, LENGTH, 32), generator=generator, dtype=torch.float64)
    return latents.to(dtype), torch.tensor([401, 401, 401, 21, 21, 21, 801, 801, 801]), context.to(dtype)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mix(row: int = 2, source: int = 0, seed: int = 1) -> Mix:
    take = rand(LENGTH, LENGTH, seed=seed)
    return Mix(row=row, source=source, take=take / take.sum(dim=0), keep=rand(LENGTH, seed=seed + 1) / 2)


def classes(*, hides: bool, sources: int = 2) -> GivenClasses:
    kinds = torch.tensor([BACKGROUND, FOREGROUND, ANY, HIDDEN] if hides else [BACKGROUND, FOREGROUND])
    own, theirs = (
        kinds[(rand(count, SIDE, SIDE, seed=seed) * len(kinds)).long()] for count, seed in ((1, 3), (sources, 4))
    )
    return GivenClasses(own[0], theirs)


def watched_classes() -> WatchedClasses:
    image = torch.tensor([[True, True], [True, False]])
    return WatchedClasses(own=2, theirs=0, threshold=0.6, image=image)


WEIGHTS = rand(2, LENGTH, seed=5)
GRID = (SIDE // 2) ** 2
PARTS: dict[str, tuple[Any, Plan]] = {
    "watch": ([Watch(0, WEIGHTS), Watch(2, WEIGHTS[1:])], GROUPED),
    "route queries and keys": ([Route(row=2, query=0, key=0, layers=DECODER)], GROUPED),
    "route keys and values": (
        [Route(row=2, key=0, value=0, layers=DECODER), Route(row=1, value=2, layers=Layers(min_index=3))],
        GROUPED,
    ),
    "mix": ([mix()], GROUPED),
    "two mixes": ([mix(), mix(1, 2, 7)], Plan(mixes=3)),
    "mix, watch and route": (
        [mix(), Watch(0, WEIGHTS), Watch(2, WEIGHTS), Route(row=2, query=0, key=1, layers=DECODER)],
        GROUPED,
    ),
    "union": (
        [Read(row=2, sources=(0, 2), layers=DECODER), Read(row=0, sources=(1, 0), layers=DECODER)],
        Plan(reads=(Reads(layers=DECODER, slots=3, sources=2),)),
    ),
    "a read of a routed row": (
        [Read(row=2, sources=(0, 2), layers=DECODER), Route(row=0, key=1, value=1, layers=DECODER)],
        Plan(routes=True, reads=(Reads(layers=DECODER, slots=2, sources=2),)),
    ),
    "given classes": (
        [Read(row=2, sources=(0, 1), layers=DECODER, classes=classes(hides=False))],
        Plan(reads=(Reads(layers=DECODER, slots=1, sources=2, classes="given"),)),
    ),
    "hidden places": (
        [
            Read(row=2, sources=(0, 1), layers=DECODER, classes=classes(hides=True)),
            Read(row=1, sources=(1, 0), layers=DECODER),
        ],
        Plan(reads=(Reads(layers=DECODER, slots=2, sources=2, classes="given"),)),
    ),
    "weighted places": (
        [
            Read(
                row=2,
                sources=(2, 0, 1),
                layers=DECODER,
                classes=classes(hides=True, sources=3),
                weights=(1.0, 3.0, 2.0),
            ),
            Read(row=1, sources=(1, 0, 2), layers=DECODER, classes=classes(hides=True, sources=3)),
        ],
        Plan(reads=(Reads(layers=DECODER, slots=2, sources=3, classes="given", weighted=True),)),
    ),
    "watched classes": (
        [
            Watch(0, WEIGHTS[:1]),
            Watch(1, WEIGHTS[:1]),
            Watch(2, WEIGHTS[1:]),
            Read(row=2, sources=(0,), layers=Layers(), classes=watched_classes()),
            Read(row=1, sources=(0,), layers=Layers()),
        ],
        Plan(sums=1, reads=(Reads(layers=Layers(), slots=2, classes="watched"),)),
    ),
    "features": (
        [TakeFeatures(2, 0, Residuals(4, 1)), TakeFeatures(1, 0, Residuals(4, 1)), TakeFeatures(0, 1, Residuals(1, 0))],
        Plan(takes=(Residuals(4, 1), Residuals(1, 0))),
    ),
    "blend": (
        [
            Blend(
                row=row,
                layers=COARSE,
                sources=(rand(GRID, seed=row) * GROUP).long(),
                places=(rand(GRID, seed=row + 1) * GRID).long(),
                shares=rand(GRID, seed=row + 2),
            )
            for row in (2, 0)
        ],
        Plan(blends=(Blends(layers=COARSE, slots=2),)),
    ),
    "mixed queries": (
        [
            MixQueries(row=2, source=0, layers=DECODER, share=0.7),
            MixQueries(row=1, source=2, layers=COARSE, share=0.25),
            Read(row=2, sources=(0, 2), layers=DECODER),
        ],
        Plan(query_mixes=True, reads=(Reads(layers=DECODER, slots=1, sources=2),)),
    ),
    "records of decoder blocks": (
        [Record(2, ("decoder", 4)), Record(0, ("decoder", 1)), MixQueries(row=1, source=0, layers=DECODER, share=1.0)],
        Plan(
            query_mixes=True,
            records=(Records(where=("decoder", 4), slots=2), Records(where=("decoder", 1), slots=1)),
        ),
    ),
    "watched elsewhere": (
        [Watch(0, WEIGHTS), Watch(1, WEIGHTS[1:])],
        Plan(sums=2, watched=Layers(place="up", min_factor=2, max_factor=2, min_index_in_place=3)),
    ),
    "add": (
        [Add(row=2, where=BLOCK, directions=rand(2, 32) - 0.5, maps=rand(2, 2, 2))],
        Plan(adds=(Adds(where=BLOCK, slots=2, directions=3),)),
    ),
    "add relative, and record": (
        [
            Add(row=2, where=BLOCK, directions=rand(1, 32) - 0.5, maps=rand(1, 2, 2)),
            Add(row=2, where=BLOCK, directions=rand(2, 32) - 0.5, maps=rand(2, 2, 2), relative=True),
            Record(2, BLOCK),
            Record(0, BLOCK),
            Record(1, ("mid", 0)),
        ],
        Plan(
            adds=(Adds(where=BLOCK, slots=1), Adds(where=BLOCK, slots=1, directions=2)),
            records=(Records(where=BLOCK, slots=2), Records(where=("mid", 0), slots=1)),
        ),
    ),
}
PARTS["everything"] = (
    [
        *PARTS["mix, watch and route"][0],
        *PARTS["blend"][0],
        *PARTS["features"][0],
        *PARTS["add relative, and record"][0],
        Read(row=1, sources=(0, 2), layers=DECODER, classes=classes(hides=True)),
    ],
    Plan(
        sums=4,
        routes=True,
        mixes=1,
        reads=(Reads(layers=DECODER, slots=2, sources=2, classes="given"),),
        takes=PARTS["features"][1].takes,
        blends=PARTS["blend"][1].blends,
        adds=PARTS["add relative, and record"][1].adds,
        records=PARTS["add relative, and record"][1].records,
    ),
)


def stacked(groups: Groups, plan: Plan, dtype: torch.dtype, *, whole: bool) -> Stacked | None:
    shape = Shape(plan=plan, group=GROUP, rows=ROWS, length=LENGTH, height=SIDE, width=SIDE)
    watch = torch.zeros((ROWS, plan.sums, LENGTH), dtype=dtype) if any(one.watches for _, one in groups) else None
    for start, control in groups:
        for part in control.parts:
            if isinstance(part, Watch) and watch is not None:
                watch[start + part.row, : len(part.weights)] = part.weights
    return stack(groups, watch, shape, opened(dtype).openings, dtype=dtype, whole=whole)


def run(groups: Groups, plan: Plan, dtype: torch.dtype, *, whole: bool = False) -> Any:
    with torch.no_grad():
        return opened(dtype).predict(*inputs(dtype), stacked(groups, plan, dtype, whole=whole))


def both_groups(name: str) -> tuple[Groups, Plan]:
    """The first group has all parts of a case, the second the first of them; the third is missing."""
    parts, plan = PARTS[name]
    second = [part for part in parts if isinstance(part, (Watch, Mix, Record)) or part is parts[0]]
    return [(0, Control(tuple(parts), plan)), (GROUP, Control(tuple(second), plan))], plan


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 5e-6)])
def test_every_part_does_what_its_formula_says(name: str, dtype: torch.dtype, tolerance: float) -> None:
    groups, plan = both_groups(name)
    plain = PlainControls(unet(dtype), groups)
    expected = plain.predict(*inputs(dtype))
    output, watched, recorded = run(groups, plan, dtype)
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    for row in plain.maps:
        field = plain.watched(row)
        torch.testing.assert_close(watched[row, : len(field)], field, atol=tolerance, rtol=tolerance)
    found = [
        (start + part.row, part.where, tensor)
        for start, control in groups
        for part, tensor in zip(
            [one for one in control.parts if isinstance(one, Record)],
            seen_by(control, start, GROUP, watched, recorded).recorded,
            strict=True,
        )
    ]
    assert len(found) == len(plain.recorded)
    for row, where, tensor in plain.recorded:
        (ours,) = [other for at, place, other in found if (at, place) == (row, where)]
        torch.testing.assert_close(ours, tensor, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("whole", [False, True])
def test_rows_without_a_part_keep_their_bits_whatever_the_others_do(name: str, whole: bool) -> None:
    groups, plan = both_groups(name)
    free = run([], plan, torch.float32, whole=False)[0]
    output = run(groups, plan, torch.float32, whole=whole)[0]
    changed = {start + part.row for start, one in groups for part in one.parts if not isinstance(part, (Watch, Record))}
    assert {row for row in range(ROWS) if not torch.equal(output[row], free[row])} == changed


@pytest.mark.parametrize("name", PARTS)
def test_a_group_has_the_same_bits_in_whatever_company_and_layout(name: str) -> None:
    groups, plan = both_groups(name)
    together = run(groups, plan, torch.float32)
    for start, control in groups:
        rows = slice(start, start + GROUP)
        for company, whole in (([(start, control)], False), ([(start, control)], True), (groups, True)):
            output, watched, recorded = run(company, plan, torch.float32, whole=whole)
            assert torch.equal(output[rows], together[0][rows])
            ours, theirs = (
                seen_by(control, start, GROUP, one[1], one[2]) for one in ((output, watched, recorded), together)
            )
            assert (ours.watched is None) == (theirs.watched is None)
            if ours.watched is not None and theirs.watched is not None:
                assert torch.equal(ours.watched, theirs.watched)
            assert all(torch.equal(one, other) for one, other in zip(ours.recorded, theirs.recorded, strict=True))


@pytest.mark.parametrize("name", ["given classes", "hidden places", "watched classes"])
def test_rows_that_keep_to_classes_are_attended_to_few_at_a_time_with_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, plan = both_groups(name)
    together = run(groups, plan, torch.float32)[0]
    monkeypatch.setattr(attention, "PAIRS", 1)
    assert torch.equal(run(groups, plan, torch.float32)[0], together)


def test_places_read_their_class_and_what_reads_nothing_reads_all_that_is_not_hidden() -> None:
    own = torch.tensor([[BACKGROUND, FOREGROUND, ANY, HIDDEN]])
    for theirs, expected in (
        ((BACKGROUND, FOREGROUND, ANY, HIDDEN), ("1010", "0110", "1110", "1110")),
        ((BACKGROUND, BACKGROUND, HIDDEN, HIDDEN), ("1100", "1100", "1100", "1100")),
        ((HIDDEN, HIDDEN, HIDDEN, HIDDEN), ("1111", "1111", "1111", "1111")),
    ):
        found = readable(own, torch.tensor([theirs]))[0]
        assert ["".join(str(int(one)) for one in row) for row in found] == list(expected)


class Copies(TorchDispatchMode):
    """Counts copies from the CPU to the meta device, which stands for a GPU: it computes nothing, and nobody can mix
    the two by mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            given = args[-1]  # what is copied
            self.count += made.is_meta and not given.is_meta
        return made


@cache
def on_meta() -> StableDiffusion:
    backbone: Any = load_backbone(ModelConfig(name=str(TINY_SD)), device="cpu")
    device = torch.device("meta")
    return StableDiffusion(
        unet=unet(torch.float32).to(device),
        autoencoder=backbone.autoencoder,
        text=backbone.text,
        schedule=backbone.schedule,
        offers=backbone.offers,
        record=backbone.record,
        device=device,
    )


def copies(plan: Plan, groups: Groups, rows: int, group: int) -> int:
    """Host-to-device copies of one call; prompts lie on the device, as the engine keeps them."""
    watch = torch.ones((rows, plan.sums, LENGTH)) if plan.sums else None
    prompt = Conditioning("", {"embedding": torch.zeros((LENGTH, 32), device="meta")})
    call = NetworkCall(
        latents=torch.zeros((rows, 4, SIDE, SIDE)),
        levels=levels(tiny_sd(), [401] * rows),
        conditioning=[prompt] * rows,
        watch=watch,
        controls=groups,
        plan=plan,
        group=group,
    )
    backbone = on_meta()
    with Copies() as copied:
        backbone.denoise(call)
    return copied.count


def test_controls_reach_the_device_in_two_copies_whatever_they_are() -> None:
    plain = copies(Plan(), [], GROUP, 1)
    counts: dict[int, dict[str, int]] = {}
    for rows in (GROUP, 4 * GROUP):
        counts[rows] = {"no control": copies(Plan(), [], rows, 1) - plain}
        for name, (parts, plan) in PARTS.items():
            groups = [(start, Control(tuple(parts), plan)) for start in range(0, rows, GROUP)]
            counts[rows][name] = copies(plan, groups, rows, GROUP) - plain
    print(f"copies to the device: {plain} of a call without controls, and for controls: {counts[GROUP]}")
    assert counts[GROUP] == counts[4 * GROUP]
    assert counts[GROUP].pop("no control") == 0
    assert set(counts[GROUP].values()) == {1, 2}
