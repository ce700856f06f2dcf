"""What every inversion and every editor promise together. A new method needs no line here: see tests/facts.py."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from pipeline.editing import EDITORS
from pipeline.editing.base import EditingMethod
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.calls import Steps
from pipeline.engine.engine import Engine
from pipeline.errors import PrepareError, RecipeError
from pipeline.inversion import INVERSIONS
from pipeline.inversion.base import Inversion
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.negative_prompt import NegativePromptInversion
from pipeline.looking.counting import RowCounter
from pipeline.recipe import Method, Recipe, recipe_from
from pipeline.records import Concept, EditedLatents, EditRequest, Trajectory, WordPair
from pipeline.subjects import Subject
from tests.facts import editor_facts, inversion_facts
from tests.methods import BACKBONES, SIDE, analytic, invert_and_edit, source, tiny_sd

S = 3  # steps
CALL_SIZE = 8
SOURCE_PROMPT = "a cat on a mat"
REQUEST = EditRequest(
    source_prompt=SOURCE_PROMPT,
    target_prompt="a dog on a mat",
    concepts=(Concept(prompt="hat", guidance_scale=2.0, threshold=0.7),),
    blend_words=WordPair(source=("cat",), target=("dog",)),
    subject=Subject(words=("mat",), anchor_prompts=("a mat",)),
)
# What takes a model of its own is asked of that model's family (tests/models/families), what asks a server of its own
# test alone.
PAIRS = [
    (inversion, editor)
    for inversion in INVERSIONS
    for editor in EDITORS
    if EDITORS[editor].fits(INVERSIONS[inversion]) and not editor_facts(editor).served_elsewhere
]
OTHERS = [
    (inversion, editor)
    for inversion in INVERSIONS
    for editor in EDITORS
    if not EDITORS[editor].fits(INVERSIONS[inversion])
]
REFUSING_MASKS = [pair for pair in PAIRS if not EDITORS[pair[1]].keeps_to_masks]
KEEPING_TO_MASKS = [pair for pair in PAIRS if pair not in REFUSING_MASKS]


@cache
def pins(inversion: str) -> bool:
    """Whether a source branch is put back on its trajectory."""
    made = INVERSIONS[inversion](method=inversion, num_steps=S, **inversion_facts(inversion).quick)
    trajectory: Trajectory = Engine(analytic()).run_one(made.invert(source(analytic(), 1, SOURCE_PROMPT)))
    return trajectory.pinned


def has_source_branch(editor: str) -> bool:
    return "source branch" in EDITORS[editor].takes and editor != "reconstruct"  # which walks a source alone


PINNED = [(inversion, editor) for inversion, editor in PAIRS if has_source_branch(editor) and pins(inversion)]


def of_each(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("inversion", "editor"), pairs, ids=["+".join(pair) for pair in pairs])


every_pair = of_each(PAIRS)
every_backbone = pytest.mark.parametrize("backbone", list(BACKBONES))


def method(inversion: str, editor: str) -> Method:
    """A pair with few steps."""
    editing = EDITORS[editor](method=editor, **editor_facts(editor).quick)
    settings = {"num_steps": S, **inversion_facts(inversion).quick}
    if "edit_guidance_scale" in INVERSIONS[inversion].model_fields:
        settings["edit_guidance_scale"] = getattr(editing, "guidance_scale", 7.5)
    return Method(inversion=INVERSIONS[inversion](method=inversion, **settings), editing=editing)


def recipe(inversion: str, editor: str) -> Recipe:
    pair = method(inversion, editor)
    return recipe_from(
        {
            "source": {"shards": "-"},
            "edits": REQUEST.model_dump(exclude_unset=True),
            "inversion": pair.inversion.model_dump(exclude_unset=True),
            "editing": pair.editing.model_dump(exclude_unset=True),
            "sink": {"folder": "-"},
        }
    )


def whole(backbone: Any, inversion: str, editor: str, **options: Any) -> Steps[tuple[Trajectory, EditedLatents]]:
    """One image through a pair; always the same image."""
    pair = method(inversion, editor)
    prompts = pair.editing.inverts_under(REQUEST)._asdict()
    given = dataclasses.replace(source(backbone, 1), **prompts)
    return invert_and_edit(given, REQUEST, pair.inversion, pair.editing, **options)


@pytest.fixture(scope="module")
def beside_all_others() -> Callable[[str], dict[tuple[str, str], EditedLatents]]:
    """Results of all pairs in one engine, where each has all others for neighbours."""
    known: dict[str, dict[tuple[str, str], EditedLatents]] = {}

    def results(name: str) -> dict[tuple[str, str], EditedLatents]:
        if name not in known:
            backbone = BACKBONES[name]()
            engine = Engine(backbone, call_size=CALL_SIZE, images_in_flight=16)
            known[name] = {}
            for finished in engine.run(whole(backbone, *pair) for pair in PAIRS):
                if finished.error is not None:
                    raise finished.error
                known[name][PAIRS[finished.index]] = finished.value[1]
        return known[name]

    return results


@every_backbone
@every_pair
def test_a_pair_gives_the_same_finite_bits_alone_and_beside_all_other_methods(
    backbone: str, inversion: str, editor: str, beside_all_others: Any
) -> None:
    _, alone = Engine(BACKBONES[backbone](), call_size=CALL_SIZE).run_one(
        whole(BACKBONES[backbone](), inversion, editor)
    )
    together = beside_all_others(backbone)[inversion, editor]
    assert torch.isfinite(alone.latents).all()
    assert torch.equal(alone.latents, together.latents)
    assert (alone.masks is None) == (together.masks is None)
    if alone.masks is not None:
        assert torch.equal(alone.masks, together.masks)
        assert alone.masks.dtype == torch.bool
        assert alone.masks.shape[1:] == (SIDE, SIDE)


@every_pair
def test_rows_are_those_of_the_smallest_lossless_layout_or_fewer_and_planning_counts_them(
    inversion: str, editor: str
) -> None:
    (finished,) = Engine(analytic(), call_size=CALL_SIZE).run([whole(analytic(), inversion, editor)])
    assert finished.error is None
    planned = RowCounter(recipe(inversion, editor)).rows({"edit": REQUEST})
    costs = inversion_facts(inversion)
    assert planned <= S * costs.rows + editor_facts(editor).rows_of(inversion, S)
    if costs.stops_early:
        assert finished.network_rows <= planned
    else:
        assert finished.network_rows == planned


def test_no_pair_is_a_copy_of_a_cheaper_one(beside_all_others: Any) -> None:
    """What an inversion takes more time for, its editors must read, or the pair be refused."""
    results = beside_all_others("tiny_sd")
    rows = {pair: RowCounter(recipe(*pair)).rows({"edit": REQUEST}) for pair in PAIRS}
    copies = [
        (one, other)
        for one, other in itertools.permutations(PAIRS, 2)
        if torch.equal(results[one].latents, results[other].latents) and rows[one] < rows[other]
    ]
    assert not copies


def test_guidance_without_a_source_branch_reads_what_the_inversion_brings() -> None:
    """And takes one row a step where target and brought embedding are the same: there is no direction."""
    given = source(tiny_sd(), 1, SOURCE_PROMPT)
    inversion, editing = NegativePromptInversion(num_steps=S), ClassifierFreeGuidance()
    same = EditRequest(source_prompt=SOURCE_PROMPT, target_prompt=SOURCE_PROMPT)
    generators = [
        invert_and_edit(given, same, inversion, editing),
        invert_and_edit(given, same, inversion, Reconstruct()),
        invert_and_edit(given, REQUEST, inversion, editing),
        invert_and_edit(given, REQUEST, DDIMInversion(num_steps=S), editing),
    ]
    finished = sorted(Engine(tiny_sd(), call_size=CALL_SIZE).run(generators), key=lambda one: one.index)
    unchanged, walked, against_source, against_nothing = (one.value[1].latents for one in finished)
    assert torch.equal(unchanged, walked)
    assert finished[0].network_rows == 2 * S
    assert not torch.allclose(against_source, against_nothing, rtol=0.1)


@of_each(REFUSING_MASKS)
def test_a_users_mask_that_cannot_be_kept_to_is_refused(inversion: str, editor: str) -> None:
    with pytest.raises(PrepareError, match="keep to a mask"):
        Engine(analytic()).run_one(whole(analytic(), inversion, editor, user_mask=torch.ones((SIDE, SIDE))))


@of_each(KEEPING_TO_MASKS)
def test_a_users_mask_is_kept_to(inversion: str, editor: str) -> None:
    # A model that answers each latent by itself: what happens inside the mask cannot be seen outside.
    half = torch.zeros((SIDE, SIDE))
    half[:, : SIDE // 2] = 1.0
    engine = Engine(analytic(), call_size=CALL_SIZE)
    _, inside = engine.run_one(whole(analytic(), inversion, editor, user_mask=half))
    _, nowhere = engine.run_one(whole(analytic(), inversion, editor, user_mask=torch.zeros_like(half)))
    _, everywhere = engine.run_one(whole(analytic(), inversion, editor))
    torch.testing.assert_close(inside.latents[..., SIDE // 2 :], nowhere.latents[..., SIDE // 2 :])
    for edited in (everywhere, inside):
        change = float((edited.latents - nowhere.latents)[..., : SIDE // 2].abs().max())
        assert change == 0 if editor == "reconstruct" else change > 1e-1


@of_each(PINNED)
def test_a_pinned_source_is_the_trajectory_bit_for_bit_whatever_the_editor(inversion: str, editor: str) -> None:
    engine = Engine(analytic(), call_size=CALL_SIZE)
    trajectory, edited = engine.run_one(whole(analytic(), inversion, editor, observe=True))
    sources = [(record.step, record.source_latents) for record in edited.history if record.source_latents is not None]
    assert trajectory.pinned
    assert len(sources) == S
    for step, latents in sources:
        assert torch.equal(latents, trajectory.latents[step + 1])


@pytest.mark.parametrize(("inversion", "editor"), OTHERS, ids=["+".join(pair) for pair in OTHERS])
def test_a_pair_that_does_not_fit_is_refused_with_those_that_do(inversion: str, editor: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from(
            {
                "source": {"shards": "-"},
                "inversion": {"method": inversion},
                "editing": {"method": editor},
                "sink": {"folder": "-"},
            }
        )
    (message,) = (text for path, text in caught.value.problems if path == "editing")
    first, second = message.split("It works with: ")[1].split("; that inversion with: ")
    assert first.split(", ") == [name for name in INVERSIONS if EDITORS[editor].fits(INVERSIONS[name])]
    assert second.split(", ") == [name for name in EDITORS if EDITORS[name].fits(INVERSIONS[inversion])]


@pytest.mark.parametrize("methods", [INVERSIONS, EDITORS], ids=["inversions", "editors"])
def test_a_method_is_listed_under_the_name_that_recipes_use(
    methods: dict[str, type[Inversion | EditingMethod]],
) -> None:
    for name, cls in methods.items():
        assert cls.model_fields["method"].default == name
        assert cls.paper
