"""The layers that a UNet's configuration tells are those that the built UNet has."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from pipeline.models.unet import attention_layers, openings_of
from pipeline.models.unet_layout import attention_layers_of, openings_of_config
from tests.golden.replay import TINY_SD, TINY_SDXL
from tests.models.families.published import SD_1_5_UNET, SD_2_1_UNET, SDXL_UNET

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-sd": json.loads((TINY_SD / "unet" / "config.json").read_text()),
    "tiny-sdxl": json.loads((TINY_SDXL / "unet" / "config.json").read_text()),
    "Stable Diffusion 1.5": SD_1_5_UNET,
    "Stable Diffusion 2.1": SD_2_1_UNET,
    "SDXL": SDXL_UNET,
    # Two depths in one block, as SSD-1B has; and others upwards than downwards.
    "depths of each transformer": {
        **SDXL_UNET,
        "transformer_layers_per_block": [[1, 1], [2, 1], [4, 3]],
        "reverse_transformer_layers_per_block": [[4, 4, 2], [2, 1, 1], 1],
    },
    "no attention in the middle": {**SDXL_UNET, "mid_block_type": "UNetMidBlock2D"},
    "no middle": {**SDXL_UNET, "mid_block_type": None},
    "layers of each block": {**SD_1_5_UNET, "layers_per_block": [1, 2, 3, 1]},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_layers_and_blocks_told_from_a_configuration_are_those_of_the_built_unet(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    assert attention_layers_of(config) == tuple(attention_layers(unet).values())
    assert openings_of_config(config) == openings_of(unet)


def test_sdxl_has_cross_attention_at_a_quarter_of_its_side() -> None:
    """Down block 2 and up block 0, and none at the side itself (its table of layers)."""
    cross = [layer for layer in attention_layers_of(SDXL_UNET) if layer.kind == "cross"]
    assert {(layer.place, layer.factor) for layer in cross} == {
        ("down", 2), ("down", 4), ("mid", 4), ("up", 4), ("up", 2)
    }  # fmt: skip
    assert sum(layer.factor == 4 and layer.place != "mid" for layer in cross) == 2 * 10 + 3 * 10
    assert len(cross) == 2 * 2 + 2 * 10 + 10 + 3 * 10 + 3 * 2
