"""Stable Diffusion 1.x and 2.x, and their inpainting and latent consistency variants.

One CLIP text encoder, whose last hidden state (normed) a UNet reads; latents of a KL autoencoder, an eighth of the
image's side. epsilon or v predictions, or rectified flow's velocity. Page: docs/families/stable_diffusion.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from pipeline.engine.backbone import Backbone, Offers
from pipeline.engine.calls import Conditioning
from pipeline.errors import ModelError
from pipeline.models.autoencoder import Autoencoder
from pipeline.models.checkpoint import Checkpoint, Configurations
from pipeline.models.clip import ClipText
from pipeline.models.families.base import Family, Loading
from pipeline.models.families.latent_diffusion import (
    PARTS,
    check_scheduler,
    check_unet,
    ddim_of,
    load_networks,
    offers_of,
    predicts_flow,
    schedule_of,
    widest_of_unet,
)
from pipeline.models.networks import check_text, load_tokenizer
from pipeline.models.stable_diffusion import StableDiffusion, Text


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
        if not predicts_flow(configurations):
            check_scheduler(configurations, where)
        check_unet(configurations, None, where)
        schedule_of(configurations)

    @override
    def offers(self, configurations: Configurations) -> Offers:
        return offers_of(configurations)

    @override
    def load(self, checkpoint: Checkpoint, loading: Loading) -> Backbone:
        if loading.empty_prompt == "zeros":
            raise ModelError(
                f"model.empty_prompt is zeros, and {checkpoint.where} is a Stable Diffusion 1.x or 2.x, which was not "
                "trained with zeros for a text. Leave model.empty_prompt out"
            )
        vae = self.autoencoder_dtype(checkpoint.configurations, loading.dtype)
        networks = load_networks(checkpoint, self.components, loading, {"vae": vae})
        unet, encoder = networks["unet"], networks["text_encoder"]
        _correct_side(unet)
        tokenizer = load_tokenizer(checkpoint.folder, "tokenizer")
        check_text(unet.config, [("tokenizer", tokenizer, encoder.config)], checkpoint.where)
        return StableDiffusion(
            unet=unet,
            autoencoder=Autoencoder(networks["vae"], loading.outside),
            text=LastState(ClipText(tokenizer, encoder)),
            schedule=schedule_of(checkpoint.configurations),
            offers=self.offers(checkpoint.configurations),
            record=loading.record,
            device=loading.device,
        )

    @override
    def widest(self, configurations: Configurations, side: int) -> tuple[int, int]:
        return widest_of_unet(configurations, side)

    @override
    def reference(self, backbone: Backbone, configurations: Configurations) -> Any | None:
        """None for variants: they are sampled otherwise. Nor is there one of rectified flow with a UNet."""
        if not isinstance(backbone, StableDiffusion) or backbone.offers.inputs or backbone.offers.distilled:
            return None
        if predicts_flow(configurations):
            return None
        from diffusers import StableDiffusionPipeline

        assert isinstance(backbone.text, LastState)
        return StableDiffusionPipeline(
            vae=backbone.autoencoder.vae,
            text_encoder=backbone.text.clip.encoder,
            tokenizer=backbone.text.clip.tokenizer,
            unet=backbone.unet,
            scheduler=ddim_of(configurations),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


class LastState(Text):
    """The last hidden state of one encoder, and nothing beside it."""

    def __init__(self, clip: ClipText) -> None:
        self.clip = clip

    @override
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        return [
            Conditioning(prompt, {"embedding": embedding.clone()}, (self.clip.span(prompt),))
            for prompt, embedding in zip(prompts, self.clip.encode(prompts)[0], strict=True)
        ]

    @override
    def added(self, conditioning: Sequence[Conditioning], height: int, width: int) -> dict[str, Tensor]:
        return {}


def _correct_side(unet: Any) -> None:
    """Fine-tuned models of diffusers' first versions call their side 32 for 64: corrected, as its pipelines do."""
    version = re.match(r"(\d+)\.(\d+)", str(unet.config.get("_diffusers_version")))
    if version and (int(version[1]), int(version[2])) < (0, 9) and unet.config.sample_size == 32:
        unet.register_to_config(sample_size=64)
