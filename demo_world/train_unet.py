"""The second stage: train UNet and text encoder together on encoded scenes, and export the model."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from demo_world.aiming import ATTRIBUTES, aiming_loss, attribute_table, named_attributes, record_attention
from demo_world.objectives import Noise, Objective
from demo_world.training import (
    LOG_SECONDS,
    SAVE_SECONDS,
    Clock,
    Preset,
    RunningMeans,
    autocast,
    descend,
    set_learning_rate,
    to_model_range,
    write_checkpoint,
)
from pipeline.models.demo.networks import (
    IMAGE_SIZE,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    save_pipeline,
)
from pipeline.models.demo.world import VOCABULARY, Scene, caption, draw, region

COVERAGE_SIDE = 16  # cells per side of the coverage maps: the finest attention grid
PROMPT_DROPOUT = 0.4  # inversion, and what an edit leaves alone, are predictions for the empty prompt
AIMING_WEIGHT = 0.02


@dataclass(frozen=True, slots=True)
class ScenePool:
    """What the UNet learns from: scenes, their latents, and where each attribute is to be seen."""

    scenes: list[Scene]
    latents: Float[Tensor, "N 4 h w"]  # float16
    coverage: UInt8[Tensor, "N attributes side side"]  # 255: the attribute fills the cell


def draw_pool(plan: Preset, vae: AutoencoderKL, checkpoint: Path, device: torch.device, seed: int) -> ScenePool:
    """Draw and encode the scenes once, so that a UNet step pays for neither."""
    rng = np.random.default_rng([seed, 2])
    scenes = [Scene.random(rng) for _ in range(plan.pool)]
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        return ScenePool(scenes, state["latents"], state["coverage"])
    print(f"pool: drawing and encoding {plan.pool} scenes", flush=True)
    latents, coverage = [], []
    for start in range(0, plan.pool, 64):
        batch = scenes[start : start + 64]
        pixels = to_model_range(np.stack([draw(scene, IMAGE_SIZE) for scene in batch]), device)
        with torch.no_grad(), autocast(device):
            latents.append(vae.encode(pixels).latent_dist.mean.half().cpu())
        coverage.append(torch.stack([attribute_coverage(scene) for scene in batch]))
    pool = ScenePool(scenes, torch.cat(latents), torch.cat(coverage))
    write_checkpoint(checkpoint, latents=pool.latents, coverage=pool.coverage)
    return pool


def attribute_coverage(scene: Scene) -> UInt8[Tensor, "attributes side side"]:
    """Which share of each cell shows each attribute, 255 for all of it."""
    side = 4 * COVERAGE_SIDE  # four pixels to a cell's side are plenty
    regions = torch.from_numpy(np.stack([region(scene, attribute, side) for attribute in ATTRIBUTES]))
    return functional.avg_pool2d(regions.float() * 255, 4).round().to(torch.uint8)


def train_unet(
    plan: Preset,
    vae: AutoencoderKL,
    pool: ScenePool,
    out: Path,
    device: torch.device,
    seed: int,
    start: DiffusionPipeline | None = None,
    objective: Objective | None = None,
) -> None:
    """Train UNet and text encoder together, with the aiming loss on the side. `objective`: None for the noise."""
    objective = objective or Noise()
    # A model knows its tokens by number, so training that goes on from one keeps its tokenizer.
    tokenizer = build_tokenizer(VOCABULARY) if start is None else start.tokenizer
    unet = build_unet(plan.sizes) if start is None else start.unet
    text_encoder = build_text_encoder(plan.sizes, tokenizer) if start is None else start.text_encoder
    networks = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(device)
    unet.to(memory_format=torch.channels_last)
    averaged = copy.deepcopy(networks).requires_grad_(False)
    recorder = record_attention(unet)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3)
    clock = Clock(plan.minutes * 60 * (1 - plan.vae_share - plan.decoder_share))
    checkpoint = out / "unet.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        networks.load_state_dict(state["networks"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        clock.resume(state["clock"])
    rng = np.random.default_rng([seed, 3, clock.steps])

    table = attribute_table(tokenizer).to(device)
    articles = torch.tensor(tokenizer.convert_tokens_to_ids(["a</w>", "an</w>"]), device=device)

    def save() -> None:
        write_checkpoint(
            checkpoint,
            networks=networks.state_dict(),
            averaged=averaged.state_dict(),
            optimizer=optimizer.state_dict(),
            clock=clock.state(),
        )
        export(plan, objective, vae, averaged, tokenizer, clock, out)

    losses = RunningMeans()
    while clock.progress < 1:
        chosen = rng.integers(len(pool.scenes), size=plan.batch)
        latents = pool.latents[chosen].to(device).float()
        coverage = pool.coverage[chosen].to(device).float() / 255
        captions = ["" if rng.random() < PROMPT_DROPOUT else caption(pool.scenes[i], rng) for i in chosen]
        token_ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(device)

        task = objective.task(latents, torch.randn_like(latents))
        set_learning_rate(optimizer, plan.learning_rate, clock)
        with autocast(device):
            text_states = text_encoder(token_ids).last_hidden_state
            noised = task.latents.contiguous(memory_format=torch.channels_last)
            output = unet(noised, task.timesteps, encoder_hidden_states=text_states).sample
        errors = (output.float() - task.target).square().mean(dim=(1, 2, 3))
        denoising = (errors * task.weights).mean()
        aiming = aiming_loss(recorder.take(), coverage, named_attributes(token_ids, table, articles))
        descend(denoising + AIMING_WEIGHT * aiming, networks, optimizer, clock)
        decay = min(plan.ema_decay, (1 + clock.steps) / (10 + clock.steps))
        torch._foreach_lerp_(list(averaged.parameters()), list(networks.parameters()), 1 - decay)
        losses.add(weighted=denoising.item(), plain=errors.mean().item(), aiming=aiming.item())
        if clock.due("log", LOG_SECONDS):
            print(f"unet {clock} {losses.take()}", flush=True)
        if clock.due("save", SAVE_SECONDS):
            save()
    save()


def export(
    plan: Preset,
    objective: Objective,
    vae: AutoencoderKL,
    averaged: torch.nn.ModuleDict,
    tokenizer: CLIPTokenizer,
    clock: Clock,
    out: Path,
) -> None:
    """Write the model beside the last one, then put it in that one's place."""
    vae, averaged = copy.deepcopy(vae).cpu(), copy.deepcopy(averaged).cpu()
    vae.register_to_config(scaling_factor=1.0)  # see `standardize_latents`
    unet, text_encoder = averaged["unet"], averaged["text_encoder"]
    fresh, current, old = out / "weights.new", out / "weights", out / "weights.old"
    shutil.rmtree(fresh, ignore_errors=True)
    save_pipeline(fresh, vae, text_encoder, tokenizer, unet, objective.scheduler())
    parts = {"autoencoder": vae, "UNet": unet, "text encoder": text_encoder}
    (fresh / "README.md").write_text(model_card(plan, objective, parts, clock))
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        current.rename(old)
    fresh.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def model_card(plan: Preset, objective: Objective, parts: Mapping[str, torch.nn.Module], clock: Clock) -> str:
    """What the model is and how it was made. Its scores are appended once they are measured."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    sizes = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
    vae_minutes = plan.minutes * (plan.vae_share + plan.decoder_share)
    began = "from nothing: no photograph, no other model, no text but captions" if vae_minutes else "from a demo model"
    before = f"autoencoder {vae_minutes:.0f} minutes in batches of {plan.vae_batch}, then " if vae_minutes else ""
    return f"""# The demo model

A small text-to-image latent diffusion model of drawn cartoon faces, {IMAGE_SIZE} x {IMAGE_SIZE} pixels, in the
diffusers format of Stable Diffusion 1.x. It exists to show and to test image editing without a download: the faces are
drawn by `pipeline/models/demo/world.py`, so what an edit should have done is known. It knows nothing else.

Made by `python -m demo_world.train` {began}.

| | |
|---|---|
| parameters | {sizes} |
| data | autoencoder: scenes drawn afresh; UNet: {plan.pool} scenes, their captions worded afresh each time |
| losses | autoencoder: L1, L2, gradients, KL; UNet: {objective.about}, aimed attention x {AIMING_WEIGHT} |
| training | {before}UNet and text encoder \
{clock.seconds / 60:.0f} minutes, {clock.steps} steps of {plan.batch} |
| hardware | {hardware()} |
"""


def hardware() -> str:
    """What the training runs on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU thread(s), bfloat16 matrix products, no GPU"
