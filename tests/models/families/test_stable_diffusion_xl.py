"""Stable Diffusion XL: what it tells its network beside what Stable Diffusion does, against diffusers' own pipeline."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from pipeline.diffusion.levels import Level
from pipeline.editing import EDITORS
from pipeline.editing.base import EditingMethod
from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import NetworkCall
from pipeline.engine.engine import Engine
from pipeline.engine.pictures import decode_picture, encode_picture
from pipeline.inversion import INVERSIONS
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.models.families.stable_diffusion_xl import StableDiffusionXLFamily
from pipeline.models.loading import load_backbone
from pipeline.models.outline import outline_of
from pipeline.recipe import ModelConfig
from pipeline.records import EditRequest
from tests.checkpoints import change, refused
from tests.facts import editor_facts
from tests.golden.replay import TINY_SDXL
from tests.methods import invert_and_edit, source
from tests.models.families.published import (
    ANCESTRAL_TRAILING,
    EDM,
    EULER,
    EULER_TRAILING,
    LCM,
    PUBLISHED,
    SD_1_5_UNET,
    SDXL_TURBO_UNET,
    SDXL_UNET,
    ZERO_SNR,
    Files,
    put,
    sdxl,
)
from tests.models.families.test_families import offered, with_index
from tests.test_every_pair import PAIRS, REQUEST, method

PROMPT = "a photo of a cat"
LEVEL = Level(0.8, 0.6, 401.0)


@cache
def tiny_sdxl(**config: Any) -> Any:
    return load_backbone(ModelConfig(name=str(TINY_SDXL), **config), device="cpu")


@cache
def theirs() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(TINY_SDXL)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny SDXL, for a test to spoil."""
    return Path(shutil.copytree(TINY_SDXL, tmp_path / "model"))


def load(folder: Path, **config: Any) -> Any:
    return load_backbone(ModelConfig(name=str(folder), **config), device="cpu")


def test_text_is_what_diffusers_pipeline_makes_of_it() -> None:
    ours = tiny_sdxl().encode_text(PROMPT)
    with torch.no_grad():
        embedding, negative, pooled, negative_pooled = theirs().encode_prompt(PROMPT, device="cpu")
    assert torch.equal(ours.parts["embedding"], embedding[0])
    assert torch.equal(ours.parts["pooled"], pooled[0])
    empty = tiny_sdxl().encode_text("")
    assert torch.equal(empty.parts["embedding"], negative[0])  # zeros: nobody gave one
    assert torch.equal(empty.parts["pooled"], negative_pooled[0])
    assert not empty.parts["embedding"].any()
    assert not empty.parts["pooled"].any()


def test_tokens_stand_once_although_two_tokenizers_read_them(checkpoint: Path) -> None:
    conditioning = tiny_sdxl().encode_text("cat with sunglasses")
    assert conditioning.positions == (1, 2, 3)
    assert [span.words for span in conditioning.spans] == [(0, 1, 2)]
    assert tiny_sdxl().encode_text("").positions == ()
    # A second tokenizer that cuts words elsewhere has a view of its own.
    path = checkpoint / "tokenizer_2" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:1]
    path.write_text(json.dumps(content))
    first, second = load(checkpoint).encode_text("cat").spans
    assert len(first.own) == 1 < len(second.own) == 3


@pytest.mark.parametrize(
    ("setting", "said", "is_zero"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("auto", None, False),
        ("zeros", False, True),
        ("encoded", True, False),
    ],
)
def test_an_empty_prompt_is_zeros_where_the_checkpoint_or_the_recipe_says_so(
    setting: str, said: bool | None, is_zero: bool, checkpoint: Path
) -> None:
    change(checkpoint / "model_index.json", force_zeros_for_empty_prompt=said)
    backbone = load(checkpoint, empty_prompt=setting)
    for prompt in ("", "  "):
        parts = backbone.encode_text(prompt).parts
        assert [bool(part.any()) for part in parts.values()] == [not is_zero] * 2
    assert backbone.encode_text("a").parts["embedding"].any()


def test_the_digest_follows_what_an_empty_prompt_is(checkpoint: Path) -> None:
    before = load(checkpoint).record.digest
    change(checkpoint / "model_index.json", _diffusers_version="0.1")
    assert load(checkpoint).record.digest == before
    change(checkpoint / "model_index.json", force_zeros_for_empty_prompt=False)
    assert load(checkpoint).record.digest != before


