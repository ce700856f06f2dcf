"""Concepts written into the network: what zero strength, regions, signs and branches do, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.diffusion.sparse_autoencoder import SparseAutoencoder, codes_of_map, initial
from pipeline.editing.concepts import Concepts
from pipeline.editing.steering import Places, box_on, control_of, terms_of
from pipeline.engine.blocks import blocks_of
from pipeline.engine.calls import Denoise, Denoised
from pipeline.engine.controls import Control, Plan, Record, Records, Transformer
from pipeline.engine.engine import Engine
from pipeline.errors import EditError, PrepareError
from pipeline.interventions import Autoencoders, BlockAutoencoder, ConceptFeatures, Intervention, Target, Telling
from pipeline.inversion.base import Inversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.looking.counting import RowCounter
from pipeline.models.loading import load_backbone
from pipeline.models.unet_layout import openings_of_config
from pipeline.placement import Placement
from pipeline.recipe import ModelConfig, recipe_from
from pipeline.recordings import Attended, Recording
from pipeline.records import EditRequest, Source
from tests.facts import EditorFacts
from tests.golden.replay import TINY_SD, TINY_SDXL
from tests.methods import SIDE, levels, source, tiny_sd

FACTS = EditorFacts(rows=3, rows_after={"ddim": 2, "ddpm": 2, "noise": 2})
UP, DOWN = "up_blocks.1.attentions.0", "down_blocks.2.attentions.1"
N = 4  # steps
EVERYWHERE = Telling(features=(3,), weights=(1.0,), threshold=-1.0, iou=0.9)
TWO = Telling(features=(1, 5), weights=(2.0, -1.0), threshold=0.1, iou=0.4)
WHOLE = ConceptFeatures(telling=EVERYWHERE, amounts=(1.0,), placing=EVERYWHERE)
PAIR = ConceptFeatures(telling=TWO, amounts=(1.0, -0.5), placing=TWO)
EARLY = {"blocks": [UP], "times": [0.75, 0.5], "positions": None}


def placed(**changes: float) -> ConceptFeatures:
    """The second concept, with its place told otherwise."""
    return dataclasses.replace(PAIR, placing=dataclasses.replace(TWO, **changes))


def blocks() -> Mapping[str, Transformer]:
    return blocks_of(tiny_sd().offers.openings)


def autoencoder(block: str) -> SparseAutoencoder:
    size = blocks()[block].channels
    sample = torch.randn((64, size), generator=torch.Generator().manual_seed(1))
    return initial(sample, 4 * size, 4, torch.Generator().manual_seed(2))


def library(*names: str, timestep: float | None = None, **concepts: ConceptFeatures) -> Autoencoders:
    entries = tuple(
        BlockAutoencoder(
            autoencoder=autoencoder(name),
            block=name,
            branch="cond",
            timestep=timestep,
            model="tiny",
            model_digest="",
            concepts=concepts or {"hat": WHOLE, "beard": PAIR},
        )
        for name in names or (UP,)
    )
    return Autoencoders(entries, "lib")


def given(books: Autoencoders | None = None, dtype: torch.dtype = torch.float32) -> Source:
    return dataclasses.replace(source(tiny_sd(dtype), 1), libraries={"lib": books or library()}, blocks=blocks())


def made(
    *interventions: dict[str, Any],
    books: Autoencoders | None = None,
    inversion: Inversion | None = None,
    target: str = "a cat",
    engine: Engine | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Any:
    """One image by the editor, from noise unless said otherwise."""
    engine = engine or Engine(tiny_sd(dtype), call_size=8)
    request = EditRequest(target_prompt=target, interventions=[Intervention(**one) for one in interventions])
    editor = Concepts(**{"autoencoders": "lib", "guidance_scale": 3.0, **settings})
    trajectory = engine.run_one((inversion or NoiseStart(num_steps=N)).invert(given(books, dtype)))
    return engine.run_one(editor.edit(trajectory, request))


def test_blocks_have_the_names_that_diffusers_gives_them() -> None:
    unet = {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
    }
    found = blocks_of(openings_of_config(unet))
    assert list(found) == [
        *(f"down_blocks.{level}.attentions.{number}" for level in range(3) for number in range(2)),
        "mid_block.attentions.0",
        *(f"up_blocks.{level}.attentions.{number}" for level in (1, 2, 3) for number in range(3)),
    ]
    assert (found[UP].factor, found[UP].channels, found[DOWN].factor) == (4, 1280, 4)


@pytest.mark.parametrize("name", [str(TINY_SD), str(TINY_SDXL), "demo"], ids=["sd", "sdxl", "demo"])
def test_blocks_of_loaded_models_are_their_modules(name: str) -> None:
    backbone = load_backbone(ModelConfig(name=name), dtype=torch.float32, device="cpu")
    modules = dict(backbone._network.unet.named_modules())  # type: ignore[attr-defined]
    found = blocks_of(backbone.offers.openings)
    assert {name: block.channels for name, block in found.items()} == {
        name: module.in_channels for name, module in modules.items() if type(module).__name__ == "Transformer2DModel"
    }


# What is written ----------------------------------------------------------------------------------------------------


def test_without_strength_or_outside_of_its_window_nothing_differs_in_any_bit() -> None:
    plain = made().latents
    assert torch.equal(made({"add": ["hat"], "strength": 0.0}).latents, plain)
    changed = made({"add": ["hat"], "strength": 2.0, "window": [0.5, 1.0]}).latents
    assert not torch.allclose(changed, plain)


def test_a_write_of_nothing_is_the_untouched_network_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is left out for having no strength, and in steps before a window of one that has."""
    plain = made().latents
    monkeypatch.setattr(Intervention, "can_matter", True)
    for more in ({}, {"relative": True}, {"branch": "both"}, {"region": [0.0, 0.0, 0.5, 0.5], "subtract": "elsewhere"}):
        assert torch.equal(made({"add": ["hat", "beard"], "strength": 0.0, **more}).latents, plain), more
    engine = Engine(tiny_sd(), call_size=8)
    late = made({"add": ["hat"], "strength": 2.0, "window": [0.75, 1.0]}, engine=engine, record=EARLY)
    early = made(record=EARLY)
    assert not torch.equal(late.latents, plain)
    assert all(
        torch.equal(one.vectors, other.vectors) for one, other in zip(late.recorded, early.recorded, strict=True)
    )


