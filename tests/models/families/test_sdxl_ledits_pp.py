"""LEDITS++ on Stable Diffusion XL, against diffusers' pipeline of it: every mask and the edited latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LEditsPPPipelineStableDiffusionXL, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from pipeline.editing.ledits_pp import LEditsPP
from pipeline.engine.engine import Engine
from pipeline.engine.pictures import encode_picture
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig
from pipeline.records import Concept, EditRequest
from tests.golden.checks import edit, relative, source_of
from tests.golden.replay import TINY_SDXL, unroll, without_last_maps

REFERENCE = "diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion_xl"
STEPS, SIDE = 10, 128
PROMPTS, TOKENS = ["sunglasses", "a red hat"], [1, 3]
SCALES, THRESHOLDS = [4.0, 3.0], [0.71, 0.83]


def theirs(image: np.ndarray, noises: Tensor, zeroed: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their pipeline after an inversion and an edit, and the latents of that.

    Corrected as the goldens of LEDITS++ are: the noise comes from outside, and tokens are counted before padding.
    """
    parts = StableDiffusionXLPipeline.from_pretrained(TINY_SDXL).components
    scheduler = DPMSolverMultistepScheduler.from_config(
        parts["scheduler"].config, algorithm_type="sde-dpmsolver++", solver_order=2, timestep_spacing="leading"
    )
    named = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
    pipe = LEditsPPPipelineStableDiffusionXL(**{name: parts[name] for name in named}, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda **given: (*encode(**given)[:4], TOKENS))
    draws = iter(noises)
    monkeypatch.setattr(f"{REFERENCE}.randn_tensor", lambda **_: next(draws)[None])
    pipe.invert(
        Image.fromarray(image), num_inversion_steps=STEPS, skip=0.2, source_prompt="", num_zero_noise_steps=zeroed
    )
    latents = pipe(
        editing_prompt=PROMPTS,
        edit_guidance_scale=SCALES,
        edit_threshold=THRESHOLDS,
        edit_warmup_steps=0,
        use_intersect_mask=True,
        output_type="latent",
    ).images
    return pipe, latents


@pytest.mark.parametrize("zeroed", [0, 3])
def test_ledits_pp_edits_as_diffusers_pipeline_for_sdxl(zeroed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of their last noise maps are zero by default, against noise in the result; ours reconstruct."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((1, 3, 8, 8), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=SIDE, mode="bicubic").clamp(0, 1)[0]
    image = (255 * smooth.permute(1, 2, 0)).round().to(torch.uint8).numpy()
    noises = torch.randn((STEPS, 4, SIDE // 8, SIDE // 8), generator=generator)
    pipe, expected = theirs(image, noises, zeroed, monkeypatch)

    engine = Engine(load_backbone(ModelConfig(name=str(TINY_SDXL)), device="cpu"), call_size=8, pad=False)
    latents = encode_picture(engine.backbone, image)
    inversion = DDPMInversion(solver="sde-dpmsolver++", num_steps=STEPS, skip=0.2, exact_last_step=False)
    inverted = engine.run_one(inversion.invert(source_of(engine, latents, "", noises)))
    trajectory = without_last_maps(inverted, zeroed)
    assert relative(trajectory.noise_maps[:, None], pipe.zs) < 1e-4
    # Their pipeline for SDXL intersects at every step, that for Stable Diffusion 1 from timestep 800.
    ours = edit(engine, LEditsPP(intersect_from_timestep=1000), trajectory, EditRequest(concepts=concepts()))
    masks, walked = unroll([ours], [trajectory])
    assert masks_of(pipe, masks) == 0.0
    assert relative(walked[-1], expected) < 3e-3


def concepts() -> Sequence[Concept]:
    return tuple(
        Concept(prompt=prompt, guidance_scale=scale, threshold=threshold)
        for prompt, scale, threshold in zip(PROMPTS, SCALES, THRESHOLDS, strict=True)
    )


def masks_of(pipe: Any, masks: Tensor) -> float:
    """Share of pixels (N, E, B, h, w) that differ from their masks, which have channels."""
    found = pipe.activation_mask[:, :, :, 0] if pipe.activation_mask.ndim == 6 else pipe.activation_mask
    return float((masks != (found > 0)).double().mean())
