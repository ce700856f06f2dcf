"""Stable Diffusion XL and its inpainting variant (Podell et al., arXiv 2307.01952).

Two CLIP text encoders, whose second last hidden states a UNet reads side by side; the second's pooled text and the
image's size beside the timestep; latents of a KL autoencoder that needs float32. Page:
docs/families/stable_diffusion_xl.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.engine.backbone import Backbone, Offers
from pipeline.engine.calls import Conditioning
from pipeline.errors import ModelError
from pipeline.models.autoencoder import Autoencoder
from pipeline.models.checkpoint import Checkpoint, Component, Configurations
from pipeline.models.clip import ClipText
from pipeline.models.families.base import Family, Loading
from pipeline.models.families.latent_diffusion import (
    PARTS,
    TOKENIZERS,
    check_scheduler,
    check_unet,
    ddim_of,
    load_networks,
    offers_of,
    schedule_of,
    widest_of_unet,
)
from pipeline.models.networks import check_text, load_tokenizer
from pipeline.models.stable_diffusion import StableDiffusion, Text

ZEROS_FOR_EMPTY = "force_zeros_for_empty_prompt"
NUM_SIZE_IDS = 6


class StableDiffusionXLFamily(Family):
    """See the module."""

    name = "stable_diffusion_xl"
    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline")
    components: ClassVar = {
        **PARTS,
        "text_encoder_2": Component("network", "transformers", ("CLIPTextModelWithProjection",)),
        "tokenizer_2": Component("tokenizer", "transformers", TOKENIZERS),
    }
    decisive = (ZEROS_FOR_EMPTY,)

    @override
    def check(self, configurations: Configurations, where: str) -> None:
        check_scheduler(configurations, where)
        check_unet(configurations, "text_time", where)
        _check_beside_the_time(configurations, where)
        schedule_of(configurations)

    @override
    def offers(self, configurations: Configurations) -> Offers:
        return offers_of(configurations)

    @override
    def load(self, checkpoint: Checkpoint, loading: Loading) -> Backbone:
        configurations = checkpoint.configurations
        vae = self.autoencoder_dtype(configurations, loading.dtype)
        networks = load_networks(checkpoint, self.components, loading, {"vae": vae})
        tokenizers = {name: load_tokenizer(checkpoint.folder, name) for name in ("tokenizer", "tokenizer_2")}
        encoders = [
            (name, tokenizer, networks[name.replace("tokenizer", "text_encoder")])
            for name, tokenizer in tokenizers.items()
        ]
        check_text(
            networks["unet"].config,
            [(name, tokenizer, encoder.config) for name, tokenizer, encoder in encoders],
            checkpoint.where,
        )
        autoencoder = Autoencoder(networks["vae"], loading.outside)
        first, second = (ClipText(tokenizer, encoder) for _, tokenizer, encoder in encoders)
        zeros = loading.empty_prompt == "zeros" or (
            loading.empty_prompt == "auto" and bool(configurations.index.get(ZEROS_FOR_EMPTY))
        )
        return StableDiffusion(
            unet=networks["unet"],
            autoencoder=autoencoder,
            text=XLText(first, second, autoencoder.factor, zeros_for_empty=zeros),
            schedule=schedule_of(configurations),
            offers=self.offers(configurations),
            record=loading.record,
            device=loading.device,
        )

    @override
    def autoencoder_dtype(self, configurations: Configurations, dtype: torch.dtype) -> torch.dtype:
        """The published one overflows in float16, and loses precision in bfloat16; a repaired one says so."""
        upcast = configurations.parts["vae"].get("force_upcast", True) and dtype in (torch.float16, torch.bfloat16)
        return torch.float32 if upcast else dtype

    @override
    def widest(self, configurations: Configurations, side: int) -> tuple[int, int]:
        return widest_of_unet(configurations, side)

    @override
    def reference(self, backbone: Backbone, configurations: Configurations) -> Any | None:
        """None for variants: they are sampled otherwise. Empty prompts are what the recipe makes of them."""
        if not isinstance(backbone, StableDiffusion) or backbone.offers.inputs or backbone.offers.distilled:
            return None
        from diffusers import StableDiffusionXLPipeline

        text = backbone.text
        assert isinstance(text, XLText)
        return StableDiffusionXLPipeline(
            vae=backbone.autoencoder.vae,
            text_encoder=text.first.encoder,
            text_encoder_2=text.second.encoder,
            tokenizer=text.first.tokenizer,
            tokenizer_2=text.second.tokenizer,
            unet=backbone.unet,
            scheduler=ddim_of(configurations),
            force_zeros_for_empty_prompt=text.zeros_for_empty,
            add_watermarker=False,
        )


def _check_beside_the_time(configurations: Configurations, where: str) -> None:
    """See that the UNet takes pooled text and six size ids beside the timestep."""
    unet, text = (configurations.parts[name] for name in ("unet", "text_encoder_2"))
    takes, pooled, each = (
        unet.get("projection_class_embeddings_input_dim"),
        text.get("projection_dim", 512),  # what transformers takes for it
        unet.get("addition_time_embed_dim"),
    )
    if not isinstance(each, int) or not isinstance(pooled, int) or takes != pooled + NUM_SIZE_IDS * each:
        raise ModelError(
            f"{where} has a UNet that takes {takes} numbers beside the timestep, and not pooled text of {pooled} and "
            f"{NUM_SIZE_IDS} size ids of {each} each. Use a base checkpoint; a refiner takes a score, too"
        )


class SizeIds(NamedTuple):
    """What the network is told of the image's size, in pixels: (height, width), and (top, left) for the crop.

    Trained on whatever images came: the original's size, where its crop began, and the size asked for. None: the
    canvas, which makes the network take the image for a whole one of just this size.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None

    def of(self, height: int, width: int) -> tuple[int, ...]:
        """The six numbers of a canvas."""
        canvas = (height, width)
        return (*(self.original or canvas), *self.crop, *(self.target or canvas))


