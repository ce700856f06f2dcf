"""A UNet that was trained for rectified flow: recognised by its scheduler's file, and sampled as diffusers samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pipeline.diffusion.flow_schedule import FlowSchedule, level_of
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.engine.calls import Denoise, Denoised, EncodeText, Steps
from pipeline.engine.engine import Engine
from pipeline.errors import ModelError
from pipeline.inversion.noise import NoiseStart
from pipeline.models.demo.networks import (
    Sizes,
    build_flow_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    load_pipeline,
    save_pipeline,
)
from pipeline.models.families.stable_diffusion import StableDiffusionFamily
from pipeline.models.loading import find_checkpoint, load_backbone
from pipeline.recipe import ModelConfig
from pipeline.records import EditRequest
from tests.checkpoints import change
from tests.methods import invert_and_edit, source

TINY = Sizes(vae_channels=(8, 8, 8), unet_channels=(8, 8, 16), unet_heads=1, text_width=16, text_layers=1)
PROMPT = "a red face"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("flow") / "model"
    tokenizer = build_tokenizer(PROMPT.split())
    encoder = build_text_encoder(TINY, tokenizer)
    save_pipeline(made, build_vae(TINY), encoder, tokenizer, build_unet(TINY), build_flow_scheduler())
    return made


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Any:
    return load_backbone(ModelConfig(name=str(folder)), device="cpu")


def test_its_output_is_a_velocity_of_the_time_that_it_is_told(backbone: Any, folder: Path) -> None:
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))

    def ask() -> Steps[Any]:
        (prompt,) = yield EncodeText((PROMPT,))
        denoised: Denoised = yield Denoise(latents, [level_of(0.3)], [prompt])
        return denoised.predictions[0], prompt

    predicted, prompt = Engine(backbone).run_one(ask())
    theirs = load_pipeline(folder)
    with torch.no_grad():
        output = theirs.unet(latents, torch.tensor([300.0]), encoder_hidden_states=prompt.embedding[None]).sample
    torch.testing.assert_close(predicted.velocity, output[0], atol=1e-5, rtol=1e-4)


def test_it_is_sampled_along_the_levels_of_diffusers_scheduler(backbone: Any, folder: Path) -> None:
    given = source(backbone, 1, side=16)
    steps = invert_and_edit(
        given, EditRequest(target_prompt=PROMPT), NoiseStart(num_steps=5), ClassifierFreeGuidance(guidance_scale=1.0)
    )
    trajectory, ours = Engine(backbone).run_one(steps)
    theirs, scheduler = load_pipeline(folder), FlowMatchEulerDiscreteScheduler()
    assert isinstance(theirs.scheduler, FlowMatchEulerDiscreteScheduler)
    scheduler.set_timesteps(sigmas=[1.0 - step / 5 for step in range(5)])
    embedding, latents = backbone.encode_text(PROMPT).embedding[None], trajectory.latents[:1]
    for time in scheduler.timesteps:
        with torch.no_grad():
            output = theirs.unet(latents, time, encoder_hidden_states=embedding).sample
        latents = scheduler.step(output, time, latents, return_dict=False)[0]
    torch.testing.assert_close(ours.latents, latents[0], atol=1e-4, rtol=1e-3)


def test_there_is_no_pipeline_to_compare_with(backbone: Any, folder: Path) -> None:
    """diffusers' asks its scheduler for what that one has not."""
    family, checkpoint, _ = find_checkpoint(ModelConfig(name=str(folder)))
    assert isinstance(family, StableDiffusionFamily)
    assert isinstance(backbone.schedule, FlowSchedule)
    assert family.reference(backbone, checkpoint.configurations) is None


def test_a_scheduler_of_flow_matching_alone_does_not_make_a_flow_model(folder: Path, tmp_path: Path) -> None:
    ours = tmp_path / "model"
    ours.mkdir()
    for path in folder.iterdir():
        (ours / path.name).symlink_to(path)
    (ours / "scheduler").unlink()
    (ours / "scheduler").mkdir()
    (ours / "scheduler" / "scheduler_config.json").write_text(
        (folder / "scheduler" / "scheduler_config.json").read_text()
    )
    change(ours / "scheduler" / "scheduler_config.json", prediction_type=None)
    with pytest.raises(ModelError, match=r"levels are those of flow matching.*says prediction_type flow_prediction"):
        load_backbone(ModelConfig(name=str(ours)), device="cpu")
