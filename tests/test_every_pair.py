"""What every inversion and every editor promise together. A new method needs no line here but its cost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
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
from tests.methods import BACKBONES, SIDE, analytic, invert_and_edit, source, tiny_sd

S = 3  # steps
INNER = 2  # updates of null-text optimisation per step
CALL_SIZE = 8
SOURCE_PROMPT = "a cat on a mat"
REQUEST = EditRequest(
    source_prompt=SOURCE_PROMPT,
    target_prompt="a dog on a mat",
    concepts=(Concept(prompt="hat", guidance_scale=2.0, threshold=0.7),),
    blend_words=WordPair(source=("cat",), target=("dog",)),
)
# So that something happens within three steps.
INVERSION_SETTINGS: dict[str, dict[str, Any]] = {"null_text": {"num_inner_steps": INNER}}
EDITOR_SETTINGS: dict[str, dict[str, Any]] = {
    "masactrl": {"start_step": 1},
    "prox_masactrl": {"start_step": 1},
    # At the first step every source branch is the trajectory's start, pinned or not.
    "prompt_to_prompt": {"cross_replace_steps": (0.0, 1.0)},
}

# Network rows of one image with a source prompt and one target: of the inversion, and of the edit per step of it (with
# what it takes once besides). These are the smallest layouts that lose nothing; fewer are welcome.
INVERSION_ROWS: dict[str, Callable[[], int]] = {
    "ddim": lambda: S,
    "ddpm": lambda: 2 * S,
    "direct": lambda: S,
    "negative_prompt": lambda: S,
    "noise": lambda: 0,
    "null_text": lambda: S + S * (2 + 3 * INNER),
}
FREE = {"ddim": 4, "noise": 4, "null_text": 4, "negative_prompt": 3}  # a source branch that is walked, too
PINNED_TO_ONE_ROW = {"direct": 3, "ddpm": 3}
PINNED_TO_BOTH_ROWS = {"direct": 4, "ddpm": 4}
DIFFEDIT_DRAWS = 10
FAST_DIFFEDIT_DRAWS = 20
EDIT_ROWS: dict[str, tuple[dict[str, int], int]] = {
    "cfg": (dict.fromkeys(INVERSIONS, 2), 0),
    "reconstruct": (dict.fromkeys(INVERSIONS, 1) | {"ddpm": 2, "null_text": 2}, 0),
    "ledits_pp": ({"ddpm": 2}, 0),
    "prompt_to_prompt": (FREE | PINNED_TO_ONE_ROW, 0),
    "proxedit": (FREE | PINNED_TO_BOTH_ROWS, 0),
    "masactrl": (FREE | PINNED_TO_BOTH_ROWS, 0),
    "prox_masactrl": (FREE | PINNED_TO_BOTH_ROWS, 0),
    "plug_and_play": ({"ddim": 4, "direct": 3}, 0),
    "diffedit": (dict.fromkeys(INVERSIONS, 2), 2 * DIFFEDIT_DRAWS),
    "fast_diffedit": (dict.fromkeys(INVERSIONS, 2), 2 * FAST_DIFFEDIT_DRAWS),
}

PAIRS = [
    (inversion, editor) for inversion in INVERSIONS for editor in EDITORS if EDITORS[editor].fits(INVERSIONS[inversion])
]
OTHERS = [
    (inversion, editor)
    for inversion in INVERSIONS
    for editor in EDITORS
    if not EDITORS[editor].fits(INVERSIONS[inversion])
]
REFUSING_MASKS = [pair for pair in PAIRS if not EDITORS[pair[1]].keeps_to_masks]
KEEPING_TO_MASKS = [pair for pair in PAIRS if pair not in REFUSING_MASKS]
ONE_BRANCH = {"cfg", "reconstruct", "ledits_pp"}  # editors that read no source while they walk
PINNED = [
    (inversion, editor) for inversion, editor in PAIRS if inversion in PINNED_TO_ONE_ROW and editor not in ONE_BRANCH
]


def of_each(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("inversion", "editor"), pairs, ids=["+".join(pair) for pair in pairs])


every_pair = of_each(PAIRS)
every_backbone = pytest.mark.parametrize("backbone", list(BACKBONES))


def method(inversion: str, editor: str) -> Method:
    """A pair with few steps."""
    editing = EDITORS[editor](method=editor, **EDITOR_SETTINGS.get(editor, {}))
    settings = {"num_steps": S, **INVERSION_SETTINGS.get(inversion, {})}
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
    assert editor in EDIT_ROWS, f"{editor} has no line in EDIT_ROWS: say what it costs"
    (finished,) = Engine(analytic(), call_size=CALL_SIZE).run([whole(analytic(), inversion, editor)])
    assert finished.error is None
    per_step, once = EDIT_ROWS[editor]
    planned = RowCounter(recipe(inversion, editor)).rows({"edit": REQUEST})
    assert planned <= INVERSION_ROWS[inversion]() + S * per_step[inversion] + once
    if inversion == "null_text":  # stops early where it has arrived
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
