"""A family of the tests' own, a closed-form flow model: its line in the registry is all that loading asks for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typing_extensions import override

from pipeline import Editor
from pipeline.engine.backbone import Backbone, Offers
from pipeline.errors import ModelError, RecipeError
from pipeline.looking.planning import plan
from pipeline.models.checkpoint import Checkpoint, Configurations
from pipeline.models.families import FAMILIES
from pipeline.models.families.base import Family, Loading
from pipeline.models.loading import load_backbone
from pipeline.models.outline import outline_of
from pipeline.recipe import ModelConfig
from tests.closed_form_flow import ClosedFormFlow
from tests.running.test_preflight import settings_for

PIPELINE = "ClosedFormFlowPipeline"


class ClosedFormFamily(Family):
    """No weights and no parts."""

    name = "closed_form"
    pipelines = (PIPELINE,)
    components = {}  # noqa: RUF012

    @override
    def check(self, configurations: Configurations, where: str) -> None:
        if configurations.index.get("shift") != 3.0:
            raise ModelError(f"{where} is shifted by something else")

    @override
    def offers(self, configurations: Configurations) -> Offers:
        return ClosedFormFlow.offers

    @override
    def load(self, checkpoint: Checkpoint, loading: Loading) -> Backbone:
        return ClosedFormFlow(loading.dtype, loading.record.name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the family, which is one line of the registry."""
    monkeypatch.setitem(FAMILIES, PIPELINE, ClosedFormFamily())
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text(json.dumps({"_class_name": PIPELINE, "shift": 3.0}))
    return model


def test_it_is_loaded_and_outlined_by_its_pipelines_name(folder: Path) -> None:
    config = ModelConfig(name=str(folder))
    assert isinstance(load_backbone(config, device="cpu"), ClosedFormFlow)
    assert outline_of(config).offers == ClosedFormFlow.offers
    (folder / "model_index.json").write_text(json.dumps({"_class_name": PIPELINE, "shift": 1.0}))
    with pytest.raises(ModelError, match="is shifted by something else"):
        load_backbone(config, device="cpu")
    assert outline_of(config).offers is None


def test_what_it_does_not_offer_is_refused_before_the_run(folder: Path, tmp_path: Path) -> None:
    edit = {"source_prompt": "a cat", "target_prompt": "a dog", "concepts": [{"prompt": "a hat"}]}
    ddim = {"inversion": {"method": "ddim", "num_steps": 8}}
    for name in ("masactrl", "prompt_to_prompt", "plug_and_play"):
        with pytest.raises(RecipeError, match=rf"editing: .*\(model '{folder}'\)"):
            plan(settings_for(folder, tmp_path, edit, **ddim, editing={"method": name}), probe=False)
    ledits = {"inversion": {"method": "ddpm", "num_steps": 2}, "editing": {"method": "ledits_pp"}}
    with pytest.raises(RecipeError, match="this model has no such maps"):
        plan(settings_for(folder, tmp_path, edit, **ledits), probe=False)
    plan(settings_for(folder, tmp_path, edit, **ddim, editing={"method": "cfg"}), probe=False)


def test_it_edits(folder: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    edited = Editor.load(str(folder)).edit(
        image,
        target_prompt="a dog",
        inversion={"method": "ddim", "num_steps": 4},
        editing={"method": "cfg", "guidance_scale": 3.0},
    )
    assert edited.image.size == (48, 32)
    assert not np.array_equal(np.asarray(edited.image), image)