def written(terms: list[Any], channels: int, grid: tuple[int, int]) -> Tensor:
    """(C, h', w'): the sum of absolute terms, as the prompt's row has it."""
    found = torch.zeros((channels, *grid))
    for term in terms:
        assert not term.relative
        found += torch.einsum("kc,khw->chw", term.directions, term.maps)
    return found


def delta(intervention: dict[str, Any], **places: Any) -> Tensor:
    """What one intervention writes to a block of 6 x 6 places."""
    books, block = library(), blocks()[UP]
    one = Intervention(relative=False, **intervention)
    (target,) = books.targets(one, 500.0, 1000.0)
    return written(terms_of(target, Places(one, None, **places), block, (6, 6)), block.channels, (6, 6))


def test_what_is_added_is_linear_in_the_strength_and_a_negative_one_takes_it_back() -> None:
    one = delta({"add": ["hat", "beard"], "strength": 1.5})
    directions = autoencoder(UP).directions
    expected = 1.5 * (directions[3] + directions[1] - 0.5 * directions[5])
    torch.testing.assert_close(one, expected[:, None, None].expand(-1, 6, 6))
    torch.testing.assert_close(delta({"add": ["hat", "beard"], "strength": 3.0}), 2 * one)
    torch.testing.assert_close(delta({"add": ["hat", "beard"], "strength": -1.5}), -one)
    torch.testing.assert_close(delta({"remove": ["hat", "beard"], "strength": 1.5}), -one)
    by_number = delta({"features": {UP: [3]}})
    torch.testing.assert_close(by_number, delta({"add": ["hat"]}))


