"""From a recipe's model section to a loaded backbone: a local folder, a hub id with a revision, `demo` or `analytic`.

Only safetensors and JSON are read. Pickled weights and remote code are refused: both run what the checkpoint's author
wrote, on every worker of the cluster.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.errors import ModelError
from pipeline.models.allocator import keep_freed_memory
from pipeline.models.analytic import AnalyticBackbone
from pipeline.models.backbone import Backbone, ModelRecord
from pipeline.models.compiling import check_compiler
from pipeline.models.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from pipeline.recipe import ModelConfig

COMPONENTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
DEMO_FOLDER = Path(str(files("pipeline.models.demo") / "weights"))  # the bundled model
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
ALLOWED = ("*.json", "*.txt", "*.safetensors")
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def load_backbone(
    config: ModelConfig, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> Backbone:
    """Load the model of a recipe.

    Args:
        config: the recipe's model section.
        dtype: overrides the section's; float64 serves golden replay.
        device: overrides the choice, which is the GPU where there is one.

    Raises:
        ModelError: the checkpoint is missing, unsafe or of an unknown kind.
    """
    if config.name == "analytic":
        return AnalyticBackbone(image_size=config.size or 64)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = dtype or _dtype(config.dtype, place)
    folder, revision = _locate(config)
    _refuse_what_is_unsafe(folder, config)
    if place.type == "cpu":
        keep_freed_memory()
    if config.compile:
        check_compiler(place)
    return _load(folder, config, revision, precision, place)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _locate(config: ModelConfig) -> tuple[Path, str]:
    """The checkpoint's folder, downloaded where it is a hub id, and its resolved revision."""
    if config.name == "demo":
        return DEMO_FOLDER, ""
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        return folder, ""
    if config.name.startswith((".", "/", "~")) or config.name.count("/") != 1:
        raise ModelError(f"model.name '{config.name}' is no folder here and no hub id (owner/name). Check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(config.name, revision=config.revision, allow_patterns=list(ALLOWED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model '{config.name}' (revision {config.revision or 'main'}) is no local folder and could not be fetched "
            f"from the hub: {type(error).__name__}. Check the name, the network, HF_TOKEN for gated models, or give a "
            "folder"
        ) from error
    return Path(path), Path(path).name  # a snapshot's folder is named after its commit


def _refuse_what_is_unsafe(folder: Path, config: ModelConfig) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"'{config.name}' has no model_index.json: it is no checkpoint in diffusers format. Convert single-file "
            "checkpoints with diffusers' conversion script first"
        )
    listed = _read_json(index)
    for name, (library, cls) in COMPONENTS.items():
        found = listed.get(name)
        allowed = TOKENIZERS if name == "tokenizer" else (cls,)
        if not isinstance(found, list) or found[0] != library or found[1] not in allowed:
            raise ModelError(
                f"'{config.name}' has {found} as {name}; known is {library}.{cls}. Use a Stable Diffusion 1.x or 2.x "
                "checkpoint without custom code"
            )
    for path in sorted(folder.rglob("*.json")):
        if path.name.endswith("config.json") and "auto_map" in _read_json(path):
            raise ModelError(
                f"'{config.name}' asks for remote code ({path.relative_to(folder)} has auto_map), which is never run. "
                "Use a checkpoint of the library's own classes"
            )
    for name in ("unet", "vae", "text_encoder"):
        part = folder / name
        if not any(part.glob("*.safetensors")):
            pickled = sorted(path.name for path in part.glob("*") if path.suffix in PICKLED)
            reason = f"only pickled weights ({', '.join(pickled)}), which can run code" if pickled else "no weights"
            raise ModelError(
                f"'{config.name}' has {reason} in {name}/. Convert them to safetensors, or choose a revision or "
                "variant that has them"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} of the checkpoint cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} of the checkpoint holds no object")
    return value


def _load(folder: Path, config: ModelConfig, revision: str, dtype: torch.dtype, device: torch.device) -> Backbone:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizerFast
    from transformers.utils import logging as transformers_logging

    schedule = NoiseSchedule.from_config(_read_json(folder / "scheduler" / "scheduler_config.json"))
    channels = _read_json(folder / "unet" / "config.json").get("in_channels")
    vae_config = _read_json(folder / "vae" / "config.json")
    latent_channels = vae_config.get("latent_channels", 4)
    if channels not in (latent_channels, 2 * latent_channels + 1):
        raise ModelError(
            f"'{config.name}' has a UNet of {channels} input channels on latents of {latent_channels}: neither a "
            "text-to-image nor an inpainting model. Use one of those"
        )
    # The VAE of many checkpoints overflows in float16, and says so; bfloat16 has the range.
    vae_dtype = torch.float32 if dtype == torch.float16 and vae_config.get("force_upcast", True) else dtype
    variant = {"variant": config.variant} if config.variant else {}
    transformers_logging.disable_progress_bar()  # a bar for a second of reading tears lines of ours
    try:
        unet = UNet2DConditionModel.from_pretrained(
            folder, subfolder="unet", use_safetensors=True, torch_dtype=dtype, low_cpu_mem_usage=False, **variant
        )
        vae = AutoencoderKL.from_pretrained(
            folder, subfolder="vae", use_safetensors=True, torch_dtype=vae_dtype, low_cpu_mem_usage=False, **variant
        )
        text_encoder = CLIPTextModel.from_pretrained(
            folder, subfolder="text_encoder", use_safetensors=True, dtype=dtype, **variant
        )
        tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"'{config.name}' cannot be loaded: {type(error).__name__}: {error}") from error
    for network in (unet, vae, text_encoder):
        network.to(device).eval().requires_grad_(False)
    return StableDiffusion(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        schedule=schedule,
        record=ModelRecord(
            name=config.name,
            revision=revision,
            digest=digest(folder),
            dtype=str(dtype).removeprefix("torch."),
            device=device.type,
        ),
        device=device,
        compile_unet=config.compile,
    )


def digest(folder: Path) -> str:
    """SHA-256 over names and contents of what is loaded from a checkpoint, first 16 hexadecimal digits."""
    total = hashlib.sha256()
    for part in (*COMPONENTS, "scheduler"):
        for path in sorted((folder / part).glob("*")):
            if path.suffix in (".json", ".txt", ".safetensors"):
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                total.update(f"{part}/{path.name} {content}\n".encode())
    return total.hexdigest()[:16]
