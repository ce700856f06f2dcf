"""A T5 text encoder with its tokenizer (Raffel et al., arXiv 1910.10683), as flow-matching models read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.calls import Span
from pipeline.errors import ModelError
from pipeline.models.networks import words_of_tokens


class T5Text:
    """Prompts are cut to a number of places and padded to it; the padding is not masked, and so is read as well."""

    def __init__(self, tokenizer: Any, encoder: Any, num_places: int) -> None:
        self.tokenizer, self.encoder, self.num_places = tokenizer, encoder, num_places

    def span(self, prompt: str, start: int) -> Span:
        """The prompt's tokens, from place `start` among a network's keys. There is no start token, but an end."""
        found = self.tokenizer(prompt, truncation=True, max_length=self.num_places, return_offsets_mapping=True)
        own = range(len(found.input_ids) - 1)
        return Span(start, tuple(found.input_ids), own, words_of_tokens(prompt, found.offset_mapping[:-1]))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Last hidden states (B, L, D) of a batch of prompts."""
        padded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.num_places, return_tensors="pt"
        )
        states: Tensor = self.encoder(padded.input_ids.to(self.encoder.device))[0]
        return states


def check_t5(name: str, tokenizer: Any, config: Any, where: str) -> None:
    """See that a T5 tokenizer and an encoder's configuration belong together.

    Raises:
        ModelError: they do not; an empty vocabulary, say, would give prompts without meaning and no error.
    """
    known, embedded = len(tokenizer), config.vocab_size
    ids = tokenizer("a", truncation=True, max_length=8).input_ids
    if not 0.9 * embedded <= known <= embedded or len(ids) < 2 or ids[-1] != tokenizer.eos_token_id:
        raise ModelError(
            f"{where} has a {name} of {known} tokens, which does not end a text as T5's does or was not made for a "
            f"text encoder of {embedded}. Use the tokenizer that the encoder was trained with"
        )
