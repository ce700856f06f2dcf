"""Files of sparse autoencoders: safetensors that say themselves what they were trained on; and published ones.

Ours hold the tensors of `SparseAutoencoder` under its names, and the `last_fired` counters; k and the origin stand in
the file's metadata. Published ones (the SDXL-Turbo set of Surkov et al., arXiv 2410.22366: k 10, 5,120 features) hold a
torch module's state, with a config.json beside; `PUBLISHED` says which tensor is which. That set comes as .pth files,
which may run code when opened: convert them to safetensors first, names as they are.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.diffusion.sparse_autoencoder import SparseAutoencoder
from pipeline.errors import ModelError
from pipeline.interventions import GuidanceBranch

FORMAT = "shardedit sparse autoencoder 1"
PUBLISHED = {  # name of the published tensor: ours
    "encoder.weight": "encoder",  # (F, D)
    "decoder.weight": "directions",  # (D, F): a column for each feature, transposed here
    "pre_bias": "bias",
    "latent_bias": "latent_bias",
}
PUBLISHED_FOLDER = re.compile(r"(?:unet\.)?((?:down_blocks|mid_block|up_blocks)[.\d]*\.?attentions\.\d+)_k\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What an autoencoder was trained on."""

    block: str  # as diffusers names it
    branch: GuidanceBranch
    timestep: float | None  # None: not known
    time: float | None  # share of the schedule that it was recorded at, from 1, noise, to 0
    model: str  # name; "" where it is not known
    model_digest: str


def as_file(autoencoder: SparseAutoencoder, last_fired: Tensor, origin: Origin) -> bytes:
    """A trained autoencoder as a file; the same one gives the same bytes."""
    tensors = {
        "encoder": autoencoder.encoder,
        "directions": autoencoder.directions,
        "bias": autoencoder.bias,
        "latent_bias": autoencoder.latent_bias,
        "last_fired": last_fired,
    }
    said = {
        "format": FORMAT,
        "k": autoencoder.k,
        "block": origin.block,
        "branch": origin.branch,
        "timestep": origin.timestep,
        "time": origin.time,
        "model": origin.model,
        "model_digest": origin.model_digest,
    }
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(plain, {"shardedit": json.dumps(said, sort_keys=True)})


def of_file(data: bytes, path: str, config: bytes | None = None) -> tuple[SparseAutoencoder, Origin]:
    """An autoencoder, and what it was trained on.

    Args:
        data: of the file.
        path: of the file, for errors; of a published one, whose folder names the block.
        config: of a published one: the config.json beside it.

    Raises:
        ModelError: it is no such file, is damaged, or does not go with its configuration.
    """
    try:
        tensors, said = load(data), _metadata(data)
    except (SafetensorError, ValueError, KeyError, struct.error) as error:
        raise ModelError(f"'{path}' is no safetensors file, or is damaged ({error}). Fetch or train it again") from None
    try:
        if set(PUBLISHED) <= set(tensors):
            return _published(tensors, path, config)
        if said.get("format") != FORMAT:
            raise ModelError(
                f"'{path}' holds no sparse autoencoder: it has {', '.join(sorted(tensors)[:6])}. Expected are "
                f"files of `shardedit sae train`, or published ones with {', '.join(PUBLISHED)}"
            )
        made = SparseAutoencoder(
            tensors["encoder"], tensors["directions"], tensors["bias"], tensors["latent_bias"], int(said["k"])
        )
    except (KeyError, ValueError) as error:
        raise ModelError(f"'{path}' is a damaged autoencoder ({error}). Train it again") from None
    names = ("block", "branch", "timestep", "time", "model", "model_digest")
    return made, Origin(**{name: said[name] for name in names})


def _metadata(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    found = json.loads(header.get("__metadata__", {}).get("shardedit", "{}"))
    return found if isinstance(found, dict) else {}


def _published(tensors: Mapping[str, Tensor], path: str, config: bytes | None) -> tuple[SparseAutoencoder, Origin]:
    if config is None:
        raise ModelError(f"'{path}' is a published autoencoder, and no config.json with its k stands beside it. Add it")
    try:
        sizes = json.loads(config)
        k, features, size = (int(sizes[name]) for name in ("k", "n_dirs_local", "d_model"))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the config.json beside '{path}' lacks k, n_dirs_local or d_model ({error})") from None
    found = tuple(tensors["encoder.weight"].shape)
    if found != (features, size):
        raise ModelError(f"'{path}' has an encoder of {found}, and its config.json says {(features, size)}")
    named = PUBLISHED_FOLDER.search(path)
    if named is None:
        raise ModelError(
            f"the folder of '{path}' does not name the block: it should be as published, "
            "unet.up_blocks.0.attentions.1_k10_hidden5120_..."
        )
    made = SparseAutoencoder(
        encoder=tensors["encoder.weight"].float(),
        directions=tensors["decoder.weight"].float().mT.contiguous(),
        bias=tensors["pre_bias"].float(),
        latent_bias=tensors["latent_bias"].float(),
        k=k,
    )
    origin = Origin(block=named[1], branch="cond", timestep=None, time=None, model="", model_digest="")
    return made, origin