def prediction(backbone: Backbone, latents: Tensor, prompts: list[str]) -> Tensor:
    call = NetworkCall(latents, [LEVEL] * len(prompts), [backbone.encode_text(prompt) for prompt in prompts])
    return backbone.denoise(call).predictions.noise


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (8, 8)])
def test_the_network_is_told_the_canvas_as_original_and_target_size(size: tuple[int, int]) -> None:
    latents = torch.randn((2, 4, *size), generator=torch.Generator().manual_seed(0))
    prompts = [PROMPT, ""]
    given = [tiny_sdxl().encode_text(prompt) for prompt in prompts]
    height, width = (side * 8 for side in size)
    with torch.no_grad():
        expected = (
            theirs()
            .unet(
                latents,
                torch.tensor(LEVEL.timestep),
                encoder_hidden_states=torch.stack([one.parts["embedding"] for one in given]),
                added_cond_kwargs={
                    "text_embeds": torch.stack([one.parts["pooled"] for one in given]),
                    "time_ids": torch.tensor([[height, width, 0, 0, height, width]] * 2, dtype=torch.float32),
                },
            )
            .sample
        )
    torch.testing.assert_close(prediction(tiny_sdxl(), latents, prompts), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "force_upcast", "expected"),
    [
        ("float16", True, torch.float32),
        ("bfloat16", True, torch.float32),
        ("bfloat16", None, torch.float32),
        ("float16", False, torch.float16),
        ("bfloat16", False, torch.bfloat16),
    ],
)
def test_in_half_precision_the_vae_runs_in_float32_unless_its_checkpoint_waives_that(
    dtype: Literal["float16", "bfloat16"], force_upcast: bool | None, expected: torch.dtype, checkpoint: Path
) -> None:
    change(checkpoint / "vae" / "config.json", force_upcast=force_upcast)
    if force_upcast is None:
        config = json.loads((checkpoint / "vae" / "config.json").read_text())
        del config["force_upcast"]
        (checkpoint / "vae" / "config.json").write_text(json.dumps(config))
    backbone = load(checkpoint, dtype=dtype)
    assert backbone.unet.dtype == getattr(torch, dtype)
    assert backbone.autoencoder.vae.dtype == expected
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    latents = encode_picture(backbone, pixels)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, encode_picture(tiny_sdxl(), pixels)) == (expected == torch.float32)
    assert np.array_equal(decode_picture(backbone, latents), decode_picture(tiny_sdxl(), latents)) or (
        expected != torch.float32
    )


def test_means_and_deviations_per_channel_are_applied_and_undone(checkpoint: Path) -> None:
    """As Playground's autoencoder has them: decoding is z std / scale + mean."""
    mean, std = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
    change(checkpoint / "vae" / "config.json", latents_mean=mean, latents_std=std)
    backbone = load(checkpoint)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    plain = encode_picture(tiny_sdxl(), pixels)
    shift, spread = (torch.tensor(one)[:, None, None] for one in (mean, std))
    scale = 0.13025
    torch.testing.assert_close(encode_picture(backbone, pixels), (plain / scale - shift) / spread * scale)
    latents = torch.randn((4, 4, 6), generator=torch.Generator().manual_seed(0))
    assert np.array_equal(
        decode_picture(backbone, latents), decode_picture(tiny_sdxl(), latents * spread + shift * scale)
    )


def whole(backbone: Backbone, inversion: str, editor: str) -> Any:
    pair = method(inversion, editor)
    given = dataclasses.replace(source(backbone, 1), **pair.editing.inverts_under(REQUEST)._asdict())
    return invert_and_edit(given, REQUEST, pair.inversion, pair.editing)


@pytest.fixture(scope="module")
def edited() -> dict[tuple[str, str], Tensor]:
    """The latents of every pair, side by side in one engine."""
    found = {}
    for finished in Engine(tiny_sdxl(), call_size=8, images_in_flight=16).run(whole(tiny_sdxl(), *p) for p in PAIRS):
        if finished.error is not None:
            raise finished.error
        found[PAIRS[finished.index]] = finished.value[1].latents
    return found


