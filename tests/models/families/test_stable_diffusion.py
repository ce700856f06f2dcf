"""Stable Diffusion 1.x and 2.x: what their variants need; `tests/models/test_loading.py` has what all share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel

from pipeline.diffusion.levels import Level
from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.calls import NetworkCall
from pipeline.engine.engine import Engine
from pipeline.errors import ModelError, RecipeError
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.looking.planning import plan
from pipeline.models.families.stable_diffusion import StableDiffusionFamily
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig
from pipeline.records import EditRequest
from tests.checkpoints import change, refused
from tests.golden.replay import TINY_SDXL
from tests.methods import invert_and_edit, source
from tests.models.families.published import ANCESTRAL_TRAILING, LCM, PUBLISHED, ZERO_SNR
from tests.running.test_preflight import settings_for

LEVEL = Level(0.8, 0.6, 401.0)


def load(folder: Path, **config: Any) -> Any:
    return load_backbone(ModelConfig(name=str(folder), **config), device="cpu")


def consistency_model(folder: Path) -> Path:
    """A copy of the tiny model, with what tells LCM_Dreamshaper_v7 from Stable Diffusion 1.5."""
    torch.manual_seed(0)
    config = json.loads((folder / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 32}).save_pretrained(folder / "unet")
    change(folder / "scheduler" / "scheduler_config.json", **LCM)
    change(
        folder / "model_index.json",
        _class_name="LatentConsistencyModelPipeline",
        scheduler=["diffusers", "LCMScheduler"],
    )
    return folder


def test_a_guidance_distilled_network_hears_the_guidance_that_it_is_published_with(checkpoint: Path) -> None:
    """As diffusers' pipeline tells it: the scale less 1, 8.5 by default."""
    backbone = load(consistency_model(checkpoint))
    prompt = backbone.encode_text("a cat")
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    ours = backbone.denoise(NetworkCall(latents, [LEVEL] * 2, [prompt] * 2)).predictions.noise
    unet = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet").eval()
    told = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.full((2,), 7.5), embedding_dim=32)
    with torch.no_grad():
        given = {"encoder_hidden_states": torch.stack([prompt.embedding] * 2)}
        expected = unet(latents, torch.tensor([401, 401]), timestep_cond=told, **given).sample
        deaf = unet(latents, torch.tensor([401, 401]), **given).sample
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, deaf, atol=1e-2)


def test_a_consistency_models_steps_are_among_those_that_it_was_trained_at(checkpoint: Path) -> None:
    schedule = load(consistency_model(checkpoint)).schedule
    trained = set(range(19, 1000, 20))
    assert {step.start.timestep for step in schedule.steps(5, (8, 8))} <= trained


def turbo(folder: Path) -> Path:
    """A copy of the tiny SDXL, with what tells SDXL-Turbo from its base."""
    change(folder / "unet" / "config.json", sample_size=64)
    change(folder / "scheduler" / "scheduler_config.json", **ANCESTRAL_TRAILING)
    change(folder / "model_index.json", scheduler=["diffusers", "EulerAncestralDiscreteScheduler"])
    return folder


@pytest.mark.parametrize("kind", ["LCM", "SDXL-Turbo"])
def test_a_distilled_model_under_a_method_that_cannot_use_it_is_refused_before_the_run(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    if kind == "SDXL-Turbo":
        model = turbo(Path(shutil.copytree(TINY_SDXL, tmp_path / "turbo")))
    else:
        model = consistency_model(checkpoint)
    edit = {"source_prompt": "a cat", "target_prompt": "a dog"}
    unguided = {"inversion": {"method": "noise", "num_steps": 2}, "editing": {"method": "cfg", "guidance_scale": 1.0}}
    for sections, reason in (
        ({"inversion": {"method": "ddim", "num_steps": 2}, "editing": {"method": "reconstruct"}}, "walked backwards"),
        ({**unguided, "editing": {"method": "cfg"}}, "knows no guidance"),
    ):
        with pytest.raises(RecipeError, match=rf"this checkpoint (is|looks) .*{reason}"):
            plan(settings_for(model, tmp_path, edit, **sections), probe=False)
    plan(settings_for(model, tmp_path, edit, **unguided), probe=False)


def test_a_checkpoint_of_zero_terminal_snr_that_predicts_v_reconstructs(checkpoint: Path) -> None:
    change(checkpoint / "scheduler" / "scheduler_config.json", **ZERO_SNR)
    backbone = load(checkpoint)
    assert backbone.schedule.steps(4, (8, 8))[0].start.signal == 0.0
    given = source(backbone, 1)
    _, rebuilt = Engine(backbone, call_size=8).run_one(
        invert_and_edit(given, EditRequest(), DDPMInversion(num_steps=4), Reconstruct())
    )
    torch.testing.assert_close(rebuilt.latents, given.latents, atol=1e-4, rtol=0)


def test_zeros_for_a_prompt_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.empty_prompt is zeros.*Leave model\.empty_prompt out"):
        load(checkpoint, empty_prompt="zeros")


def test_the_parts_are_those_of_the_published_files() -> None:
    names = set(PUBLISHED["stable-diffusion-v1-5/stable-diffusion-v1-5"])
    parts = {name.split("/")[0] for name in names if "/" in name}
    assert set(StableDiffusionFamily.components) == parts - {"feature_extractor", "safety_checker"}


def test_every_pipeline_of_the_family_loads(checkpoint: Path) -> None:
    for name in StableDiffusionFamily.pipelines:
        change(checkpoint / "model_index.json", _class_name=name)
        load(checkpoint)
    change(checkpoint / "model_index.json", _class_name="StableDiffusionDepth2ImgPipeline")
    refused(checkpoint, "StableDiffusionDepth2ImgPipeline")
