"""`instruct`: a reference that is read, a mask of what changed, one row a step, and what it refuses."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.editing.instruct import Instruct
from pipeline.editor import Editor
from pipeline.engine.backbone import Offers
from pipeline.engine.engine import Engine
from pipeline.errors import PrepareError, RecipeError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig
from pipeline.records import EditRequest
from tests.checkpoints import change
from tests.facts import EditorFacts
from tests.golden.replay import TINY_FLUX
from tests.methods import invert_and_edit, source

FACTS = EditorFacts(rows=2, served_elsewhere=True)  # one, where the network is told its guidance
SIDE = 6
REQUEST = EditRequest(instruction="a dog with a hat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny FLUX, as if it had been trained to read a reference."""
    copied = Path(shutil.copytree(TINY_FLUX, tmp_path_factory.mktemp("kontext") / "model"))
    change(copied / "model_index.json", _class_name="FluxKontextPipeline")
    return copied


@pytest.fixture(scope="module")
def kontext(folder: Path) -> Any:
    return load_backbone(ModelConfig(name=str(folder), text_tokens=8), device="cpu")


def run(
    backbone: Any, latents: Tensor | None = None, call_size: int = 2, scale: float | None = None, **options: Any
) -> tuple[Any, Any, int]:
    engine = Engine(backbone, call_size=call_size)
    given = source(backbone, 1, side=SIDE)
    given = given if latents is None else dataclasses.replace(given, latents=latents)
    steps = invert_and_edit(given, REQUEST, NoiseStart(num_steps=3), Instruct(guidance_scale=scale), **options)
    trajectory, found = engine.run_one(steps)
    return trajectory, found, engine.stats.network_rows


def test_the_image_is_read_and_costs_no_row_of_its_own(kontext: Any) -> None:
    trajectory, found, rows = run(kontext)
    assert rows == 3
    assert found.latents.shape == trajectory.source.latents.shape
    for other in (torch.zeros_like(trajectory.source.latents), trajectory.source.latents.flip(-1)):
        assert not torch.allclose(run(kontext, other)[1].latents, found.latents, atol=1e-3)


def test_a_network_that_is_told_its_guidance_is_told_it_and_asked_once(kontext: Any) -> None:
    usual = run(kontext)[1].latents
    assert torch.equal(run(kontext, scale=2.5)[1].latents, usual)
    _, other, rows = run(kontext, scale=4.0)
    assert rows == 3
    assert not torch.allclose(other.latents, usual, atol=1e-3)


def test_images_share_calls_and_keep_their_bits(kontext: Any) -> None:
    generators = []
    for number in (1, 2, 3):
        given = source(kontext, number, side=SIDE)
        generators.append(invert_and_edit(given, REQUEST, NoiseStart(num_steps=2), Instruct()))
    engine = Engine(kontext, call_size=3)
    together = {one.index: one.value[1].latents for one in engine.run(generators)}
    given = source(kontext, 2, side=SIDE)
    alone = Engine(kontext, call_size=3).run_one(invert_and_edit(given, REQUEST, NoiseStart(num_steps=2), Instruct()))
    assert torch.equal(alone[1].latents, together[1])


def test_the_mask_is_where_the_result_differs_most(kontext: Any) -> None:
    trajectory, found, _ = run(kontext)
    changed = (found.latents - trajectory.source.latents).norm(dim=0)
    assert found.mask.any()
    assert not found.mask.all()
    assert float(changed[found.mask].min()) > float(changed[~found.mask].max())


def test_outside_of_a_mask_the_image_stays(kontext: Any) -> None:
    half = torch.zeros((SIDE, SIDE))
    half[:, 2:] = 1.0
    trajectory, masked, _ = run(kontext, user_mask=half)
    assert torch.equal(masked.latents[..., :2], trajectory.source.latents[..., :2])
    assert not torch.allclose(masked.latents[..., 2:], trajectory.source.latents[..., 2:], atol=1e-2)
    white = run(kontext, user_mask=torch.ones((SIDE, SIDE)))[1].latents
    torch.testing.assert_close(white, run(kontext)[1].latents)


def test_a_picture_is_edited_by_an_instruction_and_another_model_is_refused(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    asked: dict[str, Any] = {
        "instruction": "a hat",
        "inversion": {"method": "noise", "num_steps": 2},
        "editing": {"method": "instruct"},
    }
    with Editor.load(str(folder), size=32, text_tokens=8, device="cpu") as editor:
        assert not np.array_equal(np.asarray(editor.edit(pixels, **asked).image), pixels)
    with (
        Editor.load(str(TINY_FLUX), size=32, text_tokens=8, device="cpu") as editor,
        pytest.raises(RecipeError, match=r"takes no reference image\. Use a checkpoint that does"),
    ):
        editor.edit(pixels, **asked)


def test_what_it_cannot_serve_is_refused(kontext: Any) -> None:
    with pytest.raises(PrepareError, match=r"has no instruction\. Add instruction"):
        Instruct().check(EditRequest(target_prompt="a dog"), NoiseStart())
    against = REQUEST.model_copy(update={"negative_prompt": "snow"})
    steps = invert_and_edit(source(kontext, 1, side=SIDE), against, NoiseStart(num_steps=1), Instruct())
    with pytest.raises(PrepareError, match="leaves no place for the edit's negative_prompt"):
        Engine(kontext, call_size=2).run_one(steps)
    assert not Instruct.fits(DDIMInversion)
    assert not list(Instruct().model_problems(Offers(references=True)))
