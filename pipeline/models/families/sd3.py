"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206), with and without the T5 text encoder.

A transformer in which image and text attend to each other in every block; two CLIP text encoders and T5, side by side
in one sequence; unpacked latents of 16 channels; a constant shift of the levels. Page: docs/families/sd3.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
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
    CLIP_TOKENIZERS,
    PARTS,
    T5_TOKENIZERS,
    check_channels,
    check_scheduler,
    check_widths,
    joint_openings,
    load_networks,
    widest_of_transformer,
)
from pipeline.models.flow_transformer import FlowText, FlowTransformer, Velocity
from pipeline.models.joint_attention import JointLayer
from pipeline.models.networks import check_tokenizer, load_tokenizer
from pipeline.models.t5 import T5Text, check_t5

MOST_SWAPPED = 37  # blocks
CLIP_TOKENS = 77  # of both CLIP encoders, which stand side by side
TEXT_TOKENS = 256  # of T5, where the recipe does not say


class StableDiffusion3Family(Family):
    """See the module."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    components: ClassVar = {
        **PARTS,
        "transformer": Component("network", "diffusers", ("SD3Transformer2DModel",)),
        "text_encoder": Component("network", "transformers", ("CLIPTextModelWithProjection",)),
        "text_encoder_2": Component("network", "transformers", ("CLIPTextModelWithProjection",)),
        "tokenizer_2": Component("tokenizer", "transformers", CLIP_TOKENIZERS),
        "text_encoder_3": Component("network", "transformers", ("T5EncoderModel",), optional=True),
        "tokenizer_3": Component("tokenizer", "transformers", T5_TOKENIZERS, optional=True),
    }

    @override
    def check(self, configurations: Configurations, where: str) -> None:
        check_scheduler(configurations, where)
        check_channels(configurations.parts["transformer"], 16, configurations.parts["vae"], 1, where)
        self.schedule_of(configurations)

    def schedule_of(self, configurations: Configurations) -> FlowSchedule:
        """The levels, as the scheduler's file states them."""
        return FlowSchedule.from_config(configurations.parts["scheduler"], "to_lowest")

    @override
    def offers(self, configurations: Configurations) -> Offers:
        count = configurations.parts["transformer"].get("num_layers", 18)
        return Offers(openings=joint_openings(joint_layers(count)))

    @override
    def load(self, checkpoint: Checkpoint, loading: Loading) -> Backbone:
        refuse_zeros(checkpoint, loading)
        if loading.embedded_guidance is not None:
            raise ModelError(
                f"model.embedded_guidance is {loading.embedded_guidance:g}, and {checkpoint.where} is a Stable "
                "Diffusion 3, whose network takes no guidance scale. Leave it out, and set the method's guidance_scale"
            )
        vae = self.autoencoder_dtype(checkpoint.configurations, loading.dtype)
        networks = load_networks(checkpoint, self.components, loading, vae)
        velocity = StableDiffusion3Velocity(networks["transformer"])
        return FlowTransformer(
            velocity=velocity,
            autoencoder=Autoencoder(networks["vae"], loading.outside),
            text=self._text(checkpoint, networks, loading.text_tokens or TEXT_TOKENS),
            schedule=self.schedule_of(checkpoint.configurations),
            offers=self.offers(checkpoint.configurations),
            record=loading.record,
            device=loading.device,
            side=int(velocity.transformer.config.sample_size),
        )

    @override
    def widest(self, configurations: Configurations, side: int) -> tuple[int, int]:
        return widest_of_transformer(configurations, side, 18, 64, CLIP_TOKENS + TEXT_TOKENS)

    @override
    def reference(self, backbone: Backbone, configurations: Configurations) -> Any | None:
        if not isinstance(backbone, FlowTransformer):
            return None
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        text = backbone.text
        assert isinstance(text, StableDiffusion3Text)
        t5 = text.t5
        return StableDiffusion3Pipeline(
            transformer=backbone.velocity.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(configurations.parts["scheduler"]),
            vae=backbone.autoencoder.vae,
            text_encoder=text.first.encoder,
            tokenizer=text.first.tokenizer,
            text_encoder_2=text.second.encoder,
            tokenizer_2=text.second.tokenizer,
            text_encoder_3=None if t5 is None else t5.encoder,
            tokenizer_3=None if t5 is None else t5.tokenizer,
        )

    @override
    def sampled_by(self, reference: Any, backbone: Backbone, latents: Tensor, asked: Asked) -> Tensor:
        assert isinstance(backbone, FlowTransformer)
        assert isinstance(backbone.text, StableDiffusion3Text)
        return asked.by(reference, latents, max_sequence_length=backbone.text.num_places)

    def _text(self, checkpoint: Checkpoint, networks: Mapping[str, Any], num_places: int) -> StableDiffusion3Text:
        where, config = checkpoint.where, networks["transformer"].config
        clips = []
        for suffix in ("", "_2"):
            tokenizer = load_tokenizer(checkpoint.folder, f"tokenizer{suffix}")
            encoder = networks[f"text_encoder{suffix}"]
            check_tokenizer(f"tokenizer{suffix}", tokenizer, encoder.config, where)
            clips.append(ClipText(tokenizer, encoder))
        pooled = sum(clip.encoder.config.projection_dim for clip in clips)
        check_widths("pooled text", config.pooled_projection_dim, pooled, where)
        width = int(config.joint_attention_dim)
        if sum(clip.encoder.config.hidden_size for clip in clips) > width:
            raise ModelError(
                f"{where} has a transformer that reads embeddings of {width} numbers, and two CLIP text encoders that "
                "make more, side by side. Use the text encoders that it was trained with"
            )
        if (t5 := networks.get("text_encoder_3")) is None:
            return StableDiffusion3Text(clips[0], clips[1], None, num_places=num_places, width=width)
        tokenizer = load_tokenizer(checkpoint.folder, "tokenizer_3", self.components["tokenizer_3"])
        check_t5("tokenizer_3", tokenizer, t5.config, where)
        check_widths("embeddings", width, t5.config.d_model, where)
        text = T5Text(tokenizer, t5, num_places)
        return StableDiffusion3Text(clips[0], clips[1], text, num_places=num_places, width=width)


