"""The first stage: fit the autoencoder to drawn scenes, then train its decoder on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from demo_world.training import (
    LOG_SECONDS,
    SAVE_SECONDS,
    Clock,
    Preset,
    autocast,
    descend,
    psnr,
    set_learning_rate,
    to_model_range,
    write_checkpoint,
)
from pipeline.models.demo.networks import IMAGE_SIZE, build_vae
from pipeline.models.demo.world import Scene, draw

KL_WEIGHT = 1e-4
EDGE_WEIGHT = 0.5


def train_vae(plan: Preset, checkpoint: Path, device: torch.device, seed: int) -> AutoencoderKL:
    """Fit the autoencoder to scenes drawn on the fly. Loss: L1, L2, L1 of the gradients, and a light KL."""
    vae = build_vae(plan.sizes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=plan.vae_learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    clock = Clock(plan.minutes * 60 * plan.vae_share)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        vae.load_state_dict(state["vae"])
        if state["finished"]:
            return vae.eval().requires_grad_(False)
        optimizer.load_state_dict(state["optimizer"])
        clock.resume(state["clock"])
    rng = np.random.default_rng([seed, 1, clock.steps])

    def save(finished: bool) -> None:
        state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "clock": clock.state()}
        write_checkpoint(checkpoint, **state, finished=finished)

    while clock.progress < 1:
        scenes = [Scene.random(rng) for _ in range(plan.vae_batch)]
        pixels = to_model_range(np.stack([draw(scene, IMAGE_SIZE) for scene in scenes]), device)
        set_learning_rate(optimizer, plan.vae_learning_rate, clock)
        with autocast(device):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - pixels
        loss = image_loss(error)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        descend(loss + KL_WEIGHT * kl, vae, optimizer, clock)
        if clock.due("log", LOG_SECONDS):
            print(f"vae {clock} loss {loss.item():.4f} kl {kl.item():.2f} psnr {psnr(error):.1f} dB", flush=True)
        if clock.due("save", SAVE_SECONDS):
            save(finished=False)
    vae.eval().requires_grad_(False)
    standardize_latents(vae, rng, device)
    save(finished=True)
    return vae


def image_loss(error: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
    """L1 and L2 of the pixels, and L1 of their differences to their neighbours, which keeps edges sharp."""
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + EDGE_WEIGHT * edges


def standardize_latents(vae: AutoencoderKL, rng: np.random.Generator, device: torch.device, count: int = 256) -> None:
    """Give each latent channel mean 0 and standard deviation 1, without a change to any decoded image.

    The affine map goes into the 1 x 1 convolutions between the encoder, the latents and the decoder. A single scaling
    factor would leave a faint channel to drown in the noise of the diffusion's first steps.
    """
    pixels = to_model_range(np.stack([draw(Scene.random(rng), IMAGE_SIZE) for _ in range(count)]), device)
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in pixels.split(64)])
        mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        into, out_of = vae.quant_conv, vae.post_quant_conv
        channels = len(mean)
        into.bias[:channels] -= mean
        into.bias[:channels] /= deviation
        into.weight[:channels] /= deviation[:, None, None, None]
        into.bias[channels:] -= 2 * deviation.log()  # the other half of its outputs are log variances
        out_of.bias += (out_of.weight[:, :, 0, 0] * mean).sum(dim=1)
        out_of.weight *= deviation[None, :, None, None]


def refine_decoder(plan: Preset, vae: AutoencoderKL, checkpoint: Path, device: torch.device, seed: int) -> None:
    """Train the decoder on, in place, on latents as it will meet them: without noise, from an encoder at rest."""
    trained = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=plan.vae_learning_rate / 2, betas=(0.9, 0.98), weight_decay=0.0
    )
    clock = Clock(plan.minutes * 60 * plan.decoder_share)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        clock.resume(state["clock"])
    trained.train().requires_grad_(True)
    rng = np.random.default_rng([seed, 4, clock.steps])

    def save() -> None:
        state = {"trained": trained.state_dict(), "optimizer": optimizer.state_dict(), "clock": clock.state()}
        write_checkpoint(checkpoint, **state)

    while clock.progress < 1:
        pixels = to_model_range(np.stack([draw(Scene.random(rng), IMAGE_SIZE) for _ in range(plan.vae_batch)]), device)
        set_learning_rate(optimizer, plan.vae_learning_rate / 2, clock)
        with autocast(device):
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.mean
            decoded = vae.decode(latents).sample
        error = decoded.float() - pixels
        loss = image_loss(error)
        descend(loss, trained, optimizer, clock)
        if clock.due("log", LOG_SECONDS):
            print(f"decoder {clock} loss {loss.item():.4f} psnr {psnr(error):.1f} dB", flush=True)
        if clock.due("save", SAVE_SECONDS):
            save()
    save()
    trained.eval().requires_grad_(False)