@pytest.mark.parametrize(("inversion", "editor"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_every_pair_edits(inversion: str, editor: str, edited: dict[tuple[str, str], Tensor]) -> None:
    latents = edited[inversion, editor]
    assert torch.isfinite(latents).all()
    if editor != "reconstruct":
        assert not torch.allclose(latents, source(tiny_sdxl(), 1).latents, atol=1e-3)


@pytest.mark.parametrize(
    ("inversion", "editor"), [("ddpm", "ledits_pp"), ("null_text", "prompt_to_prompt"), ("direct", "masactrl")]
)
def test_an_image_has_the_same_bits_alone_and_beside_others(
    inversion: str, editor: str, edited: dict[tuple[str, str], Tensor]
) -> None:
    _, alone = Engine(tiny_sdxl(), call_size=8).run_one(whole(tiny_sdxl(), inversion, editor))
    assert torch.equal(alone.latents, edited[inversion, editor])


def test_the_registries_are_all_there() -> None:
    """Or the tests over pairs test fewer than there are."""
    assert {pair[0] for pair in PAIRS} == set(INVERSIONS)
    assert {pair[1] for pair in PAIRS} == {name for name in EDITORS if not editor_facts(name).served_elsewhere}


def test_a_checkpoint_of_zero_terminal_snr_that_predicts_v_reconstructs(checkpoint: Path) -> None:
    change(checkpoint / "scheduler" / "scheduler_config.json", **ZERO_SNR)
    backbone = load(checkpoint)
    (first, *_) = backbone.schedule.steps(4, (8, 8))
    assert (first.start.signal, first.start.timestep) == (0.0, 999)
    given = source(backbone, 1)
    editor: EditingMethod = Reconstruct()
    _, rebuilt = Engine(backbone, call_size=8).run_one(
        invert_and_edit(given, EditRequest(), DDPMInversion(num_steps=4), editor)
    )
    torch.testing.assert_close(rebuilt.latents, given.latents, atol=1e-4, rtol=0)


def test_an_inpainting_checkpoint_loads_as_one(checkpoint: Path) -> None:
    torch.manual_seed(0)
    config = json.loads((checkpoint / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(checkpoint / "unet")
    change(checkpoint / "model_index.json", _class_name="StableDiffusionXLInpaintPipeline")
    backbone = load(checkpoint)
    assert backbone.offers.inputs == {"inpaint"}
    latents = torch.zeros((1, 4, 8, 8))
    call = NetworkCall(latents, [LEVEL], [backbone.encode_text("a")], beside={"inpaint": torch.zeros((1, 5, 8, 8))})
    assert torch.isfinite(backbone.denoise(call).predictions.noise).all()


def test_what_files_tell_without_weights_is_what_the_loaded_model_offers() -> None:
    outline = outline_of(ModelConfig(name=str(TINY_SDXL)))
    assert outline.offers is not None
    assert dataclasses.asdict(outline.offers) == dataclasses.asdict(tiny_sdxl().offers)
    assert len(outline.tokenizers) == 2


REFUSED: dict[str, tuple[Files, str]] = {
    "an EDM scheduler": (
        PUBLISHED["playgroundai/playground-v2.5-1024px-aesthetic"],
        "StableDiffusionXLPipeline with the scheduler EDMDPMSolverMultistepScheduler, whose levels are those of EDM",
    ),
    "an EDM scheduler in model_index.json alone": (
        with_index(sdxl(EULER), scheduler=["diffusers", EDM["_class_name"]]),
        "the scheduler EDMDPMSolverMultistepScheduler",
    ),
    "the UNet of Stable Diffusion": (
        sdxl(EULER, SD_1_5_UNET),
        "addition_embed_type None; a StableDiffusionXLPipeline has 'text_time'",
    ),
    "the UNet of the refiner": (
        sdxl(EULER, {**SDXL_UNET, "projection_class_embeddings_input_dim": 2560}),
        "takes 2560 numbers beside the timestep, and not pooled text of 1280 and 6 size ids of 256",
    ),
    "no second text encoder": (
        with_index(sdxl(EULER), text_encoder_2=[None, None]),
        "has no text_encoder_2 in its model_index.json, and StableDiffusionXLPipeline needs one",
    ),
}


@pytest.mark.parametrize(("files", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_sdxl_is_refused_by_its_files(files: Files, reason: str, tmp_path: Path) -> None:
    refused(put(tmp_path, files), reason)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (PUBLISHED["stabilityai/sdxl-turbo"], "looks like a Turbo model"),
        (sdxl(LCM, {**SDXL_UNET, "time_cond_proj_dim": 256}), "is guidance-distilled"),
        (sdxl(LCM), "is a latent consistency model"),
        (PUBLISHED["stabilityai/stable-diffusion-xl-base-1.0"], ""),
        (sdxl(EULER_TRAILING), ""),
        (sdxl(ANCESTRAL_TRAILING), ""),
        (sdxl({**EULER, **ZERO_SNR}), ""),
        (sdxl({**EULER, **ZERO_SNR}, SDXL_TURBO_UNET), ""),
        (sdxl(EULER, SDXL_TURBO_UNET), ""),
    ],
)
def test_distilled_checkpoints_are_told_from_whole_ones(files: Files, reason: str, tmp_path: Path) -> None:
    found = offered(files, tmp_path).distilled
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_refusal_needs_no_weights() -> None:
    """The parts of the family are those that its published files have."""
    names = set(PUBLISHED["stabilityai/stable-diffusion-xl-base-1.0"])
    assert {name.split("/")[0] for name in names if "/" in name} == set(StableDiffusionXLFamily.components)
