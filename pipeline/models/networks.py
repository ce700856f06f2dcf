"""The parts of a checkpoint as diffusers and transformers load them, and whether they are whole and fit each other.

The libraries fill in what a checkpoint lacks with random numbers and leave out what they do not know, with no more than
a warning. Here both are errors.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ModelError

# Positions 0 .. 76, which older versions of transformers saved beside the weights.
HARMLESS = ("position_ids",)
SHOWN = 4  # names of tensors in a message
LONGEST = 300  # characters of a library's own message


def load_networks(folder: Path, variant: str | None, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """UNet, VAE and text encoder, by name.

    Raises:
        ModelError: a configuration or weights that do not make the network; names the part and the tensors.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    diffusers_options = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    classes: dict[str, tuple[Any, dict[str, Any]]] = {
        "unet": (UNet2DConditionModel, {"dtype": dtypes["unet"], **diffusers_options}),
        "vae": (AutoencoderKL, {"dtype": dtypes["vae"], **diffusers_options}),
        "text_encoder": (
            CLIPTextModel,
            {"dtype": dtypes["text_encoder"], "use_safetensors": True, "output_loading_info": True},
        ),
    }
    networks = {}
    for name, (cls, options) in classes.items():
        try:
            with quiet():
                network, info = cls.from_pretrained(folder, subfolder=name, variant=variant, **options)
        except Exception as error:  # a configuration of wrong types fails in as many ways as there are types
            raise ModelError(
                f"{name}/ of the checkpoint cannot be loaded: {_first_words(error)}. Fetch it again, or use another "
                "checkpoint"
            ) from error
        _check_tensors(name, network, info)
        networks[name] = network
    _correct_side(networks["unet"])
    return networks


def _correct_side(unet: Any) -> None:
    """Fine-tuned models of diffusers' first versions call their side 32 for 64: corrected, as its pipelines do."""
    version = re.match(r"(\d+)\.(\d+)", str(unet.config.get("_diffusers_version")))
    if version and (int(version[1]), int(version[2])) < (0, 9) and unet.config.sample_size == 32:
        unet.register_to_config(sample_size=64)


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
    broken = [key for key, tensor in network.named_parameters() if not bool(torch.isfinite(tensor).all())]
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


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ModelError: its files do not make one.
    """
    from transformers import CLIPTokenizerFast

    try:
        return CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    except Exception as error:
        raise ModelError(
            f"tokenizer/ of the checkpoint cannot be loaded: {_first_words(error)}. Fetch it again"
        ) from error


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


def check_channels(unet: Mapping[str, Any], vae: Mapping[str, Any], where: str) -> None:
    """Whether a UNet's configuration is one of a text-to-image or an inpainting model.

    Raises:
        ModelError: it is neither.
    """
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if isinstance(latents, int) and channels not in (latents, 2 * latents + 1):
        raise ModelError(
            f"{where} has a UNet of {channels} input channels on latents of {latents}: neither a "
            "text-to-image nor an inpainting model. Use one of those"
        )


def check_fit(networks: Mapping[str, Any], tokenizer: Any, where: str) -> None:
    """Whether latents and embeddings of one part are what the next one takes.

    Raises:
        ModelError: says which two do not fit.
    """
    unet, vae, text = (networks[name].config for name in ("unet", "vae", "text_encoder"))
    if unet.out_channels != vae.latent_channels:
        raise ModelError(
            f"{where} has a UNet that predicts {unet.out_channels} channels for latents of {vae.latent_channels}. Use "
            "a model that predicts latents"
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise ModelError(
            f"{where} has a UNet that reads embeddings of {unet.cross_attention_dim} numbers, and a text encoder that "
            f"makes them of {text.hidden_size}. Use the text encoder that it was trained with"
        )
    for key, value in (("unet: sample_size", unet.sample_size), ("vae: scaling_factor", vae.scaling_factor)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ModelError(f"{where} has {value!r} as {key}, which is no positive number. Correct its config.json")
    _check_tokenizer(tokenizer, text, where)


def _check_tokenizer(tokenizer: Any, text: Any, where: str) -> None:
    """An empty vocabulary, or one of another model, gives prompts without meaning and no error."""
    known, embedded = len(tokenizer), text.vocab_size
    # A checkpoint may have embeddings to spare, rounded up; not a tenth of them.
    if not 0.9 * embedded <= known <= embedded:
        raise ModelError(
            f"{where} has a tokenizer of {known} tokens and a text encoder of {embedded}: they were not made for each "
            "other. Use the tokenizer that the encoder was trained with"
        )
    length = tokenizer.model_max_length
    if not 3 <= length <= text.max_position_embeddings:
        raise ModelError(
            f"{where} has a tokenizer of prompts up to {length} tokens, and a text encoder of "
            f"{text.max_position_embeddings}. Correct model_max_length in tokenizer/tokenizer_config.json"
        )
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    ids = tokenizer("a", truncation=True, max_length=length).input_ids
    if None in ends or (ids[0], ids[-1]) != ends or len(ids) < 3 or not _in_range(ids, embedded):
        raise ModelError(
            f"{where} has a tokenizer that does not put a text between a start and an end token of the vocabulary, as "
            "CLIP's does. Use the tokenizer that the encoder was trained with"
        )


def _in_range(ids: Iterable[int], count: int) -> bool:
    return all(0 <= one < count for one in ids)
