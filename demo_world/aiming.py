"""A training loss that makes cross-attention point at the object that a word names.

LEDITS++ and its kin read masks from cross-attention. A model as small as ours can do without attention that points
anywhere, and without help its attention does not: edits under the intersected mask failed. So for each word of a
caption that names something drawn, adjectives and article included, the loss is minus the log of the share of its
attention that falls on what was drawn. This takes explicit attention probabilities, in training only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTokenizer

from pipeline.models.demo.world import WORD_ATTRIBUTES, Attribute

ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)
NOTHING = -1  # in place of an attribute's index, for words that name nothing drawn


class RecordedAttention:
    """Attention by its textbook formula. Keeps each cross-attention's probabilities, mean over heads, until `take`."""

    def __init__(self) -> None:
        self.maps: list[Float[Tensor, "B positions tokens"]] = []

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """See diffusers' attention processors. Neither a mask nor a time embedding is used."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, positions or tokens, width)
            for layer, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        probabilities = (query @ key.mT * attn.scale).softmax(dim=-1)
        if encoder_hidden_states is not None:
            self.maps.append(probabilities.float().mean(dim=1))
        out = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))

    def take(self) -> list[Float[Tensor, "B positions tokens"]]:
        """The maps of all cross-attention layers since the last call, in the order of the forward pass."""
        maps, self.maps = self.maps, []
        return maps


def record_attention(unet: UNet2DConditionModel) -> RecordedAttention:
    """Install one recorder in all attention layers of a UNet that is about to be trained."""
    recorder = RecordedAttention()
    unet.set_attn_processor(recorder)
    return recorder


def attribute_table(tokenizer: CLIPTokenizer, words: Mapping[str, Attribute] = WORD_ATTRIBUTES) -> Int[Tensor, vocab]:
    """For each token the index of its attribute in `ATTRIBUTES`, or `NOTHING`."""
    table = torch.full((len(tokenizer),), NOTHING)
    for word, attribute in words.items():
        table[tokenizer.convert_tokens_to_ids(f"{word}</w>")] = ATTRIBUTES.index(attribute)
    return table


def named_attributes(
    token_ids: Int[Tensor, "B tokens"], table: Int[Tensor, vocab], articles: Int[Tensor, A]
) -> Int[Tensor, "B tokens"]:
    """The attribute that each token names. An article names what the word behind it names."""
    named = table[token_ids]
    return torch.where(torch.isin(token_ids, articles), named.roll(-1, dims=1), named)


def aiming_loss(
    maps: list[Float[Tensor, "B positions tokens"]],
    coverage: Float[Tensor, "B attributes side side"],
    named: Int[Tensor, "B tokens"],
) -> Float[Tensor, ""]:
    """Minus the log of the share of a word's attention that falls on what it names, mean over words and layers.

    `coverage` says which share of a cell each attribute covers. A quarter is enough to count the cell as its own.
    """
    losses = []
    for probabilities in maps:
        side = round(probabilities.shape[1] ** 0.5)
        cells = torch.nn.functional.adaptive_avg_pool2d(coverage, side).mul(4).clamp(max=1).flatten(2)
        target = cells.gather(
            1, named.clamp(min=0)[..., None].expand(-1, -1, cells.shape[-1])
        )  # (B, tokens, positions)
        share = (probabilities.mT * target).sum(dim=-1) / probabilities.sum(dim=1)
        # A mouth may be so small that no cell is its own: the floor keeps its word from dominating the loss.
        losses.append(-(share + 1e-3).log()[named != NOTHING].mean())
    return torch.stack(losses).mean()
