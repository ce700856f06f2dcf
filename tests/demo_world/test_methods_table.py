"""The comparison of all methods on drawn scenes: what is asked of each, how it is judged, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from demo_world import methods, methods_pictures
from demo_world.methods import EDITS, EditedScene, Pair, SceneEdit, description, judge, tasks_of
from pipeline.editor import Editor
from pipeline.models.demo.networks import IMAGE_SIZE, LATENT_SIZE
from pipeline.models.demo.world import VOCABULARY, Scene, changed_region, draw, edited
from pipeline.records import EditedLatents

PAIRS = [("direct", "prompt_to_prompt"), ("ddpm", "ledits_pp"), ("direct", "reconstruct")]


def task(name: str = "sunglasses") -> SceneEdit:
    edit = EDITS[name]
    before = edited(Scene(hat="red", beard=True), **edit.before)
    pixels = draw(before, IMAGE_SIZE)
    return SceneEdit(name, edit, before, edited(before, **edit.after), pixels, pixels)


def outcome(pixels: np.ndarray, masks: torch.Tensor) -> EditedScene:
    latents = EditedLatents(latents=torch.zeros((4, LATENT_SIZE, LATENT_SIZE)), masks=masks)
    return EditedScene(pixels=pixels, latents=latents, network_rows=10)


def test_a_perfect_edit_has_perfect_figures_and_no_edit_has_none() -> None:
    one = task()
    truth = changed_region(one.before, one.after, IMAGE_SIZE)
    cell = IMAGE_SIZE // LATENT_SIZE
    cells = torch.from_numpy(truth.reshape(LATENT_SIZE, cell, LATENT_SIZE, cell).any(axis=(1, 3)))
    done = judge("direct", "prompt_to_prompt", [one], [outcome(draw(one.after, IMAGE_SIZE), cells[None])])
    assert (done.success, done.unchanged, done.mask_iou, done.background_psnr) == (1.0, 1.0, 1.0, 100.0)
    nothing = judge("direct", "cfg", [one], [outcome(one.pixels, torch.zeros((0, LATENT_SIZE, LATENT_SIZE)).bool())])
    assert (nothing.success, nothing.unchanged, nothing.mask_iou) == (0.0, 1.0, None)


@pytest.mark.parametrize("name", EDITS)
def test_descriptions_differ_as_the_scenes_do_and_have_the_words_that_are_named(name: str) -> None:
    one = task(name)
    source, target = (text.replace(",", " ,").split() for text in (description(one.before), description(one.after)))
    assert set(source) | set(target) <= set(VOCABULARY)
    assert source != target
    assert set(one.edit.words.source) <= set(source)
    assert {*one.edit.words.target, *one.edit.equalizer} <= set(target)


def test_the_table_is_measured_and_written(tmp_path: Path) -> None:
    editor = Editor.load("demo")
    tasks = tasks_of(editor, 3, seed=5)
    assert {one.name for one in tasks} == set(EDITS)
    told: list[Pair] = []
    table, made = methods.measure_pairs(editor, tasks, PAIRS, num_steps=5, tell=told.append)
    assert told == table
    # 5 of inversion and 5 of 3 rows; 4 and 4 of 2 rows, since not all of the schedule is walked; 5 and 5 of one row. An
    # inversion counts for each that reads it, and is run once.
    assert [pair.network_rows for pair in table] == [20, 12, 10]
    assert editor.engine.stats.network_rows == 3 * (20 + 12 + 5)
    found = json.loads(methods.as_json(table))
    assert [(row["inversion"], row["editor"]) for row in found] == PAIRS
    assert found[2]["mask_iou"] is None
    assert all(0 <= found[0][key] <= 1 for key in ("success", "unchanged", "mask_iou"))

    page = tmp_path / "table.md"
    page.write_text(f"before\n{methods.BEGIN}\nold\n{methods.END}\nafter\n")
    for _ in range(2):
        methods.write_between_marks(page, methods.markdown(table))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count("prompt_to_prompt") == 1
    assert "old" not in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the lines"):
        methods.write_between_marks(page, "")

    picture = methods_pictures.picture(tasks, made)
    assert picture.height > 3 * methods_pictures.CELL  # the inputs, and the three pairs in two blocks


def test_an_editor_is_asked_in_the_words_that_it_takes() -> None:
    assert methods.thinks_in_concepts("ledits_pp")
    assert not methods.thinks_in_concepts("prompt_to_prompt")


def test_every_pair_that_a_recipe_accepts_has_settings_that_it_accepts() -> None:
    for inversion, editor in methods.valid_pairs():
        method = methods.method_of(inversion, editor, methods.NUM_STEPS)
        method.editing.check(task().request(inversion, editor), method.inversion)
