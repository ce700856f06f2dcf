"""How near a picture is to a text, by a CLIP model (Radford et al., arXiv 2103.00020) in transformers format.

None is bundled: a folder or a hub id is given. Only safetensors is loaded, and no code of the checkpoint's.
Cost: one image and one text encoder each; texts are encoded once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError

from pipeline.errors import ModelError
from pipeline.models.checkpoint import PICKLED, refuse_special_files

ALLOWED = ("*.json", "*.txt", "*.safetensors")
POINTS = 100.0  # per unit of the cosine, as CLIP scores are usually given


class ImageTextModel:
    """A loaded CLIP: similarities of pictures and texts."""

    def __init__(self, name: str, model: Any, tokenizer: Any, processor: Any, device: torch.device) -> None:
        self.name = name
        self._model, self._tokenizer, self._processor, self._device = model, tokenizer, processor, device
        self._texts: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def scores(
        self, images: Sequence[UInt8[np.ndarray, "H W 3"]], texts: Sequence[str]
    ) -> Float[np.ndarray, "images texts"]:
        """100 times the cosine of every picture with every text, -100..100; pictures may differ in size."""
        cosines = self._seen(images) @ torch.stack([self._text(text) for text in texts]).T
        return np.asarray((POINTS * cosines).cpu(), dtype=np.float64)

    @torch.inference_mode()
    def of_images(self, images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[np.ndarray, "images features"]:
        """Features of pictures, each of length 1."""
        return np.asarray(self._seen(images).cpu(), dtype=np.float64)

    @torch.inference_mode()
    def of_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "texts features"]:
        """Features of texts, each of length 1."""
        return np.asarray(torch.stack([self._text(text) for text in texts]).cpu(), dtype=np.float64)

    def is_cut(self, text: str) -> bool:
        """Whether a text is longer than what the model reads."""
        return len(self._tokenizer(text)["input_ids"]) > self._tokenizer.model_max_length

    def _seen(self, images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> torch.Tensor:
        pixels = torch.cat([self._processor(image, return_tensors="pt")["pixel_values"] for image in images])
        seen = self._model.visual_projection(self._model.vision_model(pixels.to(self._device)).pooler_output)
        return torch.nn.functional.normalize(seen, dim=-1)

    def _text(self, text: str) -> torch.Tensor:
        if text not in self._texts:
            # Cut by the tokenizer, which keeps the end token: CLIP reads the text there.
            tokens = self._tokenizer(text, truncation=True, return_tensors="pt").to(self._device)
            embedding = self._model.text_projection(self._model.text_model(**tokens).pooler_output)[0]
            self._texts[text] = torch.nn.functional.normalize(embedding, dim=-1)
        return self._texts[text]


def load_image_text(name: str) -> ImageTextModel:
    """Load a CLIP checkpoint onto the GPU, where there is one.

    Args:
        name: a folder in transformers format, or a hub id.

    Raises:
        ModelError: it is missing, no CLIP, or has no safetensors.
    """
    silence()
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

    folder = located(name)
    check_safe(folder, name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = CLIPModel.from_pretrained(folder, use_safetensors=True)
        longest = model.config.text_config.max_position_embeddings
        tokenizer = CLIPTokenizerFast.from_pretrained(folder, model_max_length=longest)
        processor = CLIPImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the score model '{name}' cannot be loaded: {type(error).__name__}: {error}") from error
    return ImageTextModel(name, model.to(device).eval(), tokenizer, processor, device)


def silence() -> None:
    """Keep transformers from drawing bars, and from asking for torchvision, which is not needed."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def located(name: str, revision: str | None = None, patterns: Sequence[str] = ALLOWED) -> Path:
    """The checkpoint's folder, downloaded where it is a hub id.

    Args:
        name: a folder or a hub id.
        revision: of a hub id; None: its main branch.
        patterns: files that are downloaded.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        refuse_special_files(folder, f"the model '{name}'")
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"the score model '{name}' is no folder here and no hub id (owner/name). Check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"the score model '{name}' is no local folder and could not be fetched from the hub: "
            f"{type(error).__name__}. Check the name, the network, HF_TOKEN for gated models, or give a folder"
        ) from error


def check_safe(folder: Path, name: str, kinds: Collection[str] = ("clip",)) -> None:
    """Refuse what is of no kind that is known, asks for code of its own, or has pickled weights only."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"the score model '{name}' has no config.json that can be read. Give a checkpoint of type "
            f"{' or '.join(kinds)}"
        ) from error
    if kind not in kinds or "auto_map" in config:
        known = " or ".join(f"'{one}'" for one in kinds)
        raise ModelError(
            f"the score model '{name}' is of type {kind!r}; known is {known}, without code of its own. Give such a "
            "checkpoint in transformers format"
        )
    refuse_unsafe_weights(folder, name)


def refuse_unsafe_weights(folder: Path, name: str) -> None:
    """See that there are safetensors: other weights can run code."""
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
        reason = f"only pickled weights ({', '.join(pickled)}), which can run code" if pickled else "no weights"
        raise ModelError(f"the model '{name}' has {reason}. Give a checkpoint with safetensors")
