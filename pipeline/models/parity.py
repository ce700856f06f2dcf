"""What diffusers' own pipeline makes of the networks of a loaded model: no second load, but their text, steps and code.

Both sides run the same weights in the same precision. Everything else is written twice: how prompts become
conditioning, what is told beside the timestep, levels and steps, guidance, attention, latents and pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.engine.backbone import Backbone
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.base import Asked, Family
from pipeline.models.networks import quiet


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Text to image by DDIM under classifier-free guidance against an empty prompt that nobody wrote."""

    prompt: str
    noise: Tensor  # (C, h, w), float32: where it starts
    num_steps: int
    guidance_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What diffusers' pipeline made."""

    pipeline: str  # its class
    latents: Tensor  # (C, h, w) float32 on the CPU, after the last step
    pixels: np.ndarray  # (H, W, 3) uint8, decoded from them


@torch.no_grad()
def sampled_by_diffusers(
    family: Family, checkpoint: Checkpoint, backbone: Backbone, sampling: Sampling
) -> Sampled | None:
    """Sample with diffusers' pipeline around a loaded model's networks; None: the family has none to compare with."""
    with quiet():
        pipeline = family.reference(backbone, checkpoint.configurations)
        if pipeline is None:
            return None
        pipeline.set_progress_bar_config(disable=True)
        unet = getattr(pipeline, "unet", None)
        network = pipeline.transformer if unet is None else unet
        asked = Asked(
            sampling.prompt,
            height=sampling.noise.shape[-2] * backbone.latent_scale,
            width=sampling.noise.shape[-1] * backbone.latent_scale,
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
        )
        with nullcontext() if unet is None else own_attention(unet):
            latents = family.sampled_by(
                pipeline, backbone, sampling.noise[None].to(backbone.device, network.dtype), asked
            )
        return Sampled(
            pipeline=type(pipeline).__name__,
            latents=latents[0].float().cpu(),
            pixels=_decoded(family, pipeline, latents),
        )


def _decoded(family: Family, pipeline: Any, latents: Tensor) -> np.ndarray:
    """The last lines of the pipelines, for an autoencoder that may be wider than the other networks."""
    vae = pipeline.vae
    latents = family.unscaled(pipeline, latents.to(vae.dtype))
    image = pipeline.image_processor.postprocess(vae.decode(latents, return_dict=False)[0].float(), output_type="np")
    pixels: np.ndarray = (image[0] * 255.0).round().astype(np.uint8)
    return pixels


@contextmanager
def own_attention(unet: Any) -> Iterator[None]:
    """diffusers' own attention in a UNet that was opened (`unet.py`); afterwards ours again."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    before: Mapping[str, Any] = unet.attn_processors
    layers = {name: unet.get_submodule(name.removesuffix(".processor")) for name in before}
    forwards = {name: vars(layer).pop("forward") for name, layer in layers.items()}
    unet.set_attn_processor(AttnProcessor2_0())
    try:
        yield
    finally:
        unet.set_attn_processor(dict(before))
        for name, layer in layers.items():
            layer.forward = forwards[name]


def parameters_of(family: Family, checkpoint: Checkpoint) -> dict[str, int]:
    """Numbers in the weights of each network, as their files' headers say."""
    parts = {role.split("/")[0] for role in checkpoint.files}
    counts = {name: 0 for name, one in family.components.items() if one.kind == "network" and name in parts}
    for role, path in checkpoint.files.items():
        if path.endswith(".safetensors"):
            with safe_open(checkpoint.folder / path, framework="pt") as file:
                names = list(file.keys())
                counts[role.split("/")[0]] += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return counts