def test_a_region_bounds_what_is_added_and_subtracting_reaches_beyond_it() -> None:
    everywhere = delta({"add": ["hat"]})
    box = {"add": ["hat"], "region": [0.0, 0.0, 0.5, 1 / 3]}
    inside = torch.zeros((6, 6))
    inside[:2, :3] = 1.0
    torch.testing.assert_close(delta(box), everywhere * inside)
    torch.testing.assert_close(delta({**box, "subtract": "elsewhere"}), everywhere * (2 * inside - 1))
    seen = torch.zeros((3, 3), dtype=torch.bool)
    seen[0, 1], seen[2, 2] = True, True  # of another block, at half the size
    cells = seen.repeat_interleave(2, 0).repeat_interleave(2, 1)
    moved = delta({**box, "subtract": "predicted"}, added_predicted=seen)
    torch.testing.assert_close(moved, everywhere * (inside - cells * (1 - inside)))
    assert not moved[:, 2, 0].any(), "neither inside nor predicted"


def test_codes_that_are_active_are_taken_away_as_they_are() -> None:
    codes = torch.rand((6, 6, autoencoder(UP).num_features), generator=torch.Generator().manual_seed(3))
    taken = delta({"remove": ["beard"], "subtract": "active", "strength": 7.0}, codes={UP: codes})
    expected = -codes[..., 1, None] * autoencoder(UP).directions[1]  # the feature that speaks for it, not against it
    torch.testing.assert_close(taken, expected.movedim(-1, 0))
    box = {"add": ["hat"], "subtract": "active", "region": [0.0, 0.0, 1.0, 0.5]}
    taken = delta(box, codes={UP: codes})
    torch.testing.assert_close(taken[:, :3], delta({"add": ["hat"]})[:, :3])
    torch.testing.assert_close(taken[:, 4, 2], -codes[4, 2, 3] * autoencoder(UP).directions[3])


def test_a_relative_strength_is_a_share_of_what_the_block_wrote_at_the_place() -> None:
    block = blocks()[UP]
    one = Intervention(add=("hat", "beard"), region=(0.0, 0.0, 1.0, 1.0), strength=0.5)
    assert one.is_relative
    (target,) = library().targets(one, 500.0, 1000.0)
    terms = terms_of(target, Places(one, None), block, (3, 3))
    plain, changed = (recorded_with(terms if with_them else []) for with_them in (False, True))
    assert torch.equal(plain[0], changed[0]), "a record sees what the block wrote itself"
    moved = torch.stack([changed[1] - plain[1]])[0]
    assert moved.abs().max() > 0, "the next block reads what was added"
    control = control_of(terms, [], ["cond"])
    assert control is not None
    (add,) = control.parts
    lengths = add.directions.norm(dim=1) * add.maps.amax(dim=(1, 2))  # type: ignore[union-attr]
    torch.testing.assert_close(lengths, torch.tensor([0.5]))
    assert add.relative  # type: ignore[union-attr]


def recorded_with(terms: list[Any]) -> tuple[Tensor, Tensor]:
    """What two blocks write at one step, under terms."""
    backbone = tiny_sd()
    later = blocks()["up_blocks.1.attentions.1"]
    control = control_of(terms, [], ["cond"]) if terms else None
    parts = control.parts if control is not None else ()
    plan = control.plan if control is not None else None
    wheres = [(block.place, block.index_in_place) for block in (blocks()[UP], later)]
    rooms = tuple(Records(where=where, slots=1) for where in wheres)
    both = dataclasses.replace(plan, records=rooms) if plan is not None else None
    whole = Control((*parts, *(Record(0, where) for where in wheres)), both or Plan(records=rooms))
    engine = Engine(backbone, call_size=8)

    def ask() -> Any:
        latents = source(backbone, 1).latents[None]
        denoised: Denoised = yield Denoise(latents, levels(backbone, [500]), [backbone.encode_text("a")], control=whole)
        assert denoised.seen is not None
        return denoised.seen.recorded

    return engine.run_one(ask())


