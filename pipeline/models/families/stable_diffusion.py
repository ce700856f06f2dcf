"""Stable Diffusion 1.x and 2.x, and their inpainting and latent consistency variants.

One CLIP text encoder, whose last hidden state (normed) a UNet reads; latents of a KL autoencoder, an eighth of the
image's side. epsilon or v predictions. Page: docs/families/stable_diffusion.md.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from typing_extensions import override

from pipeline.engine.backbone import Backbone
from pipeline.models.checkpoint import Checkpoint, Configurations
from pipeline.models.families.base import Family, Loading
from pipeline.models.families.latent_diffusion import PARTS, check_scheduler, check_unet, schedule_of, why_unguided
from pipeline.models.networks import check_latents, check_text, load_network, load_tokenizer
from pipeline.models.stable_diffusion import StableDiffusion


class StableDiffusionFamily(Family):
    """See the module."""

    name = "stable_diffusion"
    pipelines = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
    )
    components = PARTS

    @override
    def check(self, configurations: Configurations, where: str) -> None:
        check_scheduler(configurations, where)
        check_unet(configurations, None, where)
        schedule_of(configurations)

    @override
    def unguided(self, configurations: Configurations) -> str:
        return why_unguided(configurations)

    @override
    def load(self, checkpoint: Checkpoint, loading: Loading) -> Backbone:
        dtype = loading.dtype
        # The VAE of many checkpoints overflows in float16, and says so; bfloat16 has the range.
        upcast = dtype == torch.float16 and checkpoint.configurations.parts["vae"].get("force_upcast", True)
        dtypes = {"unet": dtype, "vae": torch.float32 if upcast else dtype, "text_encoder": dtype}
        networks = {
            name: load_network(checkpoint, name, self.components[name], dtype) for name, dtype in dtypes.items()
        }
        _correct_side(networks["unet"])
        tokenizer = load_tokenizer(checkpoint.folder, "tokenizer")
        unet, vae, text = (networks[name].config for name in ("unet", "vae", "text_encoder"))
        check_latents(unet, vae, checkpoint.where)
        check_text(unet, [("tokenizer", tokenizer, text)], checkpoint.where)
        for network in networks.values():
            network.to(loading.device).eval().requires_grad_(False)
        return StableDiffusion(
            **networks,
            tokenizer=tokenizer,
            schedule=schedule_of(checkpoint.configurations),
            record=loading.record,
            device=loading.device,
            compile_unet=loading.compiled,
        )


def _correct_side(unet: Any) -> None:
    """Fine-tuned models of diffusers' first versions call their side 32 for 64: corrected, as its pipelines do."""
    version = re.match(r"(\d+)\.(\d+)", str(unet.config.get("_diffusers_version")))
    if version and (int(version[1]), int(version[2])) < (0, 9) and unet.config.sample_size == 32:
        unet.register_to_config(sample_size=64)
