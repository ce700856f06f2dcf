"""What the families of latent diffusion share: a UNet that denoises the latents of a KL autoencoder, guided by CLIP.

Their schedule is variance preserving. Checkpoints differ in ways that only their configuration files tell, and that a
library would run into late, or never: this reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.flow_schedule import SCHEDULER as FLOW_SCHEDULER
from pipeline.diffusion.flow_schedule import FlowSchedule
from pipeline.diffusion.schedule import SCHEDULERS, NoiseSchedule
from pipeline.engine.backbone import Offers
from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint, Component, Components, Configurations
from pipeline.models.families.base import Loading
from pipeline.models.networks import check_latents, load_network
from pipeline.models.placing import place, refuse_8bit
from pipeline.models.unet_layout import KNOWN_BLOCKS, block_types, bottleneck_of_config, openings_of_config

# Its levels are those of the others; what it steps along was distilled into the network.
LATENT_CONSISTENCY = "LCMScheduler"
FLOW_PREDICTION = "flow_prediction"  # diffusers' name for a velocity
KNOWN_SCHEDULERS = (*SCHEDULERS, LATENT_CONSISTENCY)
OTHER_LEVELS = {  # by the start of a scheduler's class
    "FlowMatch": "whose levels are those of flow matching: this family's are variance preserving (a UNet of Stable "
    "Diffusion 1.x or 2.x that was trained for them says prediction_type flow_prediction in scheduler_config.json)",
    "EDM": "whose levels are those of EDM (unbounded noise, and inputs scaled by it): this family's are variance "
    "preserving",
    "": "whose levels nobody here knows",
}
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
PARTS = {
    "scheduler": Component("scheduler", "diffusers", KNOWN_SCHEDULERS),
    "unet": Component("network", "diffusers", ("UNet2DConditionModel",)),
    "vae": Component("network", "diffusers", ("AutoencoderKL",)),
    "text_encoder": Component("network", "transformers", ("CLIPTextModel",)),
    "tokenizer": Component("tokenizer", "transformers", TOKENIZERS),
}
# What a UNet may be given beside latents, time and text. None of it is, so that it must not be asked for.
UNGIVEN = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
EMBEDDED_GUIDANCE = 8.5  # what diffusers' pipeline of latent consistency models asks for
WIDTH_OF_2 = 1024  # of the text encoder of Stable Diffusion 2.x


def check_scheduler(configurations: Configurations, where: str) -> None:
    """See that the levels are variance preserving: by the class in `model_index.json` and by the one in its own file.

    Raises:
        ModelError: names the class, and what its levels are.
    """
    for name in scheduler_classes(configurations):
        if name not in KNOWN_SCHEDULERS:
            reason = next(text for start, text in OTHER_LEVELS.items() if str(name).startswith(start))
            raise ModelError(
                f"{where} is a {configurations.pipeline} with the scheduler {name}, {reason}. Known are "
                f"{', '.join(KNOWN_SCHEDULERS)}. Use a checkpoint with the scheduler that it was trained for"
            )


def predicts_flow(configurations: Configurations) -> bool:
    """Whether a UNet was trained for rectified flow: both classes of its scheduler and its own file must say so.

    The scheduler alone does not tell, since any can be put beside any UNet; diffusers' names for what a network puts
    out have one for it.
    """
    told = configurations.parts["scheduler"].get("prediction_type") == FLOW_PREDICTION
    return told and all(name == FLOW_SCHEDULER for name in scheduler_classes(configurations))


def scheduler_classes(configurations: Configurations) -> list[Any]:
    """As `model_index.json` and the scheduler's own file name it; old files do not."""
    listed = configurations.index["scheduler"][1]
    return [listed, configurations.parts["scheduler"].get("_class_name", listed)]


def check_unet(configurations: Configurations, added: str | None, where: str) -> None:
    """See that the UNet takes what this family gives it.

    Args:
        configurations: the checkpoint's.
        added: the `addition_embed_type` of the family.
        where: the checkpoint, for errors.

    Raises:
        ModelError: it wants more or other inputs.
    """
    unet, vae = (configurations.parts[name] for name in ("unet", "vae"))
    if (found := unet.get("addition_embed_type")) != added:
        raise ModelError(
            f"{where} has a UNet with addition_embed_type {found!r}; a {configurations.pipeline} has {added!r}. Use a "
            "checkpoint whose UNet and pipeline belong together"
        )
    for key in UNGIVEN:
        if unet.get(key) is not None:
            raise ModelError(
                f"{where} has a UNet with {key} {unet[key]!r}, an input that no text gives. Use a text-to-image or an "
                "inpainting checkpoint"
            )
    for kind in _block_types(unet):
        if kind not in KNOWN_BLOCKS:
            raise ModelError(
                f"{where} has a UNet with blocks of class {kind}; known are {', '.join(map(str, KNOWN_BLOCKS))}. Use a "
                "checkpoint of these"
            )
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if isinstance(latents, int) and channels not in (latents, 2 * latents + 1):
        raise ModelError(
            f"{where} has a UNet of {channels} input channels on latents of {latents}: neither a text-to-image nor an "
            "inpainting model. Use one of those"
        )


def _block_types(unet: Mapping[str, Any]) -> list[Any]:
    try:
        return block_types(unet)
    except (KeyError, TypeError):
        return []  # loading says what is wrong with it


