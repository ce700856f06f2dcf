"""Vision-language models that answer a question about pictures; judges are made of them.

None is bundled: a folder in transformers format or a hub id is given, with a chat template of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from safetensors import SafetensorError

from pipeline.errors import ModelError
from pipeline.models.image_text import located, refuse_unsafe_weights, silence

WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # of a repository: no code, nothing pickled


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An answer."""

    text: str
    is_cut: bool  # by the limit of tokens
    prompt_tokens: int
    completion_tokens: int


class VisionLanguageModel:
    """A loaded model."""

    def __init__(self, name: str, reported: str, model: Any, processor: Any, device: torch.device) -> None:
        self.name = name
        self.reported = reported  # as its own configuration names it
        self._model, self._processor, self._device = model, processor, device

    @torch.inference_mode()
    def answer(
        self,
        text: str,
        pictures: Sequence[UInt8[np.ndarray, "H W 3"]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Said:
        """What it says to a text behind pictures.

        Args:
            text: the question.
            pictures: shown before it, in their order.
            max_tokens: of the answer.
            temperature: 0: the likeliest token each time.
            seed: of the draws, where the temperature is above 0.
        """
        content = [
            *({"type": "image", "image": Image.fromarray(one)} for one in pictures),
            {"type": "text", "text": text},
        ]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._device, self._model.dtype)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # an edit's draws must not depend on how much a judge was asked
            torch.manual_seed(seed)
            written = self._model.generate(**inputs, **sampling, max_new_tokens=max_tokens)
        given = inputs["input_ids"].shape[1]
        tokens = written[0, given:]
        ends = self._model.generation_config.eos_token_id
        ended = len(tokens) > 0 and int(tokens[-1]) in (ends if isinstance(ends, list) else [ends])
        return Said(
            text=self._processor.decode(tokens, skip_special_tokens=True),
            is_cut=len(tokens) >= max_tokens and not ended,
            prompt_tokens=given,
            completion_tokens=len(tokens),
        )


def load_vision_language(name: str, revision: str | None = None) -> VisionLanguageModel:
    """Load a checkpoint onto the GPU, where there is one, in bfloat16 there and in float32 elsewhere.

    Args:
        name: a folder in transformers format, or a hub id.
        revision: of a hub id; None: its main branch.

    Raises:
        ModelError: it is missing, no such model, asks for code of its own, or has no safetensors or no chat template.
    """
    silence()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = located(name, revision, WANTED)
    reported = checked(folder, name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, dtype=dtype)
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"the model '{name}' cannot be loaded: {type(error).__name__}: {error}") from error
    if not getattr(processor, "chat_template", None):
        raise ModelError(f"the model '{name}' has no chat template. Give one that is tuned to answer questions")
    return VisionLanguageModel(name, reported, model.to(device).eval(), processor, device)


def checked(folder: Path, name: str) -> str:
    """The model's type; refuses what asks for code of its own or has pickled weights only."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"the model '{name}' has no config.json that can be read. Give a checkpoint in transformers format"
        ) from error
    if "auto_map" in config:
        raise ModelError(
            f"the model '{name}' asks for code of its own, which is not run. Give one that transformers knows"
        )
    refuse_unsafe_weights(folder, name)
    return kind
