"""A family that has nothing of Stable Diffusion's, through the registry alone: all that it offers can be used."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from typing_extensions import override

from pipeline.editing import EDITORS
from pipeline.editing.ledits_pp import LEditsPP
from pipeline.editor import Editor
from pipeline.engine.backbone import Backbone, Offers
from pipeline.engine.calls import Steps
from pipeline.engine.engine import Engine
from pipeline.errors import RecipeError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.looking.counting import RowCounter
from pipeline.models.checkpoint import Checkpoint, Component, Configurations
from pipeline.models.families import FAMILIES
from pipeline.models.families.base import Family, Loading
from pipeline.recipe import Method
from pipeline.records import Concept, EditRequest
from tests.closed_form_flow import ClosedFormFlow, FlowSchedule
from tests.facts import editor_facts, inversion_facts
from tests.methods import invert_and_edit, source
from tests.test_every_pair import CALL_SIZE, PAIRS, REQUEST, method, recipe

PIPELINE = "ClosedFormFlowPipeline"


class ClosedFormFlowFamily(Family):
    """All that a family without weights is."""

    name = "closed_form_flow"
    pipelines = (PIPELINE,)
    components = MappingProxyType(
        {"scheduler": Component("scheduler", "diffusers", ("FlowMatchEulerDiscreteScheduler",))}
    )

    @override
    def check(self, configurations: Configurations, where: str) -> None:
        """Nothing could be wrong with it."""

    @override
    def offers(self, configurations: Configurations) -> Offers:
        return ClosedFormFlow.offers

    @override
    def load(self, checkpoint: Checkpoint, loading: Loading) -> Backbone:
        return ClosedFormFlow(loading.dtype, loading.record.name)


def flow(dtype: torch.dtype = torch.float32) -> ClosedFormFlow:
    return ClosedFormFlow(dtype)


def able(pair: tuple[str, str]) -> Method | None:
    """The pair, with masks of noise where it would read attention; None: it needs what this model has not."""
    made = method(*pair)
    if isinstance(made.editing, LEditsPP):
        made = made.model_copy(update={"editing": LEditsPP(mask="noise")})
    return None if list(made.model_problems(ClosedFormFlow.offers)) else made


ABLE = [pair for pair in PAIRS if able(pair)]
UNABLE = [pair for pair in PAIRS if not able(pair)]
every_able_pair = pytest.mark.parametrize("pair", ABLE, ids="+".join)


def edited_by(pair: tuple[str, str]) -> Steps[Any]:
    made = able(pair)
    assert made is not None
    given = dataclasses.replace(source(flow(), 1), **made.editing.inverts_under(REQUEST)._asdict())
    return invert_and_edit(given, REQUEST, made.inversion, made.editing)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the family, which stands in the registry meanwhile."""
    monkeypatch.setitem(FAMILIES, PIPELINE, ClosedFormFlowFamily())
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    index = {"_class_name": PIPELINE, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return tmp_path


def test_it_is_found_by_its_pipeline_and_edits_a_picture(checkpoint: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with Editor.load(str(checkpoint), device="cpu") as editor:
        assert editor.backbone.record.name == str(checkpoint)
        result = editor.edit(
            pixels,
            "hat",
            inversion={"method": "ddpm", "num_steps": 4},
            editing={"method": "ledits_pp", "mask": "noise"},
        )
        assert result.image.size == (32, 32)
        assert not np.array_equal(np.asarray(result.image), pixels)
        with pytest.raises(RecipeError, match="no cross-attention"):
            editor.edit(pixels, target_prompt="a dog", editing={"method": "prompt_to_prompt"})
        with pytest.raises(RecipeError, match="no such maps"):
            editor.edit(pixels, "hat", editing={"method": "ledits_pp", "mask": "attention"})


def test_what_needs_no_attention_is_possible_and_nothing_that_does() -> None:
    assert {editor for _, editor in ABLE} >= {"cfg", "reconstruct", "ledits_pp", "diffedit", "fast_diffedit"}
    unable = {"prompt_to_prompt", "proxedit", "masactrl", "prox_masactrl", "plug_and_play"}
    assert {editor for _, editor in UNABLE} >= unable
    assert {inversion for inversion, _ in ABLE} >= {"ddim", "ddpm", "direct", "negative_prompt", "noise", "null_text"}


@every_able_pair
def test_an_image_has_the_same_finite_bits_alone_and_beside_all_others(pair: tuple[str, str]) -> None:
    alone = Engine(flow(), call_size=CALL_SIZE).run_one(edited_by(pair))[1]
    others = {one.index: one for one in Engine(flow(), call_size=CALL_SIZE).run(map(edited_by, ABLE))}
    assert not [one.error for one in others.values() if one.error]
    beside = others[ABLE.index(pair)].value[1]
    assert torch.isfinite(alone.latents).all()
    assert torch.equal(alone.latents, beside.latents)


@every_able_pair
def test_rows_are_those_that_planning_counts(pair: tuple[str, str]) -> None:
    (finished,) = Engine(flow(), call_size=CALL_SIZE).run([edited_by(pair)])
    assert finished.error is None
    planned = RowCounter(recipe(*pair)).rows({"edit": REQUEST})
    # Two prompts differ by one number per channel: no place stands out, and masks that are found first are empty.
    saved = inversion_facts(pair[0]).stops_early or editor_facts(pair[1]).rows_once
    assert finished.network_rows <= planned if saved else finished.network_rows == planned


@pytest.mark.parametrize(("solver", "num_steps"), itertools.product(("ddim", "sde-dpmsolver++"), (1, 6)))
def test_edit_friendly_inversion_from_pure_noise_is_exact(solver: Any, num_steps: int) -> None:
    """Its first level has no signal, its last no noise: the last map is what is missing."""
    given = source(flow(torch.float64), 1)
    inversion = DDPMInversion(solver=solver, num_steps=num_steps, skip=0.0)
    trajectory, edited = Engine(flow(torch.float64), call_size=CALL_SIZE).run_one(
        invert_and_edit(given, EditRequest(), inversion, EDITORS["reconstruct"]())
    )
    assert trajectory.levels[0].signal == 0.0
    assert trajectory.solver.steps[-1].end.noise == 0.0
    torch.testing.assert_close(edited.latents, given.latents)


def test_ddim_inversion_returns_the_image_the_better_the_more_steps_it_takes() -> None:
    given = source(flow(), 1, "a cat")
    errors = []
    for num_steps in (5, 20, 80):
        inversion = DDIMInversion(num_steps=num_steps)
        _, edited = Engine(flow(), call_size=CALL_SIZE).run_one(
            invert_and_edit(given, EditRequest(source_prompt="a cat"), inversion, EDITORS["reconstruct"]())
        )
        errors.append(float((edited.latents - given.latents).abs().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_concept_moves_the_image_towards_its_mean_and_a_negative_scale_away() -> None:
    mean = flow().encode_text("hat").embedding[0][:, None, None]
    given = source(flow(), 1)

    def along_mean(scale: float) -> float:
        request = EditRequest(concepts=(Concept(prompt="hat", guidance_scale=scale, threshold=0.0),))
        _, edited = Engine(flow(), call_size=CALL_SIZE).run_one(
            invert_and_edit(given, request, DDPMInversion(num_steps=6), LEditsPP(mask="noise"))
        )
        return float(((edited.latents - given.latents) * mean).sum())

    assert along_mean(3.0) > 1.0
    assert along_mean(-3.0) < -1.0
    assert along_mean(0.0) == pytest.approx(0.0, abs=1e-2)


def test_levels_depend_on_the_size_of_the_latents() -> None:
    small, large = (FlowSchedule().steps(4, (side, side)) for side in (8, 32))
    assert small[0].start == large[0].start
    assert all(one.end.noise < other.end.noise for one, other in zip(small[:-1], large[:-1], strict=True))
