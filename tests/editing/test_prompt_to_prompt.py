"""Prompt-to-Prompt: windows, LocalBlend, equalizer, and what it refuses."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.prompt_to_prompt import PromptToPrompt, local_blend_mask
from pipeline.engine.engine import Engine
from pipeline.errors import PrepareError, RecipeError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.looking.planning import plan
from pipeline.recipe import recipe_from
from pipeline.records import EditedLatents, EditRequest, Trajectory, WordPair
from pipeline.running.driver import run
from tests.facts import EditorFacts
from tests.methods import BACKBONES, SIDE, analytic, invert_and_edit, rows_of_edit, source, tiny_sd

FACTS = EditorFacts(
    rows=4,  # with a source branch that is walked, too
    rows_after={"negative_prompt": 3, "direct": 3, "ddpm": 3},
    # At the first step every source branch is the trajectory's start, pinned or not.
    quick={"cross_replace_steps": (0.0, 1.0)},
    finds_region=True,
)
S = 5
SOURCE, TARGET = "a cat on a mat", "a dog on a mat"
REQUEST = EditRequest(source_prompt=SOURCE, target_prompt=TARGET)
SAME = EditRequest(source_prompt=SOURCE, target_prompt=SOURCE)
BLEND = WordPair(source=("cat",), target=("dog",))
NEVER: dict[str, Any] = {"cross_replace_steps": (0.0, 0.0), "self_replace_steps": (0.0, 0.0)}
ALWAYS: dict[str, Any] = {"cross_replace_steps": (0.0, 1.0), "self_replace_steps": (0.0, 1.0)}
every_backbone = pytest.mark.parametrize("backbone", [make() for make in BACKBONES.values()], ids=list(BACKBONES))


def result(
    backbone: Any, request: EditRequest, inversion: Any = None, side: int = SIDE, **settings: Any
) -> tuple[Trajectory, EditedLatents]:
    # From Gaussian noise by default: at inverted latents a random UNet multiplies rounding by 35 to 100 per step.
    given = source(backbone, 1, request.source_prompt, side)
    editor = PromptToPrompt(**{"guidance_scale": 3.0, **settings})
    generator = invert_and_edit(given, request, inversion or NoiseStart(num_steps=S), editor, observe=True)
    edited: tuple[Trajectory, EditedLatents] = Engine(backbone, call_size=8).run_one(generator)
    return edited


def changed(request: EditRequest = REQUEST, **changes: Any) -> EditRequest:
    return request.model_copy(update=changes)


@every_backbone
@pytest.mark.parametrize("kind", ["refine", "replace", "reweight"])
@pytest.mark.parametrize("windows", [{}, ALWAYS], ids=["default windows", "always"])
def test_equal_prompts_give_the_source_at_every_step(backbone: Any, kind: str, windows: dict[str, Any]) -> None:
    _, edited = result(backbone, SAME, kind=kind, **windows)
    for record in edited.history:
        torch.testing.assert_close(record.latents, record.source_latents, atol=1e-3, rtol=1e-3)


@every_backbone
@pytest.mark.parametrize("inversion", [NoiseStart, DDIMInversion, DirectInversion])
def test_without_windows_and_blend_words_it_is_plain_guidance_at_its_cost(backbone: Any, inversion: Any) -> None:
    results, rows = [], []
    for editor in (PromptToPrompt(guidance_scale=3.0, **NEVER), ClassifierFreeGuidance(guidance_scale=3.0)):
        given = source(backbone, 1, SOURCE)
        engine = Engine(backbone, call_size=8)
        results.append(engine.run_one(invert_and_edit(given, REQUEST, inversion(num_steps=S), editor))[1].latents)
        rows.append(engine.stats.network_rows)
    assert torch.equal(results[0], results[1])
    assert rows[0] == rows[1]


@pytest.mark.parametrize("windows", [{"self_replace_steps": (0.0, 0.0)}, {"cross_replace_steps": (0.0, 0.0)}, ALWAYS])
def test_each_window_changes_the_target_and_never_the_source(windows: dict[str, Any]) -> None:
    _, free = result(tiny_sd(), REQUEST, **NEVER)
    _, held = result(tiny_sd(), REQUEST, **{**ALWAYS, **windows})
    assert (held.latents - free.latents).abs().max() > 1e-2
    for one, other in zip(held.history, free.history, strict=True):
        torch.testing.assert_close(one.source_latents, other.source_latents, atol=1e-4, rtol=1e-4)


def test_full_windows_hold_the_target_closer_to_the_source_than_none() -> None:
    distances = []
    for windows in (NEVER, ALWAYS):
        _, edited = result(tiny_sd(), REQUEST, **windows)
        distances.append(float((edited.latents - edited.history[-1].source_latents).abs().mean()))
    assert distances[1] < distances[0]


def test_the_source_does_not_depend_on_the_target() -> None:
    histories = [result(tiny_sd(), changed(target_prompt=text))[1].history for text in (TARGET, "a red hat")]
    for one, other in zip(*histories, strict=True):
        assert torch.equal(one.source_latents, other.source_latents)


@pytest.mark.parametrize("kind", ["refine", "replace", "reweight"])
def test_an_equalizer_of_ones_is_none_and_another_one_acts(kind: str) -> None:
    _, plain = result(tiny_sd(), REQUEST, kind=kind)
    _, ones = result(tiny_sd(), changed(equalizer={"dog": 1.0, "mat": 1.0}), kind=kind)
    _, stressed = result(tiny_sd(), changed(equalizer={"mat": 4.0}), kind=kind)
    assert torch.equal(ones.latents, plain.latents)
    assert not torch.equal(stressed.latents, plain.latents)


def test_a_words_own_window_acts() -> None:
    _, plain = result(tiny_sd(), REQUEST, **ALWAYS)
    _, late = result(tiny_sd(), changed(cross_replace_steps={"mat": (0.5, 1.0)}), **ALWAYS)
    assert not torch.equal(late.latents, plain.latents)


@every_backbone
@pytest.mark.parametrize("inversion", [NoiseStart, DirectInversion])
def test_a_threshold_of_one_leaves_the_source(backbone: Any, inversion: Any) -> None:
    request = changed(blend_words=BLEND)
    _, edited = result(backbone, request, inversion(num_steps=S), blend_threshold=1.0, start_blend=0.4)
    for record in edited.history:
        begun = record.step + 1 > 2
        assert record.masks.shape == (1, SIDE, SIDE)
        assert bool(record.masks.any()) == (not begun)
        assert torch.equal(record.latents, record.source_latents) == begun


@every_backbone
def test_a_threshold_of_zero_blends_nothing_away(backbone: Any) -> None:
    _, plain = result(backbone, REQUEST)
    _, blended = result(backbone, changed(blend_words=BLEND), blend_threshold=0.0)
    assert blended.masks.all()
    torch.testing.assert_close(blended.latents, plain.latents, atol=1e-3, rtol=1e-3)


@every_backbone
def test_outside_the_last_mask_the_target_is_the_source_bit_for_bit(backbone: Any) -> None:
    request = changed(blend_words=BLEND)
    trajectory, edited = result(backbone, request, DirectInversion(num_steps=S), side=24, blend_threshold=0.9)
    mask = edited.masks[0]
    assert mask.any()
    assert not mask.all()
    assert torch.equal(edited.latents[:, ~mask], trajectory.latents[-1][:, ~mask])
    assert (edited.latents[:, mask] - trajectory.latents[-1][:, mask]).abs().max() > 1e-3


def test_subtracted_words_stay_out_of_the_mask() -> None:
    whole = result(analytic(), changed(blend_words=BLEND))[1].masks[0]
    subtract = WordPair(target=("mat",))
    less = result(analytic(), changed(blend_words=BLEND, subtract_words=subtract), subtract_threshold=0.9)[1].masks[0]
    assert not (less & ~whole).any()
    assert less.sum() < whole.sum()


def test_a_field_that_is_zero_all_over_gives_an_empty_mask() -> None:
    fields = torch.zeros((2, 3, 3))
    fields[1, 0, 2] = 0.2
    none, some = local_blend_mask(fields, 0.5, (6, 6), dilate=False)
    assert not none.any()
    assert some[:2, 4:].all()
    assert some.sum() == 4
    dilated = local_blend_mask(fields, 0.5, (6, 6), dilate=True)[1]
    assert dilated[:4, 2:].all()
    assert dilated.sum() == 16


@pytest.mark.parametrize(
    ("cross", "self_"), [((0.0, 0.4), (0.0, 0.6)), ((0.0, 0.8), (0.0, 0.2)), ((0.3, 0.6), (0.5, 1))]
)
@pytest.mark.parametrize(("inversion", "per_step"), [(NoiseStart, 4), (DirectInversion, 3)])
def test_rows_equal_the_formula(
    cross: tuple[float, float], self_: tuple[float, float], inversion: Any, per_step: int
) -> None:
    steps = 10
    editor = PromptToPrompt(cross_replace_steps=cross, self_replace_steps=self_)
    given = inversion(num_steps=steps)
    first_read = [int(cross[0] * (steps + 1)), int(self_[0] * steps)]
    last_read = max(int(cross[1] * (steps + 1)), int(self_[1] * steps))
    reads = {
        *range(first_read[0], int(cross[1] * (steps + 1))),
        *range(first_read[1], int(self_[1] * steps)),
    }
    # A free source is walked up to its last reader; a pinned one has a row where it is read and nowhere else.
    with_source = last_read if per_step == 4 else len(reads)
    assert rows_of_edit(given, editor, REQUEST, SOURCE) == 2 * steps + (per_step - 2) * with_source


REFUSED = {
    "replace with other word counts": (
        {"target_prompt": "a big dog on a mat"},
        {"kind": "replace"},
        r"'a cat on a mat' has 5 words and the target prompt 'a big dog on a mat' has 6",
    ),
    "a blend word that is missing": (
        {"blend_words": {"source": ["cat"], "target": ["horse"]}},
        {},
        "blend word 'horse' is not a word of the prompt 'a dog on a mat'",
    ),
    "a blend word that only the other prompt has": (
        {"blend_words": {"source": ["dog"]}},
        {},
        "blend word 'dog' is not a word of the prompt 'a cat on a mat'",
    ),
    "an equalizer word that is missing": (
        {"equalizer": {"cat": 2.0}},
        {},
        "equalizer word 'cat' is not a word of the prompt 'a dog on a mat'",
    ),
    "a word with a window that is missing": (
        {"cross_replace_steps": {"cat": [0.0, 0.5]}},
        {},
        "cross_replace_steps word 'cat' is not a word of the prompt 'a dog on a mat'",
    ),
    "words to subtract from nothing": (
        {"subtract_words": {"source": ["mat"]}},
        {},
        "subtract_words takes away from what blend_words name",
    ),
    "no blend words at all": ({"blend_words": {}}, {}, "blend_words names no word"),
}


def edit_of(changes: dict[str, Any]) -> dict[str, Any]:
    return {"source_prompt": SOURCE, "target_prompt": TARGET, **changes}


def a_recipe(folder: Path, edits: dict[str, Any], **editing: Any) -> dict[str, Any]:
    return {
        "source": {"shards": str(folder / "in" / "*.tar")},
        "edits": edits,
        "model": {"name": "analytic", "size": 32},
        "inversion": {"method": "direct", "num_steps": 3},
        "editing": {"method": "prompt_to_prompt", **editing},
        "sink": {"folder": str(folder / "out")},
        "run": {"engine": "local", "call_size": 6, "max_failed_fraction": 1.0},
    }


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("changes", "settings", "message"), REFUSED.values(), ids=list(REFUSED))
def test_words_that_cannot_be_served_are_refused_with_the_recipe(
    changes: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from(a_recipe(tmp_path, {"edit": edit_of(changes)}, **settings))


def test_words_of_a_source_prompt_that_the_caption_will_be_are_left_to_the_row(tmp_path: Path) -> None:
    request = {"target_prompt": TARGET, "blend_words": {"source": ["cat"], "target": ["dog"]}}
    data = a_recipe(tmp_path, {"edit": request}, kind="replace")
    data["source"]["caption_is_source_prompt"] = True
    recipe = recipe_from(data)
    editing, inversion = recipe.editing, recipe.inversion
    editing.check(EditRequest(source_prompt=SOURCE, **request), inversion)
    with pytest.raises(PrepareError, match="blend word 'cat'"):
        editing.check(EditRequest(source_prompt="a cow on a mat", **request), inversion)


@pytest.mark.parametrize("kind", ["refine", "replace"])
def test_words_that_cannot_be_served_are_planned_and_quarantined_by_one_list_and_the_others_are_edited(
    kind: str, tmp_path: Path
) -> None:
    wanted = {
        f"bad{number}": message
        for number, (_, settings, message) in enumerate(REFUSED.values())
        if settings.get("kind", "refine") == kind
    }
    edits = {f"bad{number}": edit_of(changes) for number, (changes, _, _) in enumerate(REFUSED.values())}
    edits = {"good": edit_of({"blend_words": {"source": ["cat"], "target": ["dog"]}})} | {
        name: edits[name] for name in wanted
    }
    (tmp_path / "in").mkdir()
    row = {"image": [picture()], "edit": [json.dumps(edits)]}
    pq.write_table(pa.table(row), tmp_path / "in" / "rows.parquet")
    data = a_recipe(tmp_path, {}, kind=kind)
    recipe = recipe_from({**data, "source": {"shards": str(tmp_path / "in")}})
    (note,) = [text for text in plan(recipe, probe=False).notes if "cannot be edited" in text]
    assert "1 of 1 rows cannot be edited as asked" in note
    if kind == "replace":
        assert "kind: replace with prompts of unequal numbers of words (1)" in note
    summary = run(recipe, progress="off")
    assert (summary.done, summary.failed) == (1, len(wanted))
    rows = [row for path in (tmp_path / "out").glob("quarantine/*.parquet") for row in pq.read_table(path).to_pylist()]
    assert {row["edit"] for row in rows} == set(wanted)
    for row in rows:
        assert row["stage"] == "prepare"
        assert row["error_class"] == "PrepareError"
        assert re.search(wanted[row["edit"]], row["message"])


def test_words_of_different_token_counts_are_replaced_all_the_same() -> None:
    request = EditRequest(source_prompt="a cat", target_prompt="a qwxyzzyhorse")
    prompts = [tiny_sd().encode_text(text) for text in (request.source_prompt, request.target_prompt)]
    assert len(prompts[1].positions) > len(prompts[0].positions)
    _, edited = result(tiny_sd(), request, kind="replace")
    assert torch.isfinite(edited.latents).all()


def test_an_edit_without_what_it_needs_is_refused_with_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="this edit has no target_prompt"):
        recipe_from(a_recipe(tmp_path, {"edit": {"concepts": [{"prompt": "hat"}]}}))
    with pytest.raises(RecipeError, match="kind: replace needs a source_prompt"):
        recipe_from(a_recipe(tmp_path, {"edit": {"target_prompt": "a dog"}}, kind="replace"))


def test_embeddings_optimised_for_another_guidance_are_refused_with_the_recipe(tmp_path: Path) -> None:
    data = a_recipe(tmp_path, {"edit": edit_of({})}, guidance_scale=5.0)
    with pytest.raises(RecipeError, match=r"guidance_scale is 5, but inversion\.method 'null_text' optimises.*7\.5"):
        recipe_from({**data, "inversion": {"method": "null_text"}})
    recipe_from({**data, "inversion": {"method": "null_text", "edit_guidance_scale": 5.0}})
