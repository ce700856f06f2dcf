"""The parts of a checkpoint as diffusers and transformers load them, and whether they are whole and fit each other.

The libraries fill in what a checkpoint lacks with random numbers and leave out what they do not know, with no more than
a warning. Here both are errors.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint, Component

# Positions 0 .. 76, which older versions of transformers saved beside the weights.
HARMLESS = ("position_ids",)
SHOWN = 4  # names of tensors in a message
LONGEST = 300  # characters of a library's own message


def load_network(checkpoint: Checkpoint, name: str, component: Component, dtype: torch.dtype) -> Any:
    """One network of a checkpoint.

    Raises:
        ModelError: a configuration or weights that do not make the network; names the part and the tensors.
    """
    cls = getattr(import_module(component.library), component.classes[0])
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if component.library == "diffusers":
        options["low_cpu_mem_usage"] = False
    try:
        with quiet():
            network, info = cls.from_pretrained(
                checkpoint.folder, subfolder=name, variant=checkpoint.variant, **options
            )
    except Exception as error:  # a configuration of wrong types fails in as many ways as there are types
        raise ModelError(
            f"{name}/ of the checkpoint cannot be loaded: {_first_words(error)}. Fetch it again, or use another "
            "checkpoint"
        ) from error
    _check_tensors(name, network, info)
    return network


@contextmanager
def quiet() -> Iterator[None]:
    """No bar for a second of reading, no report of what is an error here. Afterwards the libraries are as before."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    levels = [library.get_verbosity() for library in libraries]
    with_bars = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in with_bars:
        library.disable_progress_bar()
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        for library in with_bars:
            library.enable_progress_bar()


def _check_tensors(name: str, network: Any, info: Mapping[str, Any]) -> None:
    """Whether the weights were all that the network has, and no more."""
    wrong = {
        "lack": info["missing_keys"],
        "have, but the configuration has no": info["unexpected_keys"],
        "have in other shapes": [key[0] for key in info["mismatched_keys"]],
    }
    for what, keys in wrong.items():
        if found := sorted(key for key in keys if not key.endswith(HARMLESS)):
            raise ModelError(
                f"the weights in {name}/ of the checkpoint {what} {_listed(found)}: they are not those of "
                f"{name}/config.json. Fetch the checkpoint again, or use another"
            )
    broken = [key for key, tensor in network.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ModelError(
            f"the weights in {name}/ of the checkpoint hold values that are not finite: {_listed(broken)}. Fetch the "
            "checkpoint again, or set model.dtype to a wider one"
        )


def _first_words(error: Exception) -> str:
    """An error of a library on one line: torch's of misshapen weights has one for each tensor."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def load_tokenizer(folder: Path, name: str, component: Component | None = None) -> Any:
    """A tokenizer of a checkpoint; CLIP's, where the component says no other.

    Raises:
        ModelError: its files do not make one.
    """
    classes = ("CLIPTokenizerFast",) if component is None else component.classes
    cls = getattr(import_module("transformers"), next(one for one in classes if one.endswith("Fast")))
    try:
        return cls.from_pretrained(folder / name)
    except Exception as error:
        reason = _first_words(error)
        raise ModelError(f"{name}/ of the checkpoint cannot be loaded: {reason}. Fetch it again") from error


def starts_at(tokenizer: Any) -> int:
    """Place of a prompt's first own token: behind the start token, where the tokenizer has one (CLIP's, not T5's)."""
    return 0 if tokenizer.bos_token_id is None else 1


def num_words_read(tokenizer: Any, prompt: str) -> int:
    """How many words of a prompt are read, at least in part, where a text encoder reads what its tokenizer lets pass
    and an end token behind it (CLIP, T5)."""
    own = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length, return_offsets_mapping=True)
    return 1 + max(words_of_tokens(prompt, own.offset_mapping[starts_at(tokenizer) : -1]), default=-1)


def words_of_tokens(prompt: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Of each of a prompt's own tokens, the word of `prompt.split()` that it belongs to.

    Found by where tokens stand in the text: adding up the lengths of decoded ones goes wrong where a character is
    several tokens.

    Args:
        prompt: the text.
        offsets: (start, end) of each token in it, as a fast tokenizer tells them.
    """
    ends = [match.end() for match in re.finditer(r"\S+", prompt)]
    return tuple(bisect_right(ends, start) for start, _ in offsets)


def check_latents(unet: Any, vae: Any, where: str) -> None:
    """See that a UNet predicts the latents of an autoencoder.

    Raises:
        ModelError: says what does not fit.
    """
    if unet.out_channels != vae.latent_channels:
        raise ModelError(
            f"{where} has a UNet that predicts {unet.out_channels} channels for latents of {vae.latent_channels}. Use "
            "a model that predicts latents"
        )
    for key, value in (("unet: sample_size", unet.sample_size), ("vae: scaling_factor", vae.scaling_factor)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ModelError(f"{where} has {value!r} as {key}, which is no positive number. Correct its config.json")


def check_text(unet: Any, encoders: Sequence[tuple[str, Any, Any]], where: str) -> None:
    """See that tokenizers, text encoders and UNet were made for each other.

    Args:
        unet: its configuration.
        encoders: name of the tokenizer, tokenizer, the configuration of its encoder. The UNet reads all, side by side.
        where: the checkpoint, for errors.

    Raises:
        ModelError: says which two do not fit.
    """
    width = sum(text.hidden_size for _, _, text in encoders)
    if unet.cross_attention_dim != width:
        makes = "a text encoder that makes" if len(encoders) == 1 else "text encoders that make"
        raise ModelError(
            f"{where} has a UNet that reads embeddings of {unet.cross_attention_dim} numbers, and {makes} them of "
            f"{width}. Use the text encoder that it was trained with"
        )
    for name, tokenizer, text in encoders:
        check_tokenizer(name, tokenizer, text, where)


def check_tokenizer(name: str, tokenizer: Any, text: Any, where: str) -> None:
    """An empty vocabulary, or one of another model, gives prompts without meaning and no error."""
    known, embedded = len(tokenizer), text.vocab_size
    # A checkpoint may have embeddings to spare, rounded up; not a tenth of them.
    if not 0.9 * embedded <= known <= embedded:
        raise ModelError(
            f"{where} has a {name} of {known} tokens and a text encoder of {embedded}: they were not made for each "
            "other. Use the tokenizer that the encoder was trained with"
        )
    length = tokenizer.model_max_length
    if not 3 <= length <= text.max_position_embeddings:
        raise ModelError(
            f"{where} has a {name} of prompts up to {length} tokens, and a text encoder of "
            f"{text.max_position_embeddings}. Correct model_max_length in {name}/tokenizer_config.json"
        )
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    ids = tokenizer("a", truncation=True, max_length=length).input_ids
    if None in ends or (ids[0], ids[-1]) != ends or len(ids) < 3 or not _in_range(ids, embedded):
        raise ModelError(
            f"{where} has a {name} that does not put a text between a start and an end token of the vocabulary, as "
            "CLIP's does. Use the tokenizer that the encoder was trained with"
        )


def _in_range(ids: Iterable[int], count: int) -> bool:
    return all(0 <= one < count for one in ids)