def test_branches_are_written_to_as_named() -> None:
    one = {"add": ["hat"], "strength": 2.0}
    results = {branch: made({**one, "branch": branch}).latents for branch in ("cond", "uncond", "both")}
    assert len({latents.sum().item() for latents in results.values()}) == 3
    block = blocks()[UP]
    wanted = Intervention(add=("hat",), branch="both", relative=False)
    (target,) = library().targets(wanted, 0.0, 1000.0)
    control = control_of(terms_of(target, Places(wanted, None), block, (3, 3)), [], ["uncond", "cond"])
    assert control is not None
    uncond, cond = control.parts
    assert (uncond.row, cond.row) == (0, 1)
    assert torch.equal(uncond.maps, -cond.maps)  # type: ignore[union-attr]
    with pytest.raises(EditError, match="the uncond branch is named"):
        made({**one, "branch": "both"}, guidance_scale=None, target="")


def test_an_image_comes_back_without_interventions_and_differs_in_a_region_with_one() -> None:
    """In float64: a random network amplifies rounding."""
    for inversion in (DDPMInversion(num_steps=N), DirectInversion(num_steps=N)):
        returned = made(inversion=inversion, guidance_scale=None, target="", dtype=torch.float64)
        assert float((returned.latents - given().latents).abs().max()) < 1e-3
        assert returned.masks is None
    box = {"add": ["hat"], "strength": 2.0, "region": [0.0, 0.0, 0.5, 0.5]}
    changed = made(box, inversion=DDPMInversion(num_steps=N), guidance_scale=None, target="", dtype=torch.float64)
    assert float((changed.latents - given().latents).abs().max()) > 1e-2
    expected = torch.zeros((SIDE, SIDE), dtype=torch.bool)
    expected[: SIDE // 2, : SIDE // 2] = True
    assert torch.equal(changed.masks[0], expected)


def test_a_predicted_region_is_where_the_concept_is_when_the_window_begins() -> None:
    one = {"add": ["hat"], "remove": ["beard"], "region": "predicted", "window": [0.25, 1.0], "strength": 0.5}
    everywhere = made(one, books=library(hat=WHOLE, beard=placed(threshold=-1e9)))
    assert bool(everywhere.masks.all())
    with pytest.raises(EditError, match="beard was predicted nowhere"):
        made(one, books=library(hat=WHOLE, beard=placed(threshold=1e9)))


def test_the_autoencoder_that_tells_a_concept_best_says_where_it_is() -> None:
    good = placed(iou=0.8)
    books = library(UP, DOWN)
    first, second = books.entries
    books = Autoencoders((first, dataclasses.replace(second, concepts={"beard": good})), "lib")
    entry, found = books.located("beard", 500.0, 1000.0)
    assert (entry.block, found) == (DOWN, good)


def test_batches_and_neighbours_change_nothing() -> None:
    engine = Engine(tiny_sd(), call_size=8)
    requests = [
        EditRequest(target_prompt="a cat", interventions=[Intervention(add=(name,), strength=2.0)])
        for name in ("hat", "beard")
    ]
    editor = Concepts(autoencoders="lib", guidance_scale=3.0)
    trajectory = engine.run_one(NoiseStart(num_steps=N).invert(given()))
    together = engine.run_one(editor.edit_all(trajectory, [*requests, EditRequest(target_prompt="a dog")]))
    alone = [engine.run_one(editor.edit(trajectory, request)) for request in requests]
    for one, other in zip(together, alone, strict=False):
        assert torch.equal(one.latents, other.latents)


# What it costs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interventions", "more"),
    [
        ([], 0),
        ([{"add": ["hat"]}], 0),
        ([{"add": ["hat"], "region": "predicted"}], 1),
        ([{"remove": ["hat"], "subtract": "active", "window": [0.0, 0.5]}], 2),
        ([{"remove": ["hat"], "region": "predicted", "subtract": "active"}, {"add": ["beard"]}], N),
    ],
)
def test_rows_are_counted_as_planned(interventions: list[dict[str, Any]], more: int) -> None:
    engine = Engine(tiny_sd(), call_size=8)
    made(*interventions, engine=engine)
    assert engine.stats.network_rows == 2 * N + more
    recipe = recipe_from(
        {
            "source": {"shards": "-"},
            "edits": {"target_prompt": "a cat", "interventions": interventions},
            "inversion": {"method": "noise", "num_steps": N},
            "editing": {"method": "concepts", "autoencoders": "lib", "guidance_scale": 3.0},
            "sink": {"folder": "-"},
        }
    )
    assert RowCounter(recipe).rows(recipe.edits) == 2 * N + more


