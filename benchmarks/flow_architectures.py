"""The transformers of Stable Diffusion 3 and FLUX.1 with random weights: their true shapes, asked as the product asks.

Neither text encoders nor autoencoder: what a row costs is the transformer's. Text is random numbers, of as many places
as the families have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from benchmarks.architectures import GOLDEN
from pipeline.models.families.flux import FluxVelocity
from pipeline.models.families.sd3 import StableDiffusion3Velocity
from pipeline.models.flow_transformer import Velocity

PIXELS_PER_LATENT = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowArchitecture:
    """One transformer: that of a tiny checkpoint, and what its configuration has to say for it to be the whole one."""

    name: str
    folder: str  # of the tiny checkpoint, below tests/golden
    text_places: int
    image_sizes: tuple[int, ...]  # sides in pixels
    transformer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """Of the transformer."""
        file = GOLDEN / self.folder / "transformer" / "config.json"
        return {**json.loads(file.read_text(encoding="utf-8")), **self.transformer}

    @property
    def is_flux(self) -> bool:
        """Whether its latents are packed and its guidance is told."""
        return self.config["_class_name"] == "FluxTransformer2DModel"

    def make(self, device: torch.device, dtype: torch.dtype) -> Velocity:
        """The network as its family asks it; always of the same weights on one kind of device."""
        torch.manual_seed(0)
        with torch.device(device):
            made = (FluxTransformer2DModel if self.is_flux else SD3Transformer2DModel).from_config(self.config)
        network = torch.nn.Module.to(made, dtype).eval().requires_grad_(False)
        return FluxVelocity(network) if self.is_flux else StableDiffusion3Velocity(network)

    def inputs(
        self, rows: int, size: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents, times and what else it is told, for a call of so many rows of images of this side."""
        config, side = self.config, size // PIXELS_PER_LATENT
        channels = config["in_channels"] // (4 if self.is_flux else 1)
        latents = torch.randn((rows, channels, side, side), device=device, dtype=dtype)
        told = {
            "embedding": torch.randn((rows, self.text_places, config["joint_attention_dim"]), device=device),
            "pooled": torch.randn((rows, config["pooled_projection_dim"]), device=device),
        }
        if config.get("guidance_embeds"):
            told["guidance"] = torch.full((rows,), 3.5, device=device)
        return latents, torch.full((rows,), 401.0, device=device), told


SD3 = FlowArchitecture(
    name="SD 3",
    folder="tiny-sd3",
    text_places=77 + 256,
    image_sizes=(512, 1024),
    transformer={
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "dual_attention_layers": (),
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 24,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "qk_norm": None,
        "sample_size": 128,
    },
)
FLUX = FlowArchitecture(
    name="FLUX.1-dev",
    folder="tiny-flux",
    text_places=512,
    image_sizes=(512, 1024),
    transformer={
        "attention_head_dim": 128,
        "axes_dims_rope": (16, 56, 56),
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "pooled_projection_dim": 768,
    },
)
TINY_SD3 = FlowArchitecture(name="tiny SD 3", folder="tiny-sd3", text_places=12, image_sizes=(32, 64))
TINY_FLUX = FlowArchitecture(name="tiny FLUX", folder="tiny-flux", text_places=12, image_sizes=(32, 64))
