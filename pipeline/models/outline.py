"""What a checkpoint's configuration tells without its weights: a few small files, of a hub's repository as well."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.engine.backbone import Offers
from pipeline.errors import ModelError
from pipeline.models.absent import NoModel
from pipeline.models.analytic import AnalyticBackbone
from pipeline.models.checkpoint import INDEX, Components, Configurations, read_configurations, read_index, small_files
from pipeline.models.families import family_of
from pipeline.models.families.base import Family, components_of
from pipeline.models.hub import silent
from pipeline.models.loading import BUNDLED, is_hub_id
from pipeline.models.memory import SHOWN_FROM, needs_of
from pipeline.models.networks import load_tokenizer

if TYPE_CHECKING:
    from pipeline.settings.sections import ModelConfig


@dataclass(frozen=True, slots=True)
class Outline:
    """Of one checkpoint. What its files do not tell, or lies elsewhere, is missing; loading says what is wrong."""

    offers: Offers | None = None
    tokenizers: Sequence[Any] = ()
    whole: tuple[Family, Configurations, Components] | None = None  # of a checkpoint that a family knows
    text_tokens: int | None = None  # places of the longest text encoder, as the recipe has it

    def read_part(self, prompt: str) -> str:
        """The words of a prompt that every text encoder reads, at least in part; all where that is not known."""
        if self.whole is None or not self.tokenizers:
            return prompt
        family, words = self.whole[0], prompt.split()
        count = min(family.num_words_read(tokenizer, prompt, self.text_tokens) for tokenizer in self.tokenizers)
        return " ".join(words[:count])


def outline_of(config: ModelConfig) -> Outline:
    """What is known of a model before it is loaded. Of a hub's repository, some hundred kB are fetched."""
    if config.name == "analytic":
        return Outline(AnalyticBackbone.offers)
    if config.name == "none":
        return Outline(NoModel.offers)
    if (folder := _folder(config)) is None:
        return Outline()
    try:
        index = read_index(folder, "it")
        family = family_of(index, "it")
        components = components_of(family, index, t5=config.t5)
        files = [name for name in small_files(components) if (folder / name).is_file()]
        configurations = read_configurations(folder, components, files, "it")
        family.check(configurations, "it")
        offers = family.offers(configurations)
        tokenizers = {part: one for part, one in components.items() if one.kind == "tokenizer"}
        loaded = [load_tokenizer(folder, part, one) for part, one in tokenizers.items()]
        return Outline(offers, loaded, (family, configurations, components), config.text_tokens)
    except (ModelError, OSError, KeyError, TypeError, IndexError):
        return Outline()


def memory_note(config: ModelConfig, outline: Outline) -> str:
    """What a model needs of a device's memory, in words; "" where that is not known, or fits anywhere."""
    if outline.whole is None:
        return ""
    dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        needs = needs_of(*outline.whole, size=config.size, dtype=dtype, text_8bit=config.text_8bit)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):  # loading says what is wrong
        return ""
    return needs.in_words(config.offload, dtype) if needs.under("none") >= SHOWN_FROM else ""


def _folder(config: ModelConfig) -> Path | None:
    folder = BUNDLED.get(config.name) or Path(os.path.expanduser(config.name))
    if folder.is_dir():
        return folder
    if not is_hub_id(config.name):
        return None
    try:
        folder = _fetched(config, [INDEX])
        return _fetched(config, list(small_files(family_of(read_index(folder, "it"), "it").components)))
    except Exception:  # no such repository, no access, no network, an unknown family: loading says so
        return None


def _fetched(config: ModelConfig, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(config.name, revision=config.revision, allow_patterns=list(files), tqdm_class=silent())
    )