def refuse_zeros(checkpoint: Checkpoint, loading: Loading) -> None:
    """Refuse zeros for an empty prompt, which these models were not trained with.

    Raises:
        ModelError: the recipe asks for them.
    """
    if loading.empty_prompt == "zeros":
        raise ModelError(
            f"model.empty_prompt is zeros, and {checkpoint.where} was not trained with zeros for a text. Leave "
            "model.empty_prompt out"
        )


class StableDiffusion3Text(FlowText):
    """Two CLIP encoders over the same 77 places, and T5's places behind them; zeros where there is no T5."""

    def __init__(self, first: ClipText, second: ClipText, t5: T5Text | None, *, num_places: int, width: int) -> None:
        """`num_places`: of T5. `width`: of an embedding, which CLIP's are filled up to with zeros."""
        self.first, self.second, self.t5, self.num_places, self.width = first, second, t5, num_places, width

    @override
    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        of_first, of_second = (clip.encode(prompts, hidden_states=True) for clip in (self.first, self.second))
        clip = torch.cat([of_first.hidden_states[-2], of_second.hidden_states[-2]], dim=-1)
        clip = pad(clip, (0, self.width - clip.shape[-1]))  # (B, 77, D)
        if self.t5 is None:
            behind = clip.new_zeros((len(prompts), self.num_places, self.width))
        else:
            behind = self.t5.encode(prompts).to(clip.dtype)
        embeddings = torch.cat([clip, behind], dim=1)
        pooled = torch.cat([of_first.text_embeds, of_second.text_embeds], dim=-1)
        return [
            Conditioning(prompt, {"embedding": one.clone(), "pooled": its.clone()}, self._spans(prompt, clip.shape[1]))
            for prompt, one, its in zip(prompts, embeddings, pooled, strict=True)
        ]

    def _spans(self, prompt: str, clip_places: int) -> tuple[Any, ...]:
        # The published CLIP tokenizers differ in their padding alone: one view of the prompt, not two of the same.
        spans = dict.fromkeys((self.first.span(prompt), self.second.span(prompt)))
        return (*spans, *(() if self.t5 is None else (self.t5.span(prompt, clip_places),)))


def joint_layers(num_blocks: int) -> tuple[Layer, ...]:
    """One per block. DirectEdit's code swaps the values of the first 37 blocks: all but the last of SD3.5-large."""
    return tuple(
        Layer("joint", number, "double", number, PATCH, swaps_values=number < MOST_SWAPPED)
        for number in range(num_blocks)
    )


class StableDiffusion3Velocity(Velocity):
    """One call of the transformer: unpacked latents, and times as the schedule has them."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        # Positions are cut from the middle of a table, which larger images would leave.
        self.max_side = int(transformer.config.pos_embed_max_size * transformer.config.patch_size)

    @override
    def joint_layers(self) -> dict[int, JointLayer]:
        blocks = self.transformer.transformer_blocks
        return {
            number: JointLayer(block.attn, text_first=False, one_stream=False) for number, block in enumerate(blocks)
        }

    @override
    def __call__(
        self, latents: Tensor, times: Tensor, told: Mapping[str, Tensor], reference: Tensor | None = None
    ) -> Tensor:
        """There is no reference: the family offers none."""
        output: Tensor = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=told["embedding"].to(latents.dtype),
            pooled_projections=told["pooled"].to(latents.dtype),
            timestep=times,
            return_dict=False,
        )[0]
        return output
