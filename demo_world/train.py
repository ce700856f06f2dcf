"""Train the demo model from nothing: draw the world, fit the autoencoder, then the UNet and the text encoder together.

    python -m demo_world.train --preset cpu --out build/train_demo

Needs no data and no network. `OUT/weights` holds the model, exported every few minutes and at the end; everything else
in OUT is for `--resume`, which goes on after a kill where the last checkpoint stands. The time is planned, not the
number of steps: learning rates fall to their end with the minutes used, so a slow or shared machine gets a less trained
model, never a half-annealed one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, DiffusionPipeline
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from demo_world.aiming import ATTRIBUTES, aiming_loss, attribute_table, named_attributes, record_attention
from demo_world.scoring import load_recipes, measure, table
from pipeline.models.demo.networks import (
    IMAGE_SIZE,
    Sizes,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    load_pipeline,
    save_pipeline,
)
from pipeline.models.demo.world import VOCABULARY, Scene, caption, draw, region

COVERAGE_SIDE = 16  # cells per side of the coverage maps: the finest attention grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Sizes and lengths of one training, for one kind of machine."""

    minutes: float  # of the whole training
    vae_share: float  # of the minutes, for the autoencoder
    decoder_share: float  # of the minutes, for its decoder alone
    vae_batch: int
    vae_learning_rate: float
    pool: int  # scenes drawn and encoded once, from which the UNet learns
    batch: int
    learning_rate: float
    ema_decay: float
    sizes: Sizes


PRESETS = {
    "cpu": Preset(
        minutes=95,
        vae_share=0.2,
        decoder_share=0.1,
        vae_batch=8,
        vae_learning_rate=2e-3,
        pool=14_000,
        batch=32,
        learning_rate=1e-3,
        ema_decay=0.998,
        sizes=Sizes(),
    ),
    "gpu": Preset(
        minutes=45,
        vae_share=0.15,
        decoder_share=0.1,
        vae_batch=64,
        vae_learning_rate=1e-3,
        pool=200_000,
        batch=512,
        learning_rate=8e-4,
        ema_decay=0.9995,
        sizes=Sizes(vae_channels=(32, 64, 128), unet_channels=(64, 128, 192), unet_layers=2, unet_heads=4),
    ),
}

