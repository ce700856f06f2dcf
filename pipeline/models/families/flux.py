"""FLUX.1 dev, schnell and Kontext (Black Forest Labs, 2024; arXiv 2506.15742).

A transformer of blocks in which image and text attend to each other, and of blocks that hold both in one stream; T5
text, and CLIP's pooled; latents of 16 channels, packed two by two; levels shifted by the image's size. dev was
distilled from a guided model, and is told a guidance scale; schnell into few steps. Kontext
reads a reference image. Page: docs/families/flux.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.flow_schedule import PATCH, FlowSchedule
from pipeline.engine.backbone import Backbone, Offers
from pipeline.engine.calls import Conditioning
from pipeline.engine.controls import Layer
from pipeline.errors import ModelError
from pipeline.models.autoencoder import Autoencoder
from pipeline.models.checkpoint import Checkpoint, Component, Configurations
from pipeline.models.clip import ClipText
from pipeline.models.families.base import Asked, Family, Loading
from pipeline.models.families.flow_matching import (
    PARTS,
    T5_TOKENIZERS,
    check_channels,
    check_scheduler,
    check_widths,
    joint_openings,
    load_networks,
    widest_of_transformer,
)
from pipeline.models.families.sd3 import refuse_zeros
from pipeline.models.flow_transformer import FlowText, FlowTransformer, Velocity
from pipeline.models.joint_attention import JointLayer
from pipeline.models.networks import check_tokenizer, load_tokenizer
from pipeline.models.t5 import T5Text, check_t5

KONTEXT = "FluxKontextPipeline"  # trained to read a reference image
SIDE = 128  # latents: the configuration says none, and this is what diffusers' pipeline samples unasked
TEXT_TOKENS = {"dev": 512, "schnell": 256}  # what each was trained with
NO_GUIDANCE = 1.0  # that dev is told: its prediction as if it were not guided
TOLD_TIME = 1000.0  # the network multiplies by this what it is told


class FluxFamily(Family):
    """See the module."""

    name = "flux"
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline", KONTEXT)
    components: ClassVar = {
        **PARTS,
        "transformer": Component("network", "diffusers", ("FluxTransformer2DModel",)),
        "text_encoder": Component("network", "transformers", ("CLIPTextModel",)),
        "text_encoder_2": Component("network", "transformers", ("T5EncoderModel",)),
        "tokenizer_2": Component("tokenizer", "transformers", T5_TOKENIZERS),
    }

    @override
    def check(self, configurations: Configurations, where: str) -> None:
        check_scheduler(configurations, where)
        check_channels(configurations.parts["transformer"], 64, configurations.parts["vae"], PATCH * PATCH, where)
        self.schedule_of(configurations)

    def schedule_of(self, configurations: Configurations) -> FlowSchedule:
        """The levels, as the scheduler's file states them."""
        return FlowSchedule.from_config(configurations.parts["scheduler"], "even")

    @override
    def offers(self, configurations: Configurations) -> Offers:
        told = _is_told_guidance(configurations)
        transformer = configurations.parts["transformer"]
        return Offers(
            openings=joint_openings(
                joint_layers(transformer.get("num_layers", 19), transformer.get("num_single_layers", 38))
            ),
            embedded_guidance=told,
            references=configurations.pipeline == KONTEXT,
            distilled=""
            if told
            else "this checkpoint was distilled into few unguided steps, as FLUX.1-schnell (its transformer takes no "
            "guidance scale: guidance_embeds is false)",
        )

    @override
    def load(self, checkpoint: Checkpoint, loading: Loading) -> Backbone:
        refuse_zeros(checkpoint, loading)
        configurations, where = checkpoint.configurations, checkpoint.where
        told = _is_told_guidance(configurations)
        if not told and loading.embedded_guidance is not None:
            raise ModelError(
                f"model.embedded_guidance is {loading.embedded_guidance:g}, and the transformer of {where} takes no "
                "guidance scale (guidance_embeds is false). Leave it out"
            )
        vae = self.autoencoder_dtype(configurations, loading.dtype)
        networks = load_networks(checkpoint, self.components, loading, vae)
        clip = ClipText(load_tokenizer(checkpoint.folder, "tokenizer"), networks["text_encoder"])
        check_tokenizer("tokenizer", clip.tokenizer, clip.encoder.config, where)
        t5_tokenizer = load_tokenizer(checkpoint.folder, "tokenizer_2", self.components["tokenizer_2"])
        encoder, config = networks["text_encoder_2"], networks["transformer"].config
        check_t5("tokenizer_2", t5_tokenizer, encoder.config, where)
        check_widths("pooled text", config.pooled_projection_dim, clip.encoder.config.hidden_size, where)
        check_widths("embeddings", config.joint_attention_dim, encoder.config.d_model, where)
        num_places = loading.text_tokens or TEXT_TOKENS["dev" if told else "schnell"]
        guidance = (NO_GUIDANCE if loading.embedded_guidance is None else loading.embedded_guidance) if told else None
        return FlowTransformer(
            velocity=FluxVelocity(networks["transformer"]),
            autoencoder=Autoencoder(networks["vae"], loading.outside),
            text=FluxText(clip, T5Text(t5_tokenizer, encoder, num_places), guidance),
            schedule=self.schedule_of(configurations),
            offers=self.offers(configurations),
            record=loading.record,
            device=loading.device,
            side=SIDE,
        )

    @override
    def side(self, configurations: Configurations) -> int:
        return SIDE

    @override
    def widest(self, configurations: Configurations, side: int) -> tuple[int, int]:
        text = TEXT_TOKENS["dev" if _is_told_guidance(configurations) else "schnell"]
        return widest_of_transformer(configurations, side, 24, 128, text)

    @override
    def reference(self, backbone: Backbone, configurations: Configurations) -> Any | None:
        if not isinstance(backbone, FlowTransformer):
            return None
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

        text = backbone.text
        assert isinstance(text, FluxText)
        return FluxPipeline(
            transformer=backbone.velocity.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(configurations.parts["scheduler"]),
            vae=backbone.autoencoder.vae,
            text_encoder=text.clip.encoder,
            tokenizer=text.clip.tokenizer,
            text_encoder_2=text.t5.encoder,
            tokenizer_2=text.t5.tokenizer,
        )

    @override
    def sampled_by(self, reference: Any, backbone: Backbone, latents: Tensor, asked: Asked) -> Tensor:
        assert isinstance(backbone, FlowTransformer)
        text = backbone.text
        assert isinstance(text, FluxText)
        made = asked.by(
            reference,
            packed(latents),
            negative_prompt="",
            true_cfg_scale=asked.guidance_scale,
            guidance_scale=NO_GUIDANCE if text.guidance is None else text.guidance,
            max_sequence_length=text.t5.num_places,
        )
        return unpacked(made, *latents.shape[-2:])


