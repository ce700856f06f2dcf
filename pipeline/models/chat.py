"""A chat model with its tokenizer, read as a text encoder: a prompt is what a user says in its template (FLUX.2 reads
Qwen3 so, Yang et al., arXiv 2505.09388).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.calls import Span
from pipeline.errors import ModelError
from pipeline.models.networks import words_of_tokens

# What a template must put between the same words: with spaces at its ends, and with none.
PROBES = ("a cat", "  Two words. ")


@dataclass(frozen=True, slots=True)
class Chat:
    """A tokenizer whose template was rendered once: what stands before and behind all that a user may say."""

    tokenizer: Any
    before: str
    behind: str

    def tokens(self, prompts: Sequence[str], num_places: int, **options: Any) -> Any:
        """What the tokenizer makes of prompts in the template, cut to a number of places."""
        said = [f"{self.before}{prompt}{self.behind}" for prompt in prompts]
        return self.tokenizer(said, truncation=True, max_length=num_places, **options)

    def span(self, prompt: str, num_places: int) -> Span:
        """The prompt's tokens among a network's keys, the template's around them."""
        found = self.tokens([prompt], num_places, return_offsets_mapping=True)
        first, last = len(self.before), len(self.before) + len(prompt)
        starts = [start for start, _ in found.offset_mapping[0]]
        places = [place for place, start in enumerate(starts) if first <= start < last]
        own = range(places[0], places[-1] + 1) if places else range(0)
        offsets = [(starts[place] - first, 0) for place in own]
        return Span(0, tuple(found.input_ids[0]), own, words_of_tokens(prompt, offsets))


class ChatText:
    """Prompts are cut to a number of places and padded to it. The chat model does not see the padding; what it makes of
    its places the network reads as well.

    Args:
        chat: the tokenizer, in its template.
        encoder: a causal language model of transformers.
        num_places: L.
        layers: whose states stand side by side.
    """

    def __init__(self, chat: Chat, encoder: Any, num_places: int, layers: Sequence[int]) -> None:
        self.chat, self.encoder, self.num_places, self.layers = chat, encoder, num_places, tuple(layers)

    def span(self, prompt: str) -> Span:
        """The prompt's tokens among a network's keys."""
        return self.chat.span(prompt, self.num_places)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Hidden states (B, L, D) of a batch of prompts, those of all layers side by side."""
        padded = self.chat.tokens(prompts, self.num_places, padding="max_length", return_tensors="pt")
        padded = padded.to(self.encoder.device)
        # The model without its head: nobody asks for the next word.
        states = self.encoder.model(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return torch.cat([states[layer] for layer in self.layers], dim=-1)


def chat_of(name: str, tokenizer: Any, where: str) -> Chat:
    """A chat model's tokenizer in its template, asked to answer at once, without thinking aloud.

    Raises:
        ModelError: it has no template, or one that does more than to put words around what a user says; or it pads on
            the left.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{where} has a {name} without a chat template, in which its text encoder is given prompts. Fetch "
            f"{name}/chat_template.jinja, or the checkpoint again"
        )
    if tokenizer.pad_token_id is None or tokenizer.padding_side != "right":
        raise ModelError(
            f"{where} has a {name} that does not pad on the right, as the network was trained. Correct pad_token and "
            f"padding_side in {name}/tokenizer_config.json"
        )
    around = {_around(name, tokenizer, probe, where) for probe in PROBES}
    if len(around) != 1:
        raise _changes_what_is_said(name, where)
    return Chat(tokenizer, *around.pop())


def _around(name: str, tokenizer: Any, prompt: str, where: str) -> tuple[str, str]:
    try:
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # a template is a program: it fails in as many ways
        raise ModelError(
            f"the chat template of {name}/ of the checkpoint cannot be used: {type(error).__name__}. Fetch it again"
        ) from error
    before, found, behind = said.partition(prompt)
    if not found:
        raise _changes_what_is_said(name, where)
    return before, behind


def _changes_what_is_said(name: str, where: str) -> ModelError:
    return ModelError(
        f"{where} has a {name} whose chat template changes what a user says, or what stands around it. Use the "
        "tokenizer that the text encoder was trained with"
    )


def check_chat(name: str, chat: Chat, config: Any, num_places: int, where: str) -> None:
    """See that a chat model's tokenizer and its configuration belong together, and leave room for prompts.

    Raises:
        ModelError: they do not; an empty vocabulary, say, would give prompts without meaning and no error.
    """
    known, embedded = len(chat.tokenizer), config.vocab_size
    if not 0.9 * embedded <= known <= embedded:
        raise ModelError(
            f"{where} has a {name} of {known} tokens and a text encoder of {embedded}: they were not made for each "
            "other. Use the tokenizer that the encoder was trained with"
        )
    if not chat.span("a", num_places).own:
        raise ModelError(
            f"model.text_tokens is {num_places}, of which the chat template of {where} leaves none to a prompt. Set it "
            "higher, or leave it out"
        )
