"""FLUX.2 klein, base and distilled (Black Forest Labs, 2026).

A transformer of blocks as in FLUX.1, with a feed-forward beside attention in those of one stream; hidden states of a
Qwen3 chat model as text; levels shifted by the image's size and the number of steps. The base checkpoints are guided
against an empty prompt; the distilled ones sample in few steps, unguided. Every checkpoint also reads a reference
image, by which it edits.

Latents stand here as the autoencoder makes them, 32 channels at an eighth of the image's side, normalised. The
published code joins squares of two by two into 128 channels first. That is the same numbers in another order, and so
masks are as fine as the autoencoder, and tokens are packed as FLUX.1's. Page: docs/families/flux2.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from pipeline.diffusion.flow_schedule import PATCH, FittedShift, FlowSchedule
from pipeline.engine.backbone import Backbone, Offers
from pipeline.engine.calls import Conditioning
from pipeline.errors import ModelError
from pipeline.models.autoencoder import Autoencoder
from pipeline.models.chat import ChatText, chat_of, check_chat
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
from pipeline.models.families.flux import SIDE, TOLD_TIME, joint_layers, packed, places, unpacked
from pipeline.models.families.sd3 import refuse_zeros
from pipeline.models.flow_transformer import FlowText, FlowTransformer, Velocity
from pipeline.models.joint_attention import JointLayer
from pipeline.models.networks import load_tokenizer

TEXT_TOKENS = 512  # places of the chat model's states, where the recipe does not say
TEXT_LAYERS = (9, 18, 27)  # of the chat model, whose states stand side by side
REFERENCE = 10  # which image a reference's tokens say that they are of; a second one's would say 20
AXES = 4  # of a token's place: image, row, column, number in the text


class Flux2KleinFamily(Family):
    """See the module."""

    name = "flux2"
    pipelines = ("Flux2KleinPipeline",)
    components: ClassVar = {
        **PARTS,
        "vae": Component("network", "diffusers", ("AutoencoderKLFlux2",)),
        "transformer": Component("network", "diffusers", ("Flux2Transformer2DModel",)),
        "text_encoder": Component("network", "transformers", ("Qwen3ForCausalLM",)),
        "tokenizer": Component("tokenizer", "transformers", ("Qwen2TokenizerFast", "Qwen2Tokenizer")),
    }

    @override
    def check(self, configurations: Configurations, where: str) -> None:
        check_scheduler(configurations, where)
        transformer, vae = configurations.parts["transformer"], configurations.parts["vae"]
        if (squares := vae.get("patch_size", [PATCH, PATCH])) != [PATCH, PATCH]:
            raise ModelError(
                f"{where} has an autoencoder that normalises squares of {squares} latents; known is {[PATCH, PATCH]}. "
                "Use a checkpoint of FLUX.2 klein"
            )
        check_channels(transformer, 128, {"latent_channels": 32, **vae}, PATCH * PATCH, where)
        check_transformer(transformer, where)
        encoder = configurations.parts["text_encoder"]
        num_layers = encoder.get("num_hidden_layers", 32)
        if not isinstance(num_layers, int) or num_layers < TEXT_LAYERS[-1]:
            raise ModelError(
                f"{where} has a text encoder of {num_layers} layers, and the states of layers "
                f"{', '.join(map(str, TEXT_LAYERS))} are what the transformer reads. Use the text encoder that it was "
                "trained with"
            )
        made = len(TEXT_LAYERS) * encoder.get("hidden_size", 4096)
        check_widths("embeddings", transformer.get("joint_attention_dim", 15360), made, where)
        self.schedule_of(configurations)

    def schedule_of(self, configurations: Configurations) -> FlowSchedule:
        """The levels, as the scheduler's file states them; its shift by size as the publishers fitted it."""
        return FlowSchedule.from_config(configurations.parts["scheduler"], "even", FittedShift())

    @override
    def offers(self, configurations: Configurations) -> Offers:
        transformer = configurations.parts["transformer"]
        layers = joint_layers(transformer.get("num_layers", 8), transformer.get("num_single_layers", 48))
        return Offers(
            openings=joint_openings(layers),
            references=True,
            distilled="this checkpoint was distilled into few unguided steps (is_distilled in its model_index.json), "
            "as FLUX.2 klein is where its name does not say base"
            if configurations.index.get("is_distilled")
            else "",
        )

    @override
    def load(self, checkpoint: Checkpoint, loading: Loading) -> Backbone:
        refuse_zeros(checkpoint, loading)
        configurations, where = checkpoint.configurations, checkpoint.where
        if loading.embedded_guidance is not None:
            raise ModelError(
                f"model.embedded_guidance is {loading.embedded_guidance:g}, and {where} is a FLUX.2 klein, whose "
                "network takes no guidance scale. Leave it out, and set the method's guidance_scale"
            )
        tokenizer = load_tokenizer(checkpoint.folder, "tokenizer", self.components["tokenizer"])
        chat, num_places = chat_of("tokenizer", tokenizer, where), loading.text_tokens or TEXT_TOKENS
        networks = load_networks(
            checkpoint, self.components, loading, self.autoencoder_dtype(configurations, loading.dtype)
        )
        check_chat("tokenizer", chat, networks["text_encoder"].config, num_places, where)
        return FlowTransformer(
            velocity=Flux2Velocity(networks["transformer"]),
            autoencoder=Autoencoder(networks["vae"], loading.outside),
            text=Flux2Text(ChatText(chat, networks["text_encoder"], num_places, TEXT_LAYERS)),
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
        try:
            span = chat_of("tokenizer", tokenizer, "it").span(prompt, text_tokens or TEXT_TOKENS)
        except ModelError:  # loading says what is wrong
            return len(prompt.split())
        return 1 + max(span.words, default=-1)

    @override
    def widest(self, configurations: Configurations, side: int) -> tuple[int, int]:
        return widest_of_transformer(configurations, side, 48, 128, TEXT_TOKENS)

    @override
    def reference(self, backbone: Backbone, configurations: Configurations) -> Any | None:
        if not isinstance(backbone, FlowTransformer):
            return None
        from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

        text = backbone.text
        assert isinstance(text, Flux2Text)
        return Flux2KleinPipeline(
            transformer=backbone.velocity.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(configurations.parts["scheduler"]),
            vae=backbone.autoencoder.vae,
            text_encoder=text.states.encoder,
            tokenizer=text.states.chat.tokenizer,
            # Of a distilled checkpoint it would leave out the guidance that it is compared under.
            is_distilled=False,
        )

    @override
    def sampled_by(self, reference: Any, backbone: Backbone, latents: Tensor, asked: Asked) -> Tensor:
        """What the pipeline returns is scaled for its autoencoder already: what it had before is taken."""
        assert isinstance(backbone, FlowTransformer)
        assert isinstance(backbone.text, Flux2Text)
        last: list[Tensor] = []

        def keep(_pipeline: Any, _step: int, _time: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
            last[:] = [given["latents"]]
            return {}

        asked.by(
            reference,
            reference._patchify_latents(latents),
            max_sequence_length=backbone.text.states.num_places,
            callback_on_step_end=keep,
        )
        return unpacked(last[0], *latents.shape[-2:])

    @override
    def unscaled(self, reference: Any, latents: Tensor) -> Tensor:
        vae = reference.vae
        mean, variance = (one.view(1, -1, 1, 1) for one in (vae.bn.running_mean, vae.bn.running_var))
        squares = reference._patchify_latents(latents)
        unscaled: Tensor = reference._unpatchify_latents(
            squares * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        )
        return unscaled


def check_transformer(transformer: Mapping[str, Any], where: str) -> None:
    """See that a transformer of FLUX.2 is klein's.

    Raises:
        ModelError: it is told a guidance scale, as that of FLUX.2 dev, or is built in another way.
    """
    if transformer.get("guidance_embeds", True):
        raise ModelError(
            f"{where} has a transformer that is told a guidance scale (guidance_embeds), as that of FLUX.2 dev; those "
            "of FLUX.2 klein are not. Use a checkpoint of FLUX.2 klein"
        )
    axes, head = transformer.get("axes_dims_rope", [32] * AXES), transformer.get("attention_head_dim", 128)
    wrong = {
        "patch_size": transformer.get("patch_size", 1) != 1,
        "out_channels": transformer.get("out_channels") not in (None, transformer.get("in_channels", 128)),
        "axes_dims_rope": not isinstance(axes, list) or len(axes) != AXES or sum(axes) != head,
    }
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ModelError(
            f"{where} has a transformer with {', '.join(f'{name} {transformer[name]}' for name in names)}, which is "
            "not built as that of FLUX.2 klein. Use a checkpoint of FLUX.2 klein"
        )


class Flux2Text(FlowText):
    """States of a chat model as keys, and nothing beside."""

    def __init__(self, states: ChatText) -> None:
        self.states = states

    @override
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        return [
            Conditioning(prompt, {"embedding": one.clone()}, (self.states.span(prompt),))
            for prompt, one in zip(prompts, self.states.encode(prompts), strict=True)
        ]


class Flux2Velocity(Velocity):
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
        (height, width), device = latents.shape[-2:], latents.device
        embedding = told["embedding"].to(latents.dtype)
        tokens, where = packed(latents), places(height, width, device)
        count = tokens.shape[1]
        if reference is not None:
            tokens = torch.cat([tokens, packed(reference)], dim=1)
            beside = places(reference.shape[-2], reference.shape[-1], device, image=REFERENCE)
            where = torch.cat([where, beside])
        in_text = torch.arange(embedding.shape[1], device=device, dtype=where.dtype)
        output: Tensor = self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=embedding,
            timestep=times / TOLD_TIME,
            img_ids=pad(where, (0, 1)),  # of no number in the text
            txt_ids=pad(in_text[:, None], (AXES - 1, 0)),
            return_dict=False,
        )[0]
        return unpacked(output[:, :count], height, width)
