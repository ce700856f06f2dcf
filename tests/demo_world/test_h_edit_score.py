"""What h-Edit is asked for on drawn faces, and how the outcome is judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from demo_world.h_edit_score import FORMS, TASKS, Score, judged, markdown, method_of, place_of, request_of
from demo_world.methods import EditedScene, KnownEdit, SceneEdit, description
from pipeline.models.demo.networks import IMAGE_SIZE
from pipeline.models.demo.world import VOCABULARY, Scene, changed_region, draw, edited
from pipeline.records import Concept, EditedLatents, WordPair


def scene_of(name: str) -> SceneEdit:
    task = TASKS[name]
    before = edited(Scene(hat="red"), **task.before)
    known = KnownEdit(
        before=task.before, after=task.after, concept=Concept(prompt=name), words=WordPair(), equalizer={}
    )
    pixels = draw(before, IMAGE_SIZE)
    return SceneEdit(name, known, before, edited(before, **task.after), pixels, pixels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_possible_edit_in_words_that_the_model_knows(name: str, form: str) -> None:
    task, method = TASKS[name], method_of(form, TASKS[name], 5)
    request = request_of(form, task, scene_of(name).before)
    method.editing.check(request, method.inversion, masked=bool(task.reward))
    assert (len(request.experts), len(request.rewards)) == (len(task.texts), bool(task.reward))
    for expert, change in zip(request.experts, task.texts, strict=True):
        assert expert.prompt == description(edited(scene_of(name).before, **change), names_color=task.names_color)
        assert set(expert.prompt.replace(",", " ,").split()) <= set(VOCABULARY)
        assert expert.prompt != request.source_prompt


def test_a_reward_leaves_alone_what_a_text_draws_over_and_no_text_names_its_colour() -> None:
    name = "sunglasses by a text, face by a reward"
    task, scene = TASKS[name], scene_of(name)
    place = place_of(task, scene)
    assert place is not None
    glasses = changed_region(scene.before, edited(scene.before, sunglasses=True), IMAGE_SIZE)
    face = changed_region(scene.before, edited(scene.before, **task.reward), IMAGE_SIZE)
    place = place.astype(bool)
    assert np.array_equal(place & ~glasses, face & ~glasses), "elsewhere the whole face"
    # At their rim pixels have something of both.
    assert (place & glasses).sum() < 0.2 * (face & glasses).sum()
    request = request_of("R", task, scene.before)
    assert not any("yellow" in text for text in (request.source_prompt, *(one.prompt for one in request.experts)))


def test_a_perfect_outcome_has_perfect_figures_and_none_has_no_success() -> None:
    name = "three texts"
    scene, nothing = scene_of(name), EditedLatents(latents=torch.zeros(1), masks=None)
    done, undone = (
        judged("R", name, TASKS[name], [scene], [EditedScene(pixels=pixels, latents=nothing, network_rows=7)])
        for pixels in (draw(scene.after, IMAGE_SIZE), scene.pixels)
    )
    assert (done.success, done.unchanged, done.background_psnr, done.worst_background) == (1.0, 1.0, 100.0, 100.0)
    assert (undone.success, undone.unchanged, undone.network_rows) == (0.0, 1.0, 7.0)


def test_the_table_has_a_line_for_each_score() -> None:
    one = Score(
        form="R",
        task="a",
        steps=20,
        success=0.5,
        unchanged=1.0,
        background_psnr=31.25,
        worst_background=26.0,
        network_rows=80,
    )
    assert "| R | a | 20 | 0.50 | 1.00 | 31.2 dB | 26.0 dB | 80 |" in markdown([one], 4).splitlines()