def schedule_of(configurations: Configurations) -> NoiseSchedule | FlowSchedule:
    """The levels, as the scheduler's configuration states them."""
    config: Mapping[str, Any] = configurations.parts["scheduler"]
    if predicts_flow(configurations):
        return FlowSchedule.from_config(config, "even")
    if LATENT_CONSISTENCY in scheduler_classes(configurations):
        # Its student has seen timesteps 19, 39 .. 999 alone (arXiv 2310.04378): few trailing steps are among them.
        config = {**config, "_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    return NoiseSchedule.from_config(config)


def ddim_of(configurations: Configurations) -> Any:
    """diffusers' own DDIM on the levels of `schedule_of`. A last level that the file leaves open is timestep 0's."""
    from diffusers import DDIMScheduler

    config = dict(configurations.parts["scheduler"])
    fixed = {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": config.get("set_alpha_to_one", False)}
    return DDIMScheduler.from_config({**config, **fixed})


def offers_of(configurations: Configurations) -> Offers:
    """What a UNet of this configuration offers.

    Raises:
        KeyError, TypeError, IndexError: it is none of a UNet.
    """
    unet, vae = (configurations.parts[name] for name in ("unet", "vae"))
    inpaints = unet.get("in_channels", 4) == 2 * vae.get("latent_channels", 4) + 1
    return Offers(
        openings=openings_of_config(unet),
        inputs=frozenset({"inpaint"} if inpaints else ()),
        embedding_gradients=True,
        distilled=why_distilled(configurations),
        bottleneck=bottleneck_of_config(unet, vae),
    )


def load_networks(
    checkpoint: Checkpoint, components: Components, loading: Loading, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Any]:
    """The networks of a checkpoint by name, on their device. `dtypes`: of those that differ from the others.

    Raises:
        ModelError: one cannot be loaded, or UNet and autoencoder do not fit.
    """
    networks = {
        name: load_network(checkpoint, name, component, dtypes.get(name, loading.dtype))
        for name, component in components.items()
        if component.kind == "network"
    }
    check_latents(networks["unet"].config, networks["vae"].config, checkpoint.where)
    refuse_8bit(loading, components, checkpoint.where)
    for name, network in networks.items():
        place(name, network.eval().requires_grad_(False), loading)
    if (width := networks["unet"].config.time_cond_proj_dim) is not None:
        _tell_guidance(networks["unet"], width, loading.device)
    return networks


def _tell_guidance(unet: Any, width: int, device: torch.device) -> None:
    """Let a guidance-distilled UNet hear one guidance scale at every call: the one that it is published with."""
    frequencies = torch.exp(torch.arange(width // 2) * (-math.log(10_000.0) / (width // 2 - 1)))
    angles = 1000.0 * (EMBEDDED_GUIDANCE - 1.0) * frequencies
    told = torch.cat([angles.sin(), angles.cos()])[None].to(device, unet.dtype)
    unet.time_embedding.forward = partial(_hear, unet.time_embedding.forward, told)


def _hear(forward: Callable[..., Tensor], told: Tensor, time: Tensor, condition: None = None) -> Tensor:
    return forward(time, told)


def widest_of_unet(configurations: Configurations, side: int) -> tuple[int, int]:
    """Of its first level, where latents are largest."""
    channels: int = configurations.parts["unet"].get("block_out_channels", [320])[0]
    return side * side, channels


def why_distilled(configurations: Configurations) -> str:
    """Why the model was made for a few unguided steps; "" for a whole diffusion model.

    Latent consistency models say so. Adversarial distillation (arXiv 2311.17042) leaves the architecture as it was,
    and no key says "turbo". What stabilityai/sdxl-turbo and stabilityai/sd-turbo have in common, and no whole model has
    that we know of: an Euler scheduler that spaces its steps trailing, while the network predicts noise, and a side of
    64 latents for an architecture of Stable Diffusion XL (whose own side is 128) or 2.x (whose models of side 64 have
    leading steps). Trailing spacing alone is no sign: models with zero terminal SNR have it, which predict v.
    """
    unet = configurations.parts["unet"]
    if (width := unet.get("time_cond_proj_dim")) is not None:
        return (
            "this checkpoint is guidance-distilled: its UNet takes a guidance scale as an input (time_cond_proj_dim "
            f"{width})"
        )
    if LATENT_CONSISTENCY in scheduler_classes(configurations):
        return (
            "this checkpoint is a latent consistency model, made for a few unguided steps (its scheduler is "
            f"{LATENT_CONSISTENCY})"
        )
    scheduler = configurations.parts["scheduler"]
    trailing_noise = (
        scheduler.get("timestep_spacing") == "trailing"
        and scheduler.get("prediction_type", "epsilon") == "epsilon"
        and not scheduler.get("rescale_betas_zero_snr")
        and all(str(name).startswith("Euler") for name in scheduler_classes(configurations))
    )
    is_xl, is_2 = unet.get("addition_embed_type") == "text_time", unet.get("cross_attention_dim") == WIDTH_OF_2
    if trailing_noise and (is_xl or is_2) and unet.get("sample_size") == 64:
        return (
            "this checkpoint looks like a Turbo model, made for one to four unguided steps (an Euler scheduler with "
            "trailing steps, a UNet that predicts noise, of side 64; where it is none, set timestep_spacing to leading "
            "in its scheduler_config.json)"
        )
    return ""
