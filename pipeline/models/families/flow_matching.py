"""What the families of flow-matching transformers share: checks by configuration files, and loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.diffusion.flow_schedule import PATCH, SCHEDULER
from pipeline.engine.controls import Layer, Openings
from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint, Component, Components, Configurations
from pipeline.models.families.base import Loading
from pipeline.models.networks import load_network, quiet
from pipeline.models.placing import load_8bit, place, refuse_8bit

# Loaded in bfloat16 where float16 is asked for: T5's feed-forward layers exceed float16, and Qwen2.5-VL and Qwen3 were
# published in bfloat16, whose range float16 has not.
TOO_WIDE_FOR_HALF = ("T5EncoderModel", "Qwen2_5_VLForConditionalGeneration", "Qwen3ForCausalLM")
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_TOKENIZERS = ("T5TokenizerFast", "T5Tokenizer")
PARTS = {
    "scheduler": Component("scheduler", "diffusers", (SCHEDULER,)),
    "vae": Component("network", "diffusers", ("AutoencoderKL",)),
    "tokenizer": Component("tokenizer", "transformers", CLIP_TOKENIZERS),
}


def check_scheduler(configurations: Configurations, where: str) -> None:
    """See that the levels are flow matching's: by the class in `model_index.json` and by the one in its own file.

    Raises:
        ModelError: names the class.
    """
    listed = configurations.index["scheduler"][1]
    for name in (listed, configurations.parts["scheduler"].get("_class_name", listed)):
        if name != SCHEDULER:
            raise ModelError(
                f"{where} is a {configurations.pipeline} with the scheduler {name}; known for it is {SCHEDULER}. Use a "
                "checkpoint with the scheduler that it was trained for"
            )


def check_channels(transformer: Mapping[str, Any], default: int, vae: Mapping[str, Any], each: int, where: str) -> None:
    """See that a transformer takes an autoencoder's latents and nothing beside them.

    Args:
        transformer: its configuration.
        default: of its input channels, where that does not say.
        vae: the autoencoder's configuration.
        each: input channels for a channel of the latents.
        where: the checkpoint, for errors.

    Raises:
        ModelError: it takes more, such as a mask, or other latents.
    """
    takes, latents = transformer.get("in_channels", default), vae.get("latent_channels", 4)
    if takes != each * latents:
        raise ModelError(
            f"{where} has a transformer of {takes} input channels on latents of {latents} channels, of which it would "
            f"take {each * latents}: it wants a mask or a control image as well, or belongs to another autoencoder. "
            "Use a plain text-to-image checkpoint"
        )


def check_widths(what: str, takes: int, made: int, where: str) -> None:
    """See that a transformer reads as many numbers of a prompt as the text encoders make.

    Raises:
        ModelError: it does not.
    """
    if takes != made:
        raise ModelError(
            f"{where} has a transformer that reads {what} of {takes} numbers, and text encoders that make them of "
            f"{made}. Use the text encoders that it was trained with"
        )


def joint_openings(layers: tuple[Layer, ...]) -> Openings:
    """What controls find in joint attention. Watched is the first half of the blocks: further on text tokens have read
    the image, and say less of a prompt's words. Which blocks localise best nobody has measured for this package."""
    watched = frozenset(layer.index for layer in layers[: max(1, len(layers) // 2)])
    return Openings(joint=layers, watched=watched, watched_factor=PATCH)


def load_networks(checkpoint: Checkpoint, components: Components, loading: Loading, vae: torch.dtype) -> dict[str, Any]:
    """The networks of a checkpoint by name, on their device, in the dtype that each can bear. `vae`: of that one.

    Raises:
        ModelError: one cannot be loaded.
    """
    refuse_8bit(loading, {name: components[name] for name in checkpoint.configurations.parts}, checkpoint.where)
    half = loading.dtype == torch.float16
    networks = {}
    for name, component in components.items():
        if component.kind != "network" or name not in checkpoint.configurations.parts:
            continue
        dtype = vae if name == "vae" else loading.dtype
        if half and component.classes[0] in TOO_WIDE_FOR_HALF:
            dtype = torch.bfloat16
        if loading.text_8bit and component.classes[0] == "T5EncoderModel":
            networks[name] = load_8bit(checkpoint, name, component, loading).eval()
            continue
        networks[name] = load_network(checkpoint, name, component, dtype)
        with quiet():
            if component.library == "diffusers":
                # 0.42 leaves a transformer of Stable Diffusion 3 in float32, whatever it was asked for. Text encoders
                # obey, and keep the frequencies of their rotary positions in float32, which this would round.
                networks[name].to(dtype=dtype)
            place(name, networks[name].eval().requires_grad_(False), loading)
    return networks


def widest_of_transformer(
    configurations: Configurations, side: int, heads: int, width: int, text: int
) -> tuple[int, int]:
    """Of a stream of tokens, of image and text.

    Args:
        configurations: the checkpoint's.
        side: of the latents.
        heads, width: how many attention heads, and how wide each, where the configuration does not say.
        text: tokens of it.
    """
    transformer = configurations.parts["transformer"]
    channels = transformer.get("num_attention_heads", heads) * transformer.get("attention_head_dim", width)
    return (side // PATCH) ** 2 + text, channels
