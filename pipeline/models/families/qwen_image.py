"""Qwen-Image and Qwen-Image-Edit (Wu et al., arXiv 2508.02324).

A transformer of blocks in which image and text attend to each other; Qwen2.5-VL as text encoder, whose padding is
masked; latents of 16 channels of a video's autoencoder, packed two by two; levels shifted by the image's size, and
stretched to end at one of the checkpoint's. Guidance keeps the length of each token's velocity. Edit and Edit Plus read
a reference image, and their text encoder sees it. Page: docs/families/qwen_image.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.flow_schedule import PATCH, FlowSchedule
from pipeline.engine.backbone import Backbone, Offers
from pipeline.engine.controls import Layer
from pipeline.errors import ModelError
from pipeline.models.autoencoder import Autoencoder
from pipeline.models.checkpoint import Checkpoint, Component, Configurations
from pipeline.models.families.base import Asked, Family, Loading
from pipeline.models.families.flow_matching import (
    PARTS,
    check_channels,
    check_scheduler,
    check_widths,
    joint_openings,
    load_networks,
    widest_of_transformer,
)
from pipeline.models.families.flux import TOLD_TIME, packed, unpacked
from pipeline.models.families.sd3 import refuse_zeros
from pipeline.models.flow_transformer import FlowTransformer, Velocity
from pipeline.models.joint_attention import JointLayer
from pipeline.models.networks import load_tokenizer
from pipeline.models.one_frame import OneFrame
from pipeline.models.qwen_vl import NO_WORDS, Conversation, PictureCut, QwenText, check_qwen

# Trained to read a reference image, which its text encoder sees; Plus reads several, of which one is given here.
EDIT, EDIT_PLUS = EDITS = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
SIDE = 128  # latents: the configuration says none, and this is what diffusers' pipeline samples unasked
TEXT_TOKENS = 256
LATENTS = 16  # channels, where the autoencoder's file does not say
SHRINKS = 8  # pixels per latent of that autoencoder, along a side
CHANNELS, LEVELS = 96, (1, 2, 4, 4)  # of its levels, where its file does not say
# What every prompt stands behind, as in training.
PLAIN = Conversation(
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    34,
)
WITH_PICTURE = Conversation(
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate.<|im_end|>\n<|im_start|>user\n",
    64,
    "<|vision_start|><|image_pad|><|vision_end|>",
)
NUMBERED = WITH_PICTURE._replace(before=f"Picture 1: {WITH_PICTURE.before}")  # of Plus
SEEN_OF_PLUS = 384 * 384  # pixels of what its text encoder sees
UNKNOWN = {
    "guidance_embeds": "its transformer would be told a guidance scale, of which diffusers' own knows nothing",
    "use_additional_t_cond": "its transformer would be told more than the time, as for pictures in layers",
    "use_layer3d_rope": "its transformer counts layers of a picture among its places",
}


class QwenImageFamily(Family):
    """See the module."""

    name = "qwen_image"
    pipelines = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", *EDITS)
    components: ClassVar = {
        **PARTS,
        "vae": Component("network", "diffusers", ("AutoencoderKLQwenImage",)),
        "transformer": Component("network", "diffusers", ("QwenImageTransformer2DModel",)),
        "text_encoder": Component("network", "transformers", ("Qwen2_5_VLForConditionalGeneration",)),
        "tokenizer": Component("tokenizer", "transformers", ("Qwen2TokenizerFast", "Qwen2Tokenizer")),
        "processor": Component(
            "processor", "transformers", ("Qwen2VLProcessor", "Qwen2_5_VLProcessor"), pipelines=EDITS
        ),
    }

    @override
    def check(self, configurations: Configurations, where: str) -> None:
        check_scheduler(configurations, where)
        transformer, vae = configurations.parts["transformer"], configurations.parts["vae"]
        check_channels(transformer, 64, {"latent_channels": vae.get("z_dim", LATENTS)}, PATCH * PATCH, where)
        for key, reason in UNKNOWN.items():
            if transformer.get(key):
                raise ModelError(
                    f"{where} has a transformer with {key}: {reason}. Use a checkpoint of Qwen-Image or Qwen-Image-Edit"
                )
        if vae.get("input_channels", 3) != 3:
            raise ModelError(
                f"{where} has an autoencoder of {vae['input_channels']} channels of pixels, and pictures have 3. Use a "
                "checkpoint of Qwen-Image or Qwen-Image-Edit"
            )
        self.schedule_of(configurations)
        _with_picture(configurations, where)

    def schedule_of(self, configurations: Configurations) -> FlowSchedule:
        """The levels, as the scheduler's file states them."""
        return FlowSchedule.from_config(configurations.parts["scheduler"], "even")

    @override
    def offers(self, configurations: Configurations) -> Offers:
        edits = configurations.pipeline in EDITS
        layers = joint_layers(configurations.parts["transformer"].get("num_layers", 60))
        return Offers(openings=joint_openings(layers), references=edits, reads_pictures=edits)

    @override
    def load(self, checkpoint: Checkpoint, loading: Loading) -> Backbone:
        refuse_zeros(checkpoint, loading)
        configurations, where = checkpoint.configurations, checkpoint.where
        if loading.embedded_guidance is not None:
            raise ModelError(
                f"model.embedded_guidance is {loading.embedded_guidance:g}, and {where} is a Qwen-Image, whose network "
                "takes no guidance scale. Leave it out, and set the method's guidance_scale"
            )
        vae = self.autoencoder_dtype(configurations, loading.dtype)
        networks = load_networks(checkpoint, self.components, loading, vae)
        tokenizer = load_tokenizer(checkpoint.folder, "tokenizer", self.components["tokenizer"])
        encoder, with_picture = networks["text_encoder"], _with_picture(configurations, where)
        check_qwen(tokenizer, encoder.config, [PLAIN, *([] if with_picture is None else with_picture[:1])], where)
        width = encoder.config.text_config.hidden_size
        check_widths("embeddings", networks["transformer"].config.joint_attention_dim, width, where)
        return FlowTransformer(
            velocity=QwenImageVelocity(networks["transformer"]),
            autoencoder=Autoencoder(OneFrame(networks["vae"]), loading.outside),
            text=QwenText(
                tokenizer,
                encoder,
                num_places=loading.text_tokens or TEXT_TOKENS,
                conversation=PLAIN,
                with_picture=with_picture,
            ),
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
    def num_words_read(self, tokenizer: Any, prompt: str, text_tokens: int | None) -> int:
        """All: one that is too long is refused."""
        return len(prompt.split())

    @override
    def autoencoder_levels(self, configurations: Configurations) -> list[int]:
        vae = configurations.parts["vae"]
        return [vae.get("base_dim", CHANNELS) * one for one in vae.get("dim_mult", LEVELS)]

    @override
    def widest(self, configurations: Configurations, side: int) -> tuple[int, int]:
        """With a reference of the latents' own size, and its tokens in the text, where one is read."""
        beside, with_picture = TEXT_TOKENS, _with_picture(configurations, "it")
        if with_picture is not None:
            pixels = side * SHRINKS
            beside += (side // PATCH) ** 2 + with_picture[1].num_tokens(pixels, pixels)
        return widest_of_transformer(configurations, side, 24, 128, beside)

    @override
    def reference(self, backbone: Backbone, configurations: Configurations) -> Any | None:
        """Text to image, of Edit as well."""
        if not isinstance(backbone, FlowTransformer):
            return None
        from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

        text, vae = backbone.text, backbone.autoencoder.vae
        assert isinstance(text, QwenText)
        return QwenImagePipeline(
            transformer=backbone.velocity.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(configurations.parts["scheduler"]),
            vae=vae.video,
            text_encoder=text.encoder,
            tokenizer=text.tokenizer,
        )

    @override
    def sampled_by(self, reference: Any, backbone: Backbone, latents: Tensor, asked: Asked) -> Tensor:
        made = asked.by(
            reference,
            packed(latents),
            negative_prompt=NO_WORDS,
            true_cfg_scale=asked.guidance_scale,
            guidance_scale=None,
        )
        return unpacked(made, *latents.shape[-2:])

    @override
    def unscaled(self, reference: Any, latents: Tensor) -> Tensor:
        config = reference.vae.config
        mean, std = (
            torch.tensor(one).view(1, -1, 1, 1).to(latents) for one in (config.latents_mean, config.latents_std)
        )
        return (latents * std + mean)[:, :, None]


def _with_picture(configurations: Configurations, where: str) -> tuple[Conversation, PictureCut] | None:
    """What stands around a prompt that speaks of a picture, and how that is cut; None: the text encoder sees none."""
    if configurations.pipeline not in EDITS:
        return None
    vision = configurations.parts["text_encoder"].get("vision_config") or {}
    cut = PictureCut.from_config(configurations.parts["processor"], vision, where)
    if configurations.pipeline == EDIT:
        return WITH_PICTURE, cut
    return NUMBERED, replace(cut, area=SEEN_OF_PLUS)


def joint_layers(num_blocks: int) -> tuple[Layer, ...]:
    """One per block. Nobody has measured in which of them values are best swapped: in all."""
    return tuple(Layer("joint", number, "double", number, PATCH) for number in range(num_blocks))


class QwenImageVelocity(Velocity):
    """One call of the transformer: packed latents, and text whose padding is masked."""

    max_side = None

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer

    @override
    def joint_layers(self) -> dict[int, JointLayer]:
        blocks = self.transformer.transformer_blocks
        return {
            number: JointLayer(block.attn, text_first=True, one_stream=False) for number, block in enumerate(blocks)
        }

    @override
    def __call__(
        self, latents: Tensor, times: Tensor, told: Mapping[str, Tensor], reference: Tensor | None = None
    ) -> Tensor:
        """A reference's tokens stand behind those of the latents, as of another image; what is said of them is left."""
        height, width = latents.shape[-2:]
        embedding = told["embedding"].to(latents.dtype)
        tokens = packed(latents)
        count = tokens.shape[1]
        grids = [(1, height // PATCH, width // PATCH)]
        if reference is not None:
            tokens = torch.cat([tokens, packed(reference)], dim=1)
            grids.append((1, reference.shape[-2] // PATCH, reference.shape[-1] // PATCH))
        output: Tensor = self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=embedding,
            # Given always, also where no place is padding: kernels with a mask round otherwise than those without.
            encoder_hidden_states_mask=embedding.any(dim=-1),
            timestep=times / TOLD_TIME,
            img_shapes=[grids] * len(latents),
            return_dict=False,
        )[0]
        return unpacked(output[:, :count], height, width)
