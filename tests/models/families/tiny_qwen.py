"""Tiny random models of Qwen-Image's and Qwen-Image-Edit's architecture, made when a test asks for one. Their small
files are the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

from pipeline.models.families.qwen_image import NUMBERED, PLAIN
from tests.models.families.published import PUBLISHED, put

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
WORDS = "a photo of a cat with a hat on snow, a dog: put it there"


def tokenizer() -> Any:
    """Each word of the conversations is a token, as in the published vocabulary, and so are bytes of all others."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = Qwen2TokenizerFast().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = [PLAIN.system, NUMBERED.system, NUMBERED.before, PLAIN.behind, WORDS]
    for special in SPECIAL:
        texts = [part for text in texts for part in text.split(special)]
    made.train_from_iterator(texts, trainer)
    bpe = json.loads(made.to_str())["model"]
    merges = [tuple(one) for one in bpe["merges"]]
    found = Qwen2TokenizerFast(vocab=bpe["vocab"], merges=merges)
    found.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return found


def save_tiny_qwen(folder: Path, *, edits: bool) -> Path:
    """A whole checkpoint; some 500 kB."""
    torch.manual_seed(0)
    text = tokenizer()
    text.save_pretrained(folder / "tokenizer")
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(text), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
        image_token_id=text.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=text.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=text.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=text.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    transformer = QwenImageTransformer2DModel(
        num_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6)
    )
    vae = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    for network in (encoder, transformer, vae):
        for parameter in network.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))  # zeros and ones would hide what reads them
    encoder.save_pretrained(folder / "text_encoder")
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    files = PUBLISHED["Qwen/Qwen-Image-Edit" if edits else "Qwen/Qwen-Image"]
    own = ("model_index.json", "scheduler/scheduler_config.json", "processor/preprocessor_config.json")
    return put(folder, {name: content for name, content in files.items() if name in own})