def _is_told_guidance(configurations: Configurations) -> bool:
    return bool(configurations.parts["transformer"].get("guidance_embeds", False))


class FluxText(FlowText):
    """T5's states as keys, and CLIP's pooled text beside the time; with them the guidance scale that a row is told."""

    def __init__(self, clip: ClipText, t5: T5Text, guidance: float | None) -> None:
        """`guidance`: None where the network takes none."""
        self.clip, self.t5, self.guidance = clip, t5, guidance

    @override
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        pooled = self.clip.encode(prompts).pooler_output
        told = {} if self.guidance is None else {"guidance": torch.tensor(self.guidance)}
        return [
            Conditioning(prompt, {"embedding": one.clone(), "pooled": its.clone(), **told}, (self.t5.span(prompt, 0),))
            for prompt, one, its in zip(prompts, self.t5.encode(prompts), pooled, strict=True)
        ]


def joint_layers(num_double: int, num_single: int) -> tuple[Layer, ...]:
    """One per block; blocks of one stream come last. DirectEdit's code swaps values in these alone."""
    return (
        *(Layer("joint", number, "double", number, PATCH, swaps_values=False) for number in range(num_double)),
        *(Layer("joint", num_double + number, "single", number, PATCH) for number in range(num_single)),
    )


class FluxVelocity(Velocity):
    """One call of the transformer: packed latents, with the place of each token."""

    max_side = None

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer

    @override
    def joint_layers(self) -> dict[int, JointLayer]:
        double, single = self.transformer.transformer_blocks, self.transformer.single_transformer_blocks
        layers = [JointLayer(block.attn, text_first=True, one_stream=False) for block in double]
        layers += [JointLayer(block.attn, text_first=True, one_stream=True) for block in single]
        return dict(enumerate(layers))

    @override
    def __call__(
        self, latents: Tensor, times: Tensor, told: Mapping[str, Tensor], reference: Tensor | None = None
    ) -> Tensor:
        """A reference's tokens stand behind those of the latents, as of another image; what is said of them is left."""
        dtype, (height, width) = latents.dtype, latents.shape[-2:]
        embedding = told["embedding"].to(dtype)
        guidance = told.get("guidance")
        tokens, where = packed(latents), places(height, width, latents.device)
        count = tokens.shape[1]
        if reference is not None:
            tokens = torch.cat([tokens, packed(reference)], dim=1)
            beside = places(reference.shape[-2], reference.shape[-1], latents.device, image=1)
            where = torch.cat([where, beside])
        output: Tensor = self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=embedding,
            pooled_projections=told["pooled"].to(dtype),
            timestep=times / TOLD_TIME,
            img_ids=where,
            txt_ids=torch.zeros((embedding.shape[1], 3), device=latents.device),
            guidance=None if guidance is None else guidance.to(times.dtype),
            return_dict=False,
        )[0]
        return unpacked(output[:, :count], height, width)


def packed(latents: Tensor) -> Tensor:
    """Latents (R, C, h, w) as tokens (R, h/2 w/2, 4 C), row by row; each holds two by two, channel by channel."""
    rows, channels, height, width = latents.shape
    cut = latents.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * PATCH * PATCH)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """What `packed` was given."""
    cut = tokens.reshape(len(tokens), height // PATCH, width // PATCH, -1, PATCH, PATCH)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def places(height: int, width: int, device: torch.device, image: int = 0) -> Tensor:
    """Of each token of latents (height, width): which image it belongs to, its row and its column, (N, 3) float32."""
    grid = torch.zeros((height // PATCH, width // PATCH, 3), device=device)
    grid[..., 0] = image
    grid[..., 1] += torch.arange(height // PATCH, device=device)[:, None]
    grid[..., 2] += torch.arange(width // PATCH, device=device)[None]
    return grid.reshape(-1, 3)
