"""What a checkpoint's configuration tells without its weights: a few small files, of a hub's repository as well."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError
from pipeline.models.checkpoint import TOKENIZER_FILES
from pipeline.models.loading import DEMO_FOLDER, is_hub_id
from pipeline.models.networks import load_tokenizer, words_of_tokens

if TYPE_CHECKING:
    from pipeline.settings.sections import ModelConfig

UNET, VAE = "unet/config.json", "vae/config.json"


@dataclass(frozen=True, slots=True)
class Outline:
    """Of one checkpoint. None: its files do not tell, or lie elsewhere; loading says what is wrong with them."""

    transformer_blocks: int | None  # of the UNet
    inpaints: bool | None  # whether the UNet takes a mask and a masked image beside the latents
    tokenizer: Any

    def read_part(self, prompt: str) -> str:
        """The words of a prompt that the text encoder reads, at least in part; all where that is not known."""
        if self.tokenizer is None:
            return prompt
        own = self.tokenizer(
            prompt, truncation=True, max_length=self.tokenizer.model_max_length, return_offsets_mapping=True
        )
        words = words_of_tokens(prompt, own.offset_mapping[1:-1])
        return " ".join(prompt.split()[: max(words, default=-1) + 1])


def outline_of(config: ModelConfig) -> Outline:
    """What is known of a model before it is loaded. Of a hub's repository, some hundred kB are fetched."""
    if config.name == "analytic" or (folder := _folder(config)) is None:
        return Outline(None, None, None)
    unet, vae = (_parsed(folder / name) for name in (UNET, VAE))
    try:
        blocks = blocks_of(unet)
    except (KeyError, TypeError, IndexError):
        blocks = None
    channels, latents = unet.get("in_channels"), vae.get("latent_channels")
    inpaints = channels == 2 * latents + 1 if isinstance(channels, int) and isinstance(latents, int) else None
    try:
        tokenizer = load_tokenizer(folder)
    except ModelError:
        tokenizer = None
    return Outline(blocks, inpaints, tokenizer)


def _folder(config: ModelConfig) -> Path | None:
    folder = DEMO_FOLDER if config.name == "demo" else Path(os.path.expanduser(config.name))
    if folder.is_dir():
        return folder
    if not is_hub_id(config.name):
        return None
    from huggingface_hub import snapshot_download

    files = [UNET, VAE, *(f"tokenizer/{name}" for name in TOKENIZER_FILES)]
    try:
        found = snapshot_download(config.name, revision=config.revision, allow_patterns=files, tqdm_class=_silent())
    except Exception:  # no such repository, no access, no network: loading says so
        return None
    return Path(found)


def _silent() -> type[Any]:
    from functools import partialmethod

    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        """A bar for some small files is noise."""

        __init__ = partialmethod(tqdm.__init__, disable=True)

    return Silent


def _parsed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
