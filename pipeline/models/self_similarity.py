"""Pictures as a vision transformer sees them: their structure (Tumanyan et al., arXiv 2201.00424), and their content.

The structure of a picture is how alike its places are to each other, by the keys of the last layer of DINO ViT-B/8
(`facebook/dino-vitb8`). None is bundled: a folder or a hub id is given. Cost: one pass of the transformer per picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch.nn.functional import interpolate, normalize

from pipeline.errors import ModelError
from pipeline.models.image_text import check_safe, located, silence

KINDS = ("vit", "dinov2", "dinov2_with_registers")
SIDE = 224  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
KEY_NAMES = ("attention.attention.key", "attention.key", "attention.k_proj", "k_proj")


class VisionTransformer:
    """A loaded transformer."""

    def __init__(self, name: str, model: Any, device: torch.device) -> None:
        self.name = name
        self._model, self._device = model, device
        self._keys = last_keys(model)

    @torch.inference_mode()
    def structures(
        self, images: Sequence[UInt8[np.ndarray, "H W 3"]], *, antialias: bool = False
    ) -> Float[torch.Tensor, "images tokens tokens"]:
        """Self-similarity of every picture: cosines of the keys of its places, the class token's included.

        The values 0..255 are not divided by 255 before ImageNet's mean and deviation are applied: published numbers are
        measured so. `antialias` says how a picture becomes 224 x 224; libraries of that time did not.
        """
        found: list[torch.Tensor] = []
        hook = self._keys.register_forward_hook(lambda _, __, keys: found.append(keys))
        try:
            self._model(pixel_values=self._pixels(images, 1.0, antialias))
        finally:
            hook.remove()
        # Heads side by side: what the projection puts out is already that.
        keys = normalize(found[0].float().flatten(2), dim=-1, eps=1e-8)
        return keys @ keys.mT

    @torch.inference_mode()
    def contents(self, images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[np.ndarray, "images features"]:
        """The class token behind the last norm, of length 1: what a picture shows."""
        states = self._model(pixel_values=self._pixels(images, 1 / 255, True)).last_hidden_state[:, 0]
        return np.asarray(normalize(states.float(), dim=-1).cpu(), dtype=np.float64)

    def _pixels(self, images: Sequence[np.ndarray], scale: float, antialias: bool) -> torch.Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        resized = [
            interpolate(
                torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)[None].float() * scale,
                (SIDE, SIDE),
                mode="bilinear",
                antialias=antialias,
            )[0]
            for image in images
        ]
        return ((torch.stack(resized) - mean) / std).to(self._device)


def structure_distances(
    sources: Float[torch.Tensor, "images tokens tokens"], results: Float[torch.Tensor, "images tokens tokens"]
) -> list[float]:
    """Mean squared difference of two self-similarities, per picture."""
    return [float(value) for value in (sources - results).square().mean(dim=(1, 2)).cpu()]


def last_keys(model: Any) -> torch.nn.Module:
    """The key projection of the last layer, under the names that versions of transformers give it.

    Raises:
        ModelError: there is none.
    """
    named = [(name, module) for name, module in model.named_modules() if name.endswith(KEY_NAMES)]
    if not named:
        raise ModelError(f"{type(model).__name__} has no key projection that is known. Use another version")
    last: torch.nn.Module = named[-1][1]
    return last


def load_vision_transformer(name: str) -> VisionTransformer:
    """Load a checkpoint onto the GPU, where there is one.

    Args:
        name: a folder in transformers format, or a hub id.

    Raises:
        ModelError: it is missing, of another kind, or has no safetensors.
    """
    silence()
    from transformers import AutoModel

    folder = located(name)
    check_safe(folder, name, KINDS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModel.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the score model '{name}' cannot be loaded: {type(error).__name__}: {error}") from error
    return VisionTransformer(name, model.to(device).eval(), device)