class XLText(Text):
    """Two encoders over the same 77 places."""

    def __init__(
        self,
        first: ClipText,
        second: ClipText,
        pixels_per_latent: int,
        *,
        zeros_for_empty: bool,
    ) -> None:
        """`zeros_for_empty`: zeros stand for every empty prompt, as in training; else it is encoded like any other."""
        self.first, self.second, self.size_ids = first, second, SizeIds()
        self._pixels, self.zeros_for_empty = pixels_per_latent, zeros_for_empty

    @override
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        of_first, of_second = (clip.encode(prompts, hidden_states=True) for clip in (self.first, self.second))
        embeddings = torch.cat([of_first.hidden_states[-2], of_second.hidden_states[-2]], dim=-1)
        of_each = zip(prompts, embeddings, of_second.text_embeds, strict=True)
        return [self._conditioning(prompt, embedding.clone(), pooled.clone()) for prompt, embedding, pooled in of_each]

    def _conditioning(self, prompt: str, embedding: Tensor, pooled: Tensor) -> Conditioning:
        parts = {"embedding": embedding, "pooled": pooled}
        if self.zeros_for_empty and not prompt.strip():
            parts = {name: torch.zeros_like(part) for name, part in parts.items()}
        # The published tokenizers differ in their padding alone: one view of the prompt, not two of the same.
        spans = dict.fromkeys((self.first.span(prompt), self.second.span(prompt)))
        return Conditioning(prompt, parts, tuple(spans))

    @override
    def added(self, conditioning: Sequence[Conditioning], height: int, width: int) -> dict[str, Tensor]:
        pooled = torch.stack([one.parts["pooled"] for one in conditioning])  # (R, P)
        ids = self.size_ids.of(height * self._pixels, width * self._pixels)
        # In float32 whatever the network's dtype: half precision rounds sides above 2,048.
        time_ids = torch.tensor([ids] * len(conditioning), dtype=torch.float32)
        return {"text_embeds": pooled, "time_ids": time_ids}
