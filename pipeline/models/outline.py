"""What a checkpoint's configuration tells without its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.models.loading import DEMO_FOLDER

if TYPE_CHECKING:
    from pipeline.sections import ModelConfig


def transformer_blocks(config: ModelConfig) -> int | None:
    """How many transformer blocks the UNet has; None where its configuration does not lie on this machine."""
    folder = DEMO_FOLDER if config.name == "demo" else Path(config.name).expanduser()
    try:
        return blocks_of(json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading says what is wrong with it


def blocks_of(unet: Mapping[str, Any]) -> int:
    """Transformer blocks of a UNet with this configuration: on the way down, in the middle, on the way up."""
    levels = len(unet["down_block_types"])
    layers, depths = (
        [value] * levels if isinstance(value, int) else list(value)
        for value in (unet["layers_per_block"], unet.get("transformer_layers_per_block") or 1)
    )
    down = sum(layers[at] * depths[at] for at, kind in enumerate(unet["down_block_types"]) if "CrossAttn" in kind)
    middle = depths[-1] if "CrossAttn" in (unet.get("mid_block_type") or "UNetMidBlock2DCrossAttn") else 0
    up = sum(
        (layers[-1 - at] + 1) * depths[-1 - at] for at, kind in enumerate(unet["up_block_types"]) if "CrossAttn" in kind
    )
    return int(down + middle + up)
