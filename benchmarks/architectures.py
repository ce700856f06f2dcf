"""Stable Diffusion 1.5 and XL with random weights: their true shapes, from configurations, without a hub.

How fast a network is depends on its shapes, and not on what it has learnt. Tokenizers and schedules are those of the
tiny checkpoints of the tests, whose vocabularies are small; a text encoder has its own size but for that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.engine.backbone import ModelRecord, Offers
from pipeline.models.autoencoder import Autoencoder
from pipeline.models.clip import ClipText
from pipeline.models.families.stable_diffusion import LastState
from pipeline.models.families.stable_diffusion_xl import XLText
from pipeline.models.networks import load_tokenizer
from pipeline.models.stable_diffusion import StableDiffusion, Text

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """One model: a tiny checkpoint, and what its configurations have to say for it to be the whole one."""

    name: str
    folder: Path  # of the tiny checkpoint
    image_size: int  # side in pixels
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[Mapping[str, Any], ...] = ({},)  # one per encoder

    @property
    def is_xl(self) -> bool:
        """Whether it has two text encoders, and size ids beside the timestep."""
        return len(self.texts) > 1

    def config(self, part: str) -> dict[str, Any]:
        """The tiny checkpoint's configuration of a part, with what makes it the whole one's."""
        changes = {"unet": self.unet, "vae": self.vae}.get(part, {})
        (file,) = (self.folder / part).glob("*config.json")
        return {**json.loads(file.read_text(encoding="utf-8")), **changes}

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """Its levels."""
        return NoiseSchedule.from_config(self.config("scheduler"))

    def make_unet(self, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
        """Always of the same weights on one kind of device."""
        return _made(UNet2DConditionModel, self.config("unet"), device, dtype)

    def make_vae(self, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
        """Of XL in float32 whatever the dtype, as its family has it."""
        return _made(AutoencoderKL, self.config("vae"), device, torch.float32 if self.is_xl else dtype)

    def make_texts(self, device: torch.device, dtype: torch.dtype) -> list[Any]:
        """The text encoders."""
        encoders = []
        for number, changes in enumerate(self.texts):
            folder = self.folder / ("text_encoder_2" if number else "text_encoder")
            config = CLIPTextConfig.from_pretrained(folder, **changes)
            torch.manual_seed(0)
            with torch.device(device):
                encoder = (CLIPTextModelWithProjection if number else CLIPTextModel)(config)
            encoders.append(encoder.to(dtype).eval().requires_grad_(False))
        return encoders

    def text_of(self, encoders: list[Any]) -> Text:
        """How the product tells the network of a prompt."""
        names = ("tokenizer", "tokenizer_2")
        clips = [ClipText(load_tokenizer(self.folder, name), one) for name, one in zip(names, encoders, strict=False)]
        factor = 2 ** (len(self.config("vae")["block_out_channels"]) - 1)
        return XLText(*clips, factor, zeros_for_empty=True) if self.is_xl else LastState(*clips)

    def model(self, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
        """The product's own model around all of these."""
        return StableDiffusion(
            unet=self.make_unet(device, dtype),
            autoencoder=Autoencoder(self.make_vae(device, dtype), torch.float32),
            text=self.text_of(self.make_texts(device, dtype)),
            schedule=self.schedule,
            offers=Offers(embedding_gradients=True),
            record=self.record(device, dtype),
            device=device,
        )

    def record(self, device: torch.device, dtype: torch.dtype) -> ModelRecord:
        """As a run would note it."""
        name = str(dtype).removeprefix("torch.")
        return ModelRecord(name=self.name, revision="", digest="random", dtype=name, device=device.type)


def _made(cls: Any, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        made = cls.from_config(config)
    # Not by the method of diffusers, which warns of modules that are to stay in float32, even where there are none.
    return torch.nn.Module.to(made, dtype).eval().requires_grad_(False)


VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
SD15 = Architecture(
    name="SD 1.5",
    folder=GOLDEN / "tiny-sd",
    image_size=512,
    unet={
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "norm_num_groups": 32,
    },
    vae={**VAE, "sample_size": 512},
    texts=(CLIP_L,),
)
SDXL = Architecture(
    name="SDXL",
    folder=GOLDEN / "tiny-sdxl",
    image_size=1024,
    unet={
        "block_out_channels": (320, 640, 1280),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "norm_num_groups": 32,
    },
    vae={**VAE, "sample_size": 1024},
    texts=(CLIP_L, CLIP_BIG_G),
)
TINY_SD = Architecture(name="tiny SD", folder=GOLDEN / "tiny-sd", image_size=128)
TINY_SDXL = Architecture(name="tiny SDXL", folder=GOLDEN / "tiny-sdxl", image_size=128, texts=({}, {}))
