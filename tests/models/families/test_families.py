"""What all families promise: each has its page, and what none knows is refused by its files, before any weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.backbone import Offers
from pipeline.errors import ModelError
from pipeline.models.checkpoint import open_checkpoint, read_index
from pipeline.models.families import FAMILIES, family_of
from pipeline.models.families.base import components_of
from pipeline.models.hub import fetch
from tests.checkpoints import refused
from tests.hub import hub
from tests.models.families.published import (
    EDM,
    EULER,
    EULER_TRAILING,
    PNDM,
    PUBLISHED,
    SD_1_5_UNET,
    SD_2_1_UNET,
    SD_TURBO_UNET,
    SDXL_UNET,
    V_DDIM,
    Files,
    put,
    sd,
)

DOCS = Path(__file__).parents[3] / "docs" / "families"
every_family = pytest.mark.parametrize("family", {family.name: family for family in FAMILIES.values()}.values())
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def with_index(files: Files, **values: Any) -> Files:
    return {**files, "model_index.json": {**files["model_index.json"], **values}}


@every_family
def test_a_family_has_a_page_and_the_page_names_its_pipelines(family: Any) -> None:
    page = (DOCS / f"{family.name}.md").read_text()
    assert not [pipeline for pipeline in family.pipelines if f"`{pipeline}`" not in page]


def test_a_page_has_a_family() -> None:
    assert {path.stem for path in DOCS.glob("*.md")} == {family.name for family in FAMILIES.values()}


REFUSED: dict[str, tuple[Files, str]] = {
    "PixArt": (
        PUBLISHED["PixArt-alpha/PixArt-XL-2-1024-MS"],
        r"saved from the pipeline PixArtAlphaPipeline .*known are StableDiffusionPipeline, .*Use a checkpoint of one",
    ),
    "Kandinsky": (PUBLISHED["kandinsky-community/kandinsky-2-2-decoder"], "the pipeline KandinskyV22Pipeline"),
    "the refiner of SDXL": (
        PUBLISHED["stabilityai/stable-diffusion-xl-refiner-1.0"],
        "the pipeline StableDiffusionXLImg2ImgPipeline",
    ),
    "no pipeline at all": ({"model_index.json": {}}, "does not say from which pipeline it was saved"),
    "one network": (
        PUBLISHED["latent-consistency/lcm-sdxl"],
        r"has no model_index\.json, but config\.json: it is one network.*Put its files into",
    ),
    "pickled weights": (
        PUBLISHED["runwayml/stable-diffusion-v1-5 of October 2022"],
        r"only pickled weights \(diffusion_pytorch_model\.bin\).*Convert them to safetensors",
    ),
    "a flow scheduler": (
        sd(FLOW, SD_1_5_UNET),
        r"is a StableDiffusionPipeline with the scheduler FlowMatchEulerDiscreteScheduler, whose levels are those of "
        r"flow matching.*Known are DDIMScheduler, ",
    ),
    "a flow scheduler in model_index.json alone": (
        with_index(sd(PNDM, SD_1_5_UNET), scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        "the scheduler FlowMatchEulerDiscreteScheduler",
    ),
    "a flow scheduler in its own file alone": (
        with_index(sd(FLOW, SD_1_5_UNET), scheduler=["diffusers", "PNDMScheduler"]),
        "the scheduler FlowMatchEulerDiscreteScheduler",
    ),
    "an EDM scheduler": (sd(EDM, SD_1_5_UNET), "EDMDPMSolverMultistepScheduler, whose levels are those of EDM"),
    "a scheduler of nobody's": (
        sd({**PNDM, "_class_name": "MyScheduler"}, SD_1_5_UNET),
        "the scheduler MyScheduler, whose levels nobody here knows",
    ),
    "the UNet of SDXL under Stable Diffusion": (
        sd(EULER, SDXL_UNET),
        "a UNet with addition_embed_type 'text_time'; a StableDiffusionPipeline has None",
    ),
    "an input of images": (
        sd(PNDM, {**SD_1_5_UNET, "encoder_hid_dim_type": "image_proj"}),
        "encoder_hid_dim_type 'image_proj', an input that no text gives",
    ),
    "the upscaler": (sd(V_DDIM, {**SD_2_1_UNET, "num_class_embeds": 1000}), "num_class_embeds 1000"),
    "blocks of another kind": (
        sd(PNDM, {**SD_1_5_UNET, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}),
        "blocks of class UNetMidBlock2DSimpleCrossAttn; known are DownBlock2D",
    ),
    "no text encoder": (
        with_index(sd(PNDM, SD_1_5_UNET), text_encoder=[None, None]),
        r"has no text_encoder in its model_index\.json, and StableDiffusionPipeline needs one .*CLIPTextModel",
    ),
}


@pytest.mark.parametrize(("files", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_no_family_knows_is_refused_by_its_files_before_weights_are_read(
    files: Files, reason: str, tmp_path: Path
) -> None:
    refused(put(tmp_path, files), reason)  # its weights are empty files: to read one would be another error


def test_weights_are_read_once_the_configurations_are_known(tmp_path: Path) -> None:
    """Or the test above shows nothing."""
    refused(put(tmp_path, sd(PNDM, SD_1_5_UNET)), "safetensors of the checkpoint is damaged or cut")


@pytest.mark.parametrize("name", ["PixArt", "a flow scheduler", "no text encoder", "pickled weights"])
def test_of_a_hubs_checkpoint_no_weights_are_fetched_to_be_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, reason = REFUSED[name]
    with hub(put(tmp_path / "served", files), "owner/model", tmp_path / "cache", monkeypatch) as served:
        with pytest.raises(ModelError, match=reason):
            fetch("owner/model", None, None)
        assert "model_index.json" in served.got
        assert not [file for file in served.got if file.endswith((".safetensors", ".bin"))]


def offered(files: Files, folder: Path) -> Offers:
    put(folder, files)
    index = read_index(folder, "it")
    family = family_of(index, "it")
    configurations = open_checkpoint(folder, components_of(family, index), None, "it").configurations
    family.check(configurations, "it")
    return family.offers(configurations)


FEW_STEPS: dict[str, tuple[Files, str]] = {
    "SimianLuo/LCM_Dreamshaper_v7": (
        PUBLISHED["SimianLuo/LCM_Dreamshaper_v7"],
        "is guidance-distilled: its UNet takes a guidance scale as an input",
    ),
    "a UNet with a consistency LoRA merged in": (
        sd({**PNDM, "_class_name": "LCMScheduler"}, SD_1_5_UNET),
        "is a latent consistency model",
    ),
    "stabilityai/sd-turbo": (PUBLISHED["stabilityai/sd-turbo"], "looks like a Turbo model"),
}
WHOLE: dict[str, Files] = {
    **{
        name: PUBLISHED[name]
        for name in (
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "stabilityai/stable-diffusion-2-1",
            "stabilityai/stable-diffusion-2-1-base",
        )
    },
    "Stable Diffusion 1.5 with trailing steps": sd(EULER_TRAILING, SD_1_5_UNET),
    "Stable Diffusion 2.1 of side 768 with trailing steps": sd(EULER_TRAILING, SD_2_1_UNET),
    "Stable Diffusion 2.1 that predicts v": sd({**EULER_TRAILING, "prediction_type": "v_prediction"}, SD_TURBO_UNET),
    "Stable Diffusion 2.1 of side 512, leading steps": sd(EULER, SD_TURBO_UNET),
    "another sampler": sd({**EULER_TRAILING, "_class_name": "DDIMScheduler"}, SD_TURBO_UNET),
}


@pytest.mark.parametrize(("files", "reason"), FEW_STEPS.values(), ids=list(FEW_STEPS))
def test_models_distilled_into_few_steps_are_known_by_their_files(files: Files, reason: str, tmp_path: Path) -> None:
    assert f"this checkpoint {reason}" in offered(files, tmp_path).distilled


@pytest.mark.parametrize("files", WHOLE.values(), ids=list(WHOLE))
def test_whole_models_are_not_taken_for_distilled_ones(files: Files, tmp_path: Path) -> None:
    assert offered(files, tmp_path).distilled == ""
