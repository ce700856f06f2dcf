"""A tiny random FLUX.2 klein, made when a test first asks for it: the true parts and wiring, a few channels wide."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import AddedToken, Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

# In this order, in which no word takes a pair of letters away from another.
WORDS = ("with", "user", "assistant", "a", "the", "of", "on", "in", "photo", "cat", "dog", "hat", "red", "snow", "mat")
LAYERS = 28  # of the text encoder: one more than are read, so that no state is the last one, which is normalised
WIDTH = 16  # of the text encoder
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def make_klein(folder: Path, *, distilled: bool = False) -> Path:
    """Save it in diffusers format; always of the same weights."""
    torch.manual_seed(40)
    chat = tokenizer()
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15, shift=3.0,
            use_dynamic_shifting=True,
        ),
        vae=autoencoder(),
        text_encoder=text_encoder(len(chat)),
        tokenizer=chat,
        transformer=transformer(),
        is_distilled=distilled,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def tokenizer() -> Qwen2TokenizerFast:
    """Bytes, and a chain of merges for each word, whose last takes in a space before it: a word is one token."""
    vocabulary: list[str] = list(bytes_to_unicode().values())
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        chain = [(word[:end], word[end]) for end in range(1, len(word))]
        for left, right in [*chain, ("Ġ", word)]:  # a space is written so
            if left + right not in vocabulary:
                merges.append((left, right))
                vocabulary.append(left + right)
    made = Qwen2TokenizerFast(vocab={token: at for at, token in enumerate(vocabulary)}, merges=merges)
    made.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made.add_tokens([AddedToken(token) for token in ("<think>", "</think>")])
    made.chat_template, made.model_max_length = TEMPLATE, 131072
    return made


def text_encoder(vocabulary: int) -> Qwen3ForCausalLM:
    """Louder than default initialisation makes it, so that places and words are told apart."""
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim == 2:
                weights.normal_(0, 1.0 if "embed_tokens" in name else WIDTH**-0.5)
    return model


def transformer() -> Flux2Transformer2DModel:
    """Two blocks of two streams and three of one, their gates and the path of the text opened."""
    model = Flux2Transformer2DModel(
        num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "modulation" in name or name.startswith(("context_embedder", "time_guidance_embed")):
                weights.mul_(3.0)
            elif "norm_q" in name or "norm_k" in name or "norm_added" in name:
                weights.normal_(1.5, 0.3)
    return model


def autoencoder() -> AutoencoderKLFlux2:
    """Its statistics differ by channel and place."""
    model = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=128)
    with torch.no_grad():
        model.bn.running_mean.normal_(0, 0.5)
        model.bn.running_var.uniform_(0.3, 3.0)
    return model.eval()