# Recording ----------------------------------------------------------------------------------------------------------


def test_what_blocks_write_is_recorded_at_the_steps_and_places_asked_for_and_changes_nothing() -> None:
    record = {"blocks": [UP, DOWN], "times": [1.0, 0.5], "branches": ["cond", "uncond"], "positions": 4}
    found = made(record=record)
    assert torch.equal(found.latents, made().latents)
    assert [one.key for one in found.recorded] == [
        key for time in (1.0, 0.5) for key in Recording(**record).all_keys() if key.time == time
    ]
    for one in found.recorded:
        assert one.vectors.shape == (4, blocks()[one.key.block].channels)
        assert one.step == {1.0: 0, 0.5: 1}[one.key.time]
    assert len({one.positions for one in found.recorded}) == 1, "one draw for maps of one size"
    whole = made(record={**record, "positions": None})
    for some, every in zip(found.recorded, whole.recorded, strict=True):
        assert len(every.positions) == every.shape[1] * every.shape[2]
        assert torch.equal(every.vectors[list(some.positions)], some.vectors)


def test_where_the_words_of_a_prompt_are_attended_to_is_recorded_for_those_that_name_something() -> None:
    record = {"blocks": [UP], "times": [1.0, 0.0], "attention": True}
    found = made(record=record, target="a cat on the Mat, a cat")
    attended = [one for one in found.recorded if isinstance(one, Attended)]
    assert [one.words for one in attended] == [("cat", "mat")] * 2
    for one in attended:
        assert one.maps.shape == (2, SIDE // 4, SIDE // 4)
        assert (one.maps > 0).all()
    assert torch.equal(found.latents, made(target="a cat on the Mat, a cat").latents)
    nothing = made(record=record, target="the")
    assert not [one for one in nothing.recorded if isinstance(one, Attended)]


def test_a_strong_concept_is_found_again_by_its_autoencoder() -> None:
    """Of the row that it was added to, at the next block of the same size: the residual stream carries it."""
    made_with = autoencoder(UP)
    written_map = torch.randn((made_with.size, 3, 3), generator=torch.Generator().manual_seed(4)) * 0.1
    before = codes_of_map(made_with, written_map)[..., 3].mean()
    after = codes_of_map(made_with, written_map + 5.0 * made_with.directions[3][:, None, None])[..., 3].mean()
    assert after > before + 1.0


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "names no concept"),
        ({"add": ["hat"], "region": [0.2, 0.1, 1.4, 0.5]}, "not inside the image"),
        ({"add": ["hat"], "region": [0.5, 0.1, 0.2, 0.5]}, "the smaller one first"),
        ({"add": ["hat"], "subtract": "elsewhere"}, "outside a region"),
        ({"remove": ["hat"], "region": [0, 0, 1, 1], "subtract": "elsewhere"}, "about what is added"),
        ({"features": {UP: [1]}, "region": "predicted"}, "no names to predict"),
        ({"add": ["hat"], "window": [0.5, 0.5]}, "no step in it"),
        ({"features": {"conv_in": [1]}}, "names no transformer block"),
        ({"add": ["hat"], "blocks": ["up_blocks.attentions.0"]}, "names no transformer block"),
    ],
)
def test_an_intervention_that_says_nothing_possible_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Intervention(**fields)


