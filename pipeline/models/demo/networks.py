"""The demo model's networks before training: a small Stable Diffusion, put together of diffusers' own classes.

Images of 128 x 128 become latents of 4 x 32 x 32. The UNet attends to the text at 16 x 16 and at 8 x 8 cells, on its
way down and up; 8 x 8 is a quarter of the latents' side, the grid from which LEDITS++ takes its attention masks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipeline.models.networks import quiet

IMAGE_SIZE = 128
LATENT_SIZE = 32
MAX_TOKENS = 77  # as in every Stable Diffusion, so that no code needs to treat this model otherwise
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Widths and depths of the three networks."""

    vae_channels: tuple[int, int, int] = (16, 32, 64)  # at 128, 64 and 32 pixels
    vae_layers: int = 1
    unet_channels: tuple[int, int, int] = (32, 64, 128)  # at 32, 16 and 8 cells
    unet_layers: int = 1  # residual blocks per level on the way down, one more on the way up
    unet_heads: int = 2
    text_width: int = 128
    text_layers: int = 2


def build_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer that makes one token of each given word, and several of any other.

    The byte-pair merges are learned from the words until each of them is whole. Merges made up word by word would get
    into each other's way: "r" + "o" of "round" would be merged first in "background", too.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    pairs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, initial_alphabet=symbols, end_of_word_suffix="</w>", show_progress=False
    )
    pairs.train_from_iterator(words, trainer)
    learned = json.loads(pairs.to_str())["model"]
    vocabulary: dict[str, int] = learned["vocab"]
    # Any byte may end a word that nobody here thought of, so each symbol is known in its word-final form, too. Numbers
    # are given anew: the trainer's own differ from one call to the next, and a model knows its tokens by number.
    known = {*vocabulary, *(symbol + "</w>" for symbol in symbols)}
    vocabulary = {token: number for number, token in enumerate([*sorted(known), START_TOKEN, END_TOKEN])}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in learned["merges"]],
        bos_token=START_TOKEN,
        eos_token=END_TOKEN,
        unk_token=END_TOKEN,
        pad_token=END_TOKEN,
        model_max_length=MAX_TOKENS,
    )


def build_vae(sizes: Sizes) -> AutoencoderKL:
    """An untrained autoencoder of factor 4. It has no attention: what it sees is local, and flat."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        norm_num_groups=8,
        layers_per_block=sizes.vae_layers,
        block_out_channels=sizes.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
    )


def build_text_encoder(sizes: Sizes, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text model."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text_width,
            intermediate_size=2 * sizes.text_width,
            num_attention_heads=4,
            num_hidden_layers=sizes.text_layers,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(sizes: Sizes) -> UNet2DConditionModel:
    """An untrained UNet. Its finest level has no attention, which would cost more there than all the rest."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        norm_num_groups=8,
        layers_per_block=sizes.unet_layers,
        block_out_channels=sizes.unet_channels,
        attention_head_dim=sizes.unet_heads,  # diffusers' name for the number of heads
        cross_attention_dim=sizes.text_width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's kind of schedule, with an end so noisy that nothing of the image is left.

    At the end of Stable Diffusion's own (0.012) a fifteenth of the image's amplitude remains: less than the noise in
    any one cell, but more than the noise in the mean over an image this small. A model learns to read the colour of
    large areas from there instead of from the text, and paints grey from pure noise.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow's levels, evenly spaced: an image this small needs no shift towards noise."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.register_to_config(prediction_type="flow_prediction")  # what tells a UNet that was trained for it
    return scheduler


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin | None = None,
) -> None:
    """Write an ordinary diffusers folder with fp16 weights. The networks given are converted in place.

    `scheduler`: None for `build_scheduler`.
    """
    tokenizer.backend_tokenizer.no_padding()  # that of the last call would be saved as the model's
    pipeline = stable_diffusion_pipeline()(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler or build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # transformers 5 reads tokenizer.json; version 4's CLIPTokenizer reads these two.
    byte_pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in byte_pairs["merges"])
    (folder / "tokenizer" / "vocab.json").write_text(
        json.dumps(byte_pairs["vocab"], ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    # transformers would load the text encoder in the precision it finds here, beside a UNet in float32.
    _change_config(folder / "text_encoder" / "config.json", dtype="float32")
    for part in ("unet", "vae"):  # of a model that was trained on, the folder that it was loaded from
        _change_config(folder / part / "config.json", _name_or_path=None)
    _change_config(folder / "tokenizer" / "tokenizer_config.json", is_local=None, local_files_only=None)


def _change_config(file: Path, **values: str | None) -> None:
    """Set keys of a component's configuration; None takes one out."""
    config = {**json.loads(file.read_text()), **values}
    kept = {key: value for key, value in config.items() if key not in values or value is not None}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def stable_diffusion_pipeline() -> type[DiffusionPipeline]:
    """Diffusers' class, imported without the advice to install torchvision: images are processed by Pillow here.

    Its module imports image processors that this model has no use for, and transformers warns of each at that moment.
    """
    with quiet():
        from diffusers import StableDiffusionPipeline
    return StableDiffusionPipeline


def load_pipeline(folder: Path) -> Any:
    """Read a folder that `save_pipeline` wrote, as a `StableDiffusionPipeline`. `OSError` where it is incomplete."""
    with quiet():
        pipeline = stable_diffusion_pipeline().from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
