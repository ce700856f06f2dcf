"""Copies of the tiny checkpoint that a test may spoil: what loading must refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from pipeline.errors import ModelError
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig


def change(path: Path, **values: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder: Path, match: str) -> None:
    """Loading the folder fails, and the reason matches."""
    with pytest.raises(ModelError, match=match):
        load_backbone(ModelConfig(name=str(folder)), device="cpu")


def small_unet(folder: Path) -> None:
    """Put a UNet of fewer blocks into a copy of the tiny checkpoint: it is compiled in a third of the time. Its
    attention lies at a quarter of the latents' side alone, the grid that is watched."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=64,
        layers_per_block=1,
        block_out_channels=(16, 16, 16),
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).save_pretrained(folder / "unet")