@pytest.mark.parametrize(
    ("intervention", "says"),
    [
        ({"add": ["hta"]}, "no concept 'hta'. The nearest are: hat"),
        ({"add": ["hat"], "blocks": [DOWN]}, f"no autoencoder of the block '{DOWN}'. It has: {UP}"),
        ({"features": {UP: [9999]}}, "feature 9999 is named"),
    ],
)
def test_what_the_library_lacks_is_named_with_what_it_has(intervention: dict[str, Any], says: str) -> None:
    with pytest.raises(EditError, match=says.replace(".", r"\.")):
        made(intervention)


def test_an_autoencoder_of_a_far_step_is_not_used() -> None:
    with pytest.raises(EditError, match="is of timestep 1, and the step is at 751, more than 250 away"):
        made({"add": ["hat"]}, books=library(timestep=1.0))
    late = made({"add": ["hat"], "window": [0.75, 1.0]}, books=library(timestep=1.0))
    assert torch.isfinite(late.latents).all()


def test_an_autoencoder_of_another_width_is_refused() -> None:
    (entry,) = library().entries
    narrow = initial(torch.randn((8, 5)), 20, 2, torch.Generator().manual_seed(0))
    with pytest.raises(EditError, match="is for 5 channels"):
        made({"add": ["hat"]}, books=Autoencoders((dataclasses.replace(entry, autoencoder=narrow),), "lib"))


def test_settings_that_cannot_work_are_told_before_a_run() -> None:
    one = EditRequest(target_prompt="a", interventions=[{"add": ["hat"], "branch": "both", "window": [0.3, 0.4]}])
    steps = NoiseStart(num_steps=2)
    told = [problem.reason for problem in Concepts(guidance_scale=1.0).problems(one, steps)]
    assert told == [
        "interventions without editing.autoencoders",
        "a window without a step",
        "the unconditional branch without guidance",
    ]
    with pytest.raises(PrepareError, match="no folder of autoencoders"):
        Concepts().check(EditRequest(interventions=[{"add": ["hat"]}]), NoiseStart(num_steps=4))
    record = Recording(blocks=(UP,), branches=("cond", "uncond"))
    few, one_row = Concepts(record=record, guidance_scale=1.0).pair_problems(steps)
    assert few.startswith("record.times has 3 times, and inversion.num_steps is 2")
    assert one_row.startswith("record.branches has both branches, and at guidance_scale 1 there is one")
    missing = Concepts(record=Recording(blocks=("up_blocks.0.attentions.0",)))
    assert "which the model does not have" in next(missing.model_problems(tiny_sd().offers))


def test_a_region_is_where_the_image_is_on_its_canvas() -> None:
    wide = Placement(original=(50, 100), crop=(0, 0, 50, 100), scaled=(32, 64), offset=(16, 0), canvas=(64, 64))
    found = box_on((0.5, 0.0, 1.0, 1.0), (8, 8), wide)
    expected = torch.zeros((8, 8))
    expected[2:6, 4:] = 1.0
    assert torch.equal(found, expected)
    assert box_on((0.0, 0.0, 0.01, 0.01), (8, 8), None).sum() == 1, "at least one place"
    cut = Placement(original=(100, 200), crop=(0, 50, 100, 100), scaled=(64, 64), offset=(0, 0), canvas=(64, 64))
    with pytest.raises(EditError, match="crop cuts away"):
        box_on((0.0, 0.0, 0.2, 1.0), (8, 8), cut)


def test_a_target_without_anything_to_write_is_none() -> None:
    books = library(UP, DOWN)
    first, second = books.entries
    books = Autoencoders((first, dataclasses.replace(second, concepts={})), "lib")
    targets = books.targets(Intervention(add=("hat",)), 0.0, 1.0)
    assert targets == [Target(first, (WHOLE,), ())]
