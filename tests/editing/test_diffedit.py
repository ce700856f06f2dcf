"""DiffEdit: the mask against algebra, what stays outside of it, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.diffusion.masks import above_average, dilated
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.diffedit import DiffEdit
from pipeline.engine.engine import Engine
from pipeline.errors import PrepareError, RecipeError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.looking.counting import RowCounter
from pipeline.recipe import recipe_from
from pipeline.records import EditedLatents, EditRequest, Trajectory, WordPair
from tests.facts import EditorFacts
from tests.methods import BACKBONES, analytic, image_latents, invert_and_edit, source, tiny_sd

DRAWS = 10
FACTS = EditorFacts(rows=2, rows_once=2 * DRAWS, finds_region=True)
INVERSION = DDIMInversion(num_steps=4, skip_steps=1)
N = 4
DOG = EditRequest(source_prompt="a photo of a cat", target_prompt="a photo of a dog")
every_backbone = pytest.mark.parametrize("backbone", [make() for make in BACKBONES.values()], ids=list(BACKBONES))


def run(
    backbone: Any, editor: DiffEdit, request: EditRequest = DOG, number: int = 1, **options: Any
) -> tuple[Trajectory, EditedLatents]:
    given = source(backbone, number, request.source_prompt)
    return Engine(backbone, call_size=8).run_one(invert_and_edit(given, request, INVERSION, editor, **options))


def words(source_words: tuple[str, ...], target_words: tuple[str, ...]) -> EditRequest:
    return DOG.model_copy(update={"blend_words": WordPair(source=source_words, target=target_words)})


SAME = DOG.model_copy(update={"target_prompt": DOG.source_prompt})


@pytest.mark.parametrize(
    ("settings", "request_", "rows"),
    [
        ({}, DOG, 2 * 10 + 2 * N),
        ({"num_maps": 3, "guidance_scale": 1.0}, DOG, 2 * 3 + N),
        ({"num_maps": 3}, words((), ("dog", "grass")), 3 * 3 + 2 * N),  # the source's rows are shared
        ({"num_maps": 3}, words(("cat", "sand"), ("dog", "grass")), 4 * 3 + 2 * N),
        ({}, SAME, 0),
    ],
)
def test_rows_are_draws_times_texts_and_a_plan_counts_the_same(
    settings: dict[str, Any], request_: EditRequest, rows: int
) -> None:
    sections = {
        "source": {"shards": "-"},
        "sink": {"folder": "-"},
        "inversion": INVERSION.model_dump(),
        "editing": {"method": "diffedit", **settings},
    }
    recipe = recipe_from(sections)
    engine = Engine(analytic(), call_size=8)
    engine.run_one(
        invert_and_edit(source(analytic(), 1, request_.source_prompt), request_, recipe.inversion, recipe.editing)
    )
    assert engine.stats.network_rows == N + rows
    assert RowCounter(recipe).rows({"edit": request_}) == N + rows


def test_a_users_mask_stands_instead_of_a_computed_one() -> None:
    engine, mask = Engine(tiny_sd(), call_size=8), torch.zeros((12, 12))
    mask[:, :4], mask[:, 4:8] = 0.5, 0.49
    generator = invert_and_edit(source(tiny_sd(), 1), DOG, INVERSION, DiffEdit(dilate=2), user_mask=mask)
    trajectory, edited = engine.run_one(generator)
    assert engine.stats.network_rows == N + 2 * N
    assert torch.equal(edited.masks[0], mask >= 0.5)
    assert torch.equal(edited.latents[:, :, 4:], trajectory.latents[-1][:, :, 4:])


def test_the_mask_is_where_the_means_of_the_two_texts_differ() -> None:
    backbone = analytic(torch.float64)
    cat, dog = (backbone.encode_text(text).embedding for text in (DOG.source_prompt, DOG.target_prompt))
    means = backbone.means(torch.stack([cat, dog]), 12, 12)
    apart = (means[0] - means[1]).abs().mean(dim=0)
    for ratio in (1.0, 3.0):
        _, edited = run(backbone, DiffEdit(mask_thresholding_ratio=ratio))
        assert torch.equal(edited.masks[0], apart > ratio / 2 * apart.mean())
        assert edited.mask.any()


@every_backbone
def test_a_larger_ratio_gives_a_part_of_the_mask(backbone: Any) -> None:
    masks = [run(backbone, DiffEdit(num_maps=2, mask_thresholding_ratio=ratio))[1].mask for ratio in (2.0, 2.4, 3.0)]
    assert masks[0].any()
    assert not (masks[1] & ~masks[0]).any()
    assert not (masks[2] & ~masks[1]).any()
    assert masks[2].sum() < masks[0].sum()


def test_the_mask_does_not_depend_on_guidance_and_follows_the_editing_noise() -> None:
    one, other = (run(tiny_sd(), DiffEdit(num_maps=2, guidance_scale=scale))[1] for scale in (1.0, 7.5))
    assert torch.equal(one.masks, other.masks)
    trajectory, _ = run(tiny_sd(), DiffEdit(num_maps=2))
    engine = Engine(tiny_sd(), call_size=8)
    texts = [(DOG.source_prompt, DOG.target_prompt)]
    maps = [engine.run_one(DiffEdit(num_maps=count).difference_maps(trajectory, texts)) for count in (2, 2, 3)]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


@every_backbone
def test_several_phrases_give_the_union_of_their_masks(backbone: Any) -> None:
    editor = DiffEdit(num_maps=2)
    dog, grass = (run(backbone, editor, words(("cat",), (target,)))[1].mask for target in ("dog", "green grass"))
    _, both = run(backbone, editor, words(("cat",), ("dog", "green grass")))
    assert both.masks.shape == (1, 12, 12)
    assert torch.equal(both.mask, dog | grass)
    assert not torch.equal(dog, grass)


@every_backbone
def test_outside_of_the_mask_the_encoded_image_stays(backbone: Any) -> None:
    trajectory, edited = run(backbone, DiffEdit(num_maps=2), observe=True)
    outside = ~edited.mask
    assert torch.equal(edited.latents[:, outside], image_latents(backbone, 1)[:, outside])
    assert not torch.equal(edited.latents[:, edited.mask], image_latents(backbone, 1)[:, edited.mask])
    for record in edited.history:
        assert torch.equal(record.latents[:, outside], trajectory.latents[record.step + 1][:, outside])


def test_the_references_background_is_one_level_noisier() -> None:
    trajectory, edited = run(tiny_sd(), DiffEdit(num_maps=2, background="reference"))
    assert torch.equal(edited.latents[:, ~edited.mask], trajectory.latents[-2][:, ~edited.mask])


def test_a_full_mask_is_plain_guided_sampling() -> None:
    _, edited = run(tiny_sd(), DiffEdit(), user_mask=torch.ones((12, 12)))
    generator = invert_and_edit(source(tiny_sd(), 1, DOG.source_prompt), DOG, INVERSION, ClassifierFreeGuidance())
    assert torch.equal(edited.latents, Engine(tiny_sd(), call_size=8).run_one(generator)[1].latents)


@pytest.mark.parametrize(
    ("request_", "mask"), [(SAME, None), (DOG, torch.zeros((12, 12)))], ids=["equal texts", "user's"]
)
def test_an_empty_mask_returns_the_encoded_image(request_: EditRequest, mask: torch.Tensor | None) -> None:
    _, edited = run(tiny_sd(), DiffEdit(), request_, user_mask=mask)
    assert torch.equal(edited.latents, image_latents(tiny_sd(), 1))
    assert not edited.mask.any()


def test_an_image_has_the_same_bits_alone_and_beside_neighbours() -> None:
    alone = run(tiny_sd(), DiffEdit(num_maps=2))[1]
    edits = [
        invert_and_edit(source(tiny_sd(), number, DOG.source_prompt), DOG, INVERSION, DiffEdit(num_maps=maps))
        for number, maps in ((2, 3), (1, 2), (3, 1))
    ]
    results = {finished.index: finished.value for finished in Engine(tiny_sd(), call_size=8).run(edits)}
    assert torch.equal(results[1][1].latents, alone.latents)
    assert torch.equal(results[1][1].masks, alone.masks)


def test_dilation_grows_a_mask_by_its_neighbours() -> None:
    mask = torch.zeros((5, 6), dtype=torch.bool)
    mask[0, 0] = mask[3, 4] = True
    once, twice = dilated(mask, 1), dilated(mask, 2)
    assert once.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] + [[r, c] for r in (2, 3, 4) for c in (3, 4, 5)]
    assert torch.equal(twice, dilated(once, 1))
    assert torch.equal(dilated(mask, 0), mask)


def test_nothing_is_above_the_average_of_zeros() -> None:
    assert not above_average(torch.zeros((2, 3, 3)), 3.0).any()


def test_bad_input_is_refused() -> None:
    with pytest.raises(PrepareError, match="no target_prompt"):
        DiffEdit().check(EditRequest(source_prompt="a cat"), DDIMInversion(num_steps=N))
    with pytest.raises(PrepareError, match="3 phrases under source and 2 under target"):
        DiffEdit().check(words(("a", "b", "c"), ("d", "e")), DDIMInversion(num_steps=N))
    sections = {"source": {"shards": "-"}, "sink": {"folder": "-"}, "inversion": INVERSION.model_dump()}
    with pytest.raises(RecipeError, match=r"mask_encode_strength 0\.1 of 5 steps is less than one"):
        recipe_from({**sections, "editing": {"method": "diffedit", "mask_encode_strength": 0.1}})
    with pytest.raises(PrepareError, match="less than one"):
        run(analytic(), DiffEdit(mask_encode_strength=0.1))
