"""A CLIP text encoder with its tokenizer: what a prompt's tokens are, and what the encoder makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.engine.calls import Span
from pipeline.models.networks import words_of_tokens


class ClipText:
    """Prompts are cut to the tokenizer's length and padded to it, with the token that its own files say."""

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder

    def span(self, prompt: str) -> Span:
        """The prompt's tokens, from place 0, counted before padding: a fast tokenizer reports the padded length."""
        found = self.tokenizer(
            prompt, truncation=True, max_length=self.tokenizer.model_max_length, return_offsets_mapping=True
        )
        own = range(1, len(found.input_ids) - 1)
        return Span(0, tuple(found.input_ids), own, words_of_tokens(prompt, found.offset_mapping[1:-1]))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, hidden_states: bool = False) -> Any:
        """The encoder's answer for a batch of prompts; with the states of all its layers, where asked."""
        padded = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).to(self.encoder.device)
        mask = padded.attention_mask if getattr(self.encoder.config, "use_attention_mask", False) else None
        return self.encoder(padded.input_ids, attention_mask=mask, output_hidden_states=hidden_states)
