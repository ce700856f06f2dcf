"""The transformers of flow matching with random weights: their true shapes, asked as the product asks.

    python -m benchmarks.flow_architectures      TFLOP of a row, for which no GPU is needed

Neither text encoders nor autoencoder: what a row costs is the transformer's. Text is random numbers, of as many places
as the families have it. A reference image has the size of the latents, as `instruct` gives it; what FLUX.1-dev takes
with one is what FLUX.1 Kontext takes, whose transformer has the same shapes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import diffusers
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architectures import GOLDEN
from benchmarks.machine import show
from pipeline.models.families.flux import FluxVelocity
from pipeline.models.families.flux2 import Flux2Velocity
from pipeline.models.families.qwen_image import QwenImageVelocity
from pipeline.models.families.sd3 import StableDiffusion3Velocity
from pipeline.models.flow_transformer import Velocity

META = torch.device("meta")
PIXELS_PER_LATENT = 8
ASKED_BY: Mapping[str, Any] = {
    "SD3Transformer2DModel": StableDiffusion3Velocity,
    "FluxTransformer2DModel": FluxVelocity,
    "Flux2Transformer2DModel": Flux2Velocity,
    "QwenImageTransformer2DModel": QwenImageVelocity,
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Of one call."""

    latents: Tensor
    times: Tensor
    told: dict[str, Tensor]
    reference: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowArchitecture:
    """One transformer: that of a tiny checkpoint, and what its configuration has to say for it to be the whole one."""

    name: str
    folder: str | None = None  # of the tiny checkpoint, below tests/golden; None: `transformer` says everything
    text_places: int
    seen_side: int | None = None  # pixels a side of what is one more place of text: of a reference that it speaks of
    image_sizes: tuple[int, ...]  # sides in pixels
    references: tuple[bool, ...] = (False,)  # whether calls hold a reference image
    transformer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """Of the transformer."""
        if self.folder is None:
            return dict(self.transformer)
        file = GOLDEN / self.folder / "transformer" / "config.json"
        return {**json.loads(file.read_text(encoding="utf-8")), **self.transformer}

    @property
    def calls(self) -> list[tuple[int, bool]]:
        """Sides of images, and whether a reference stands beside them."""
        return list(product(self.image_sizes, self.references))

    def make(self, device: torch.device, dtype: torch.dtype) -> Velocity:
        """The network as its family asks it; always of the same weights on one kind of device."""
        config = self.config
        torch.manual_seed(0)
        with torch.device(device), made_as(dtype):  # not cast afterwards: wider ones may not fit
            network = getattr(diffusers, config["_class_name"]).from_config(config)
        network = torch.nn.Module.to(network, dtype).eval().requires_grad_(False)
        velocity: Velocity = ASKED_BY[config["_class_name"]](network)
        return velocity

    def num_text_places(self, size: int, *, reference: bool) -> int:
        """For an image of this side."""
        seen = round(size / self.seen_side) ** 2 if reference and self.seen_side else 0
        return self.text_places + seen

    def inputs(self, rows: int, size: int, device: torch.device, dtype: torch.dtype, *, reference: bool) -> Inputs:
        """For a call of so many rows of images of this side."""
        config, side = self.config, size // PIXELS_PER_LATENT
        # All but Stable Diffusion 3's are given latents packed two by two.
        channels = config["in_channels"] // (1 if config["_class_name"] == "SD3Transformer2DModel" else 4)
        shape = (rows, channels, side, side)
        places = self.num_text_places(size, reference=reference)
        told = {"embedding": torch.randn((rows, places, config["joint_attention_dim"]), device=device)}
        if "pooled_projection_dim" in config:
            told["pooled"] = torch.randn((rows, config["pooled_projection_dim"]), device=device)
        if config.get("guidance_embeds"):
            told["guidance"] = torch.full((rows,), 3.5, device=device)
        return Inputs(
            latents=torch.randn(shape, device=device, dtype=dtype),
            times=torch.full((rows,), 401.0, device=device),
            told=told,
            reference=torch.randn(shape, device=device, dtype=dtype) if reference else None,
        )


def asked(velocity: Velocity, inputs: Inputs) -> Tensor:
    """Its answer. Stable Diffusion 3 knows of no reference."""
    if inputs.reference is None:
        return velocity(inputs.latents, inputs.times, inputs.told)
    return velocity(inputs.latents, inputs.times, inputs.told, inputs.reference)


@contextmanager
def made_as(dtype: torch.dtype) -> Iterator[None]:
    """Parameters are created in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def tflop_per_row(architecture: FlowArchitecture, size: int, *, reference: bool) -> float:
    """Of the products of one row of a call for an image of this side, counted on the meta device."""
    velocity = architecture.make(META, torch.float32)
    inputs = architecture.inputs(1, size, META, torch.float32, reference=reference)
    with FlopCounterMode(display=False) as counter:
        asked(velocity, inputs)
    return counter.get_total_flops() / 1e12


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
    references=(False, True),
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
KLEIN = FlowArchitecture(
    name="FLUX.2 klein 4B",
    text_places=512,
    image_sizes=(512, 1024),
    references=(False, True),
    transformer={
        "_class_name": "Flux2Transformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": (32, 32, 32, 32),
        "guidance_embeds": False,
        "in_channels": 128,
        "joint_attention_dim": 7680,
        "num_attention_heads": 24,
        "num_layers": 5,
        "num_single_layers": 20,
    },
)
QWEN_IMAGE_EDIT = FlowArchitecture(
    name="Qwen-Image-Edit",
    text_places=256,
    seen_side=28,
    image_sizes=(512, 1024),
    references=(True,),
    transformer={
        "_class_name": "QwenImageTransformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": (16, 56, 56),
        "in_channels": 64,
        "joint_attention_dim": 3584,
        "num_attention_heads": 24,
        "num_layers": 60,
        "out_channels": 16,
    },
)
TINY_SD3 = FlowArchitecture(name="tiny SD 3", folder="tiny-sd3", text_places=12, image_sizes=(32, 64))
TINY_FLUX = FlowArchitecture(
    name="tiny FLUX", folder="tiny-flux", text_places=12, image_sizes=(32, 64), references=(False, True)
)
TINY_KLEIN = FlowArchitecture(
    name="tiny FLUX.2 klein",
    text_places=12,
    image_sizes=(32, 64),
    references=(False, True),
    transformer={
        **KLEIN.transformer,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "joint_attention_dim": 48,
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_single_layers": 3,
    },
)
TINY_QWEN_IMAGE_EDIT = FlowArchitecture(
    name="tiny Qwen-Image-Edit",
    text_places=12,
    seen_side=28,
    image_sizes=(32, 64),
    references=(True,),
    transformer={
        **QWEN_IMAGE_EDIT.transformer,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 32,
        "num_attention_heads": 2,
        "num_layers": 3,
    },
)
ALL = (SD3, FLUX, KLEIN, QWEN_IMAGE_EDIT)
ALL_TINY = (TINY_SD3, TINY_FLUX, TINY_KLEIN, TINY_QWEN_IMAGE_EDIT)


def main() -> None:
    """Print what a row takes."""
    rows = [
        {
            "model": architecture.name,
            "pixels": size,
            "reference": reference,
            "text_places": architecture.num_text_places(size, reference=reference),
            "tflop_per_row": round(tflop_per_row(architecture, size, reference=reference), 1),
        }
        for architecture in ALL
        for size, reference in architecture.calls
    ]
    show(Console(width=140), "The transformers of flow matching", rows)


if __name__ == "__main__":
    main()