PROMPT_DROPOUT = 0.4  # inversion, and what an edit leaves alone, are predictions for the empty prompt
AIMING_WEIGHT = 0.02
KL_WEIGHT = 1e-4
EDGE_WEIGHT = 0.5
SNR_CEILING = 5.0  # Min-SNR weighting (Hang et al., arXiv 2303.09556)
# Where the image is nearly gone an error in it hardly moves the noise: unweighted, a model goes on reading the colour
# of large areas from what is left in the mean of the latents, and paints a quarter of the backgrounds against the
# prompt (16 of 64). After 600 more steps with a floor of 0.03 and a learning rate of 4e-4 it was 3 of 64; with a floor
# of 0.1 and 1e-3 the loss grew.
SNR_FLOOR = 0.03
LOG_SECONDS, SAVE_SECONDS = 30, 240


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, and for the model in its subfolder weights.")],
    preset: Annotated[str, typer.Option(help=f"One of: {', '.join(PRESETS)}.")] = "cpu",
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Length. Default: the preset's.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoints in OUT.")] = False,
    start_from: Annotated[
        Path | None,
        typer.Option(help="A demo model: train its UNet and text encoder on. Default: all from nothing."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Peak, of the UNet and the text encoder. Default: the preset's.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = os.cpu_count() or 1,
    scenes: Annotated[int, typer.Option(min=0, help="Scenes on which the model is scored at the end.")] = 64,
    recipes: Annotated[Path, typer.Option(help="Folder of the recipes that it is scored by.")] = Path(
        "configs/demo_edits"
    ),
    seed: int = 0,
) -> None:
    """Train the demo model from nothing."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is unknown. Choose one of: {', '.join(PRESETS)}", param_hint="--preset")
    if not resume and any(out.glob("*.pt")):
        raise typer.BadParameter(f"{out} holds a training. Add --resume or choose another", param_hint="--out")
    plan = PRESETS[preset]
    if minutes is not None:
        plan = dataclasses.replace(plan, minutes=minutes)
    if learning_rate is not None:
        plan = dataclasses.replace(plan, learning_rate=learning_rate)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    start = None if start_from is None else load_pipeline(start_from)
    if start is None:
        vae = train_vae(plan, out / "vae.pt", device, seed)
        refine_decoder(plan, vae, out / "decoder.pt", device, seed)
    else:
        plan = dataclasses.replace(plan, vae_share=0.0, decoder_share=0.0)
        vae = start.vae.to(device).eval().requires_grad_(False)
    pool = draw_pool(plan, vae, out / "pool.pt", device, seed)
    train_unet(plan, vae, pool, out, device, seed, start)
    if scenes:
        scores = measure(out / "weights", load_recipes(recipes), scenes)
        with (out / "weights" / "README.md").open("a") as card:
            card.write(f"\nScores on {scenes} fresh scenes (`demo_world/scoring.py`):\n\n{table(scores)}")
    print(f"done: {out / 'weights'}", flush=True)


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
        (loss + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.steps += 1
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
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.steps += 1
        if clock.due("log", LOG_SECONDS):
            print(f"decoder {clock} loss {loss.item():.4f} psnr {psnr(error):.1f} dB", flush=True)
        if clock.due("save", SAVE_SECONDS):
            save()
    save()
    trained.eval().requires_grad_(False)


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
) -> None:
    """Train UNet and text encoder together to predict the noise, with the aiming loss on the side."""
    # A model knows its tokens by number: one that is trained on keeps its tokenizer.
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

    alpha_bars = build_scheduler().alphas_cumprod.to(device)
    snr = alpha_bars / (1 - alpha_bars)
    timestep_weights = snr.clamp(SNR_FLOOR, SNR_CEILING) / snr
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
        export(plan, vae, averaged, tokenizer, clock, out)

    losses = RunningMeans()
    while clock.progress < 1:
        chosen = rng.integers(len(pool.scenes), size=plan.batch)
        latents = pool.latents[chosen].to(device).float()
        coverage = pool.coverage[chosen].to(device).float() / 255
        captions = ["" if rng.random() < PROMPT_DROPOUT else caption(pool.scenes[i], rng) for i in chosen]
        token_ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(device)

        noise = torch.randn_like(latents)
        timesteps = torch.randint(len(alpha_bars), (plan.batch,), device=device)
        alpha_bar = alpha_bars[timesteps][:, None, None, None]
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        set_learning_rate(optimizer, plan.learning_rate, clock)
        with autocast(device):
            text_states = text_encoder(token_ids).last_hidden_state
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            noise_pred = unet(noisy, timesteps, encoder_hidden_states=text_states).sample
        errors = (noise_pred.float() - noise).square().mean(dim=(1, 2, 3))
        denoising = (errors * timestep_weights[timesteps]).mean()
        aiming = aiming_loss(recorder.take(), coverage, named_attributes(token_ids, table, articles))
        (denoising + AIMING_WEIGHT * aiming).backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.steps += 1
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
    save_pipeline(fresh, vae, text_encoder, tokenizer, unet)
    parts = {"autoencoder": vae, "UNet": unet, "text encoder": text_encoder}
    (fresh / "README.md").write_text(model_card(plan, parts, clock))
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        current.rename(old)
    fresh.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def model_card(plan: Preset, parts: Mapping[str, torch.nn.Module], clock: Clock) -> str:
    """What the model is and how it was made. Its scores are appended once they are measured."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    sizes = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
    vae_minutes = plan.minutes * (plan.vae_share + plan.decoder_share)
    return f"""# The demo model

A small text-to-image latent diffusion model of drawn cartoon faces, {IMAGE_SIZE} x {IMAGE_SIZE} pixels, in the
diffusers format of Stable Diffusion 1.x. It exists to show and to test image editing without a download: the faces are
drawn by `pipeline/models/demo/world.py`, so what an edit should have done is known. It knows nothing else.

Made by `python -m demo_world.train` from nothing: no photograph, no other model, no text but captions.

| | |
|---|---|
| parameters | {sizes} |
| data | autoencoder: scenes drawn afresh; UNet: {plan.pool} scenes, their captions worded afresh each time |
| losses | autoencoder: L1, L2, gradients, KL; UNet: noise with Min-SNR weights, aimed attention x {AIMING_WEIGHT} |
| training | autoencoder {vae_minutes:.0f} minutes in batches of {plan.vae_batch}, then UNet and text encoder \
{clock.seconds / 60:.0f} minutes, {clock.steps} steps of {plan.batch} |
| hardware | {hardware()} |
"""


def hardware() -> str:
    """What the training runs on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU thread(s), bfloat16 matrix products, no GPU"


class Clock:
    """Counts the steps and the seconds of one stage over all its runs, against the seconds planned for it."""

    def __init__(self, planned_seconds: float) -> None:
        self.planned_seconds = planned_seconds
        self.steps = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._last: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Used so far, in this run and in those before it."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """Share of the planned time that is used, 0..1."""
        return min(self.seconds / self.planned_seconds, 1.0)

    def due(self, name: str, every_seconds: float) -> bool:
        """Whether it is time again for what is to be done every so many seconds."""
        if self.seconds - self._last.setdefault(name, self.seconds) < every_seconds:
            return False
        self._last[name] = self.seconds
        return True

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"steps": self.steps, "seconds": self.seconds}

    def resume(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.steps, self._seconds_before = int(state["steps"]), state["seconds"]

    def __str__(self) -> str:
        return f"step {self.steps} minute {self.seconds / 60:.1f} of {self.planned_seconds / 60:.1f}"


class RunningMeans:
    """Means of named figures since they were last taken."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, **values: float) -> None:
        """Count one more value of each figure."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def take(self) -> str:
        """The means as text, and a new beginning."""
        text = " ".join(f"{name} {sum(values) / len(values):.4f}" for name, values in self._values.items())
        self._values = {}
        return text


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, clock: Clock) -> None:
    """A warm-up of 100 steps, then a cosine over the planned time down to a fiftieth of the peak."""
    annealed = 0.02 + 0.98 * (1 + math.cos(math.pi * clock.progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = peak * annealed * min(1.0, (clock.steps + 1) / 100)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 for convolutions and matrix products; float32 weights and sums."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def write_checkpoint(path: Path, **state: object) -> None:
    """Write beside, then replace: a kill leaves the old checkpoint or the new one."""
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    beside.replace(path)


def to_model_range(pixels: UInt8[np.ndarray, "B H W 3"], device: torch.device) -> Float[Tensor, "B 3 H W"]:
    """uint8 0..255 to float -1..1, channels first."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(error: Tensor) -> float:
    """In dB, of an error in images that span -1..1."""
    return -10 * math.log10(error.square().mean().item() / 4)


if __name__ == "__main__":
    typer.run(main)
