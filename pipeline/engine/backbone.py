"""What the engine may ask of a model. Everything behind this is a checkpoint; everything above it knows none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.levels import Schedule
from pipeline.engine.calls import Conditioning, NetworkAnswer, NetworkCall
from pipeline.engine.controls import Block, Layer
from pipeline.errors import EditError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """Which model made a result; goes into every run's record."""

    name: str  # as the recipe names it
    revision: str  # resolved commit of a hub model, "" for others
    digest: str  # SHA-256 over weights and configurations, first 16 hexadecimal digits
    dtype: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Offers:
    """What a model offers to methods, as its configuration tells without its weights. Methods say what they need."""

    layers: tuple[Layer, ...] = ()  # attention layers that a call may watch and route
    blocks: tuple[Block, ...] = ()  # decoder blocks whose features a call may take over
    watched_factor: int | None = None  # latents' side over the side of watched maps; None: no maps can be had
    inputs: frozenset[str] = frozenset()  # what it must be given beside the latents, by name
    embedding_gradients: bool = False  # of a prediction with respect to the text's embedding
    # Why it cannot be guided away from a prompt or walked backwards: it was distilled to few steps or to one guidance.
    # "": it can be.
    distilled: str = ""

    def grids_at(self, kind: Literal["self", "cross"], factor: int) -> bool:
        """Whether there are attention layers of a kind outside the middle, whose map is so much coarser."""
        return any(one.kind == kind and one.place != "mid" and one.factor == factor for one in self.layers)

    @property
    def transformer_blocks(self) -> int:
        """Their number; those of `layers` count from 0."""
        return len({layer.index for layer in self.layers})

    def is_watchable(self, height: int, width: int) -> bool:
        """Whether attention maps can be had of latents (height, width)."""
        factor = self.watched_factor
        return factor is not None and not height % factor and not width % factor

    def check_watchable(self, height: int, width: int) -> None:
        """Refuse latents (height, width) of which no attention maps can be had.

        Raises:
            EditError: names the grids that there are.
        """
        if self.is_watchable(height, width):
            return
        crossing = sorted({one.factor for one in self.layers if one.kind == "cross" and one.place != "mid"})
        grids = ", ".join(f"{-(-height // f)}x{-(-width // f)}" for f in crossing) or "none"
        factor = self.watched_factor or 4
        raise EditError(
            f"attention masks are read from maps of {height / factor:g}x{width / factor:g} here, and this model has "
            f"cross-attention at {grids}. Set editing.mask: noise, use another image size, or another checkpoint"
        )


class Backbone(Protocol):
    """A loaded text-to-image latent diffusion model.

    A row's answer must not depend on its neighbours in a batch of one size, bit for bit.
    """

    record: ModelRecord
    schedule: Schedule
    offers: Offers
    device: torch.device
    image_size: int  # side in pixels that the model was made for
    latent_channels: int
    latent_scale: int  # pixels per latent, along a side
    multiple: int  # sides in pixels are multiples of this

    def encode_text(self, prompt: str) -> Conditioning:
        """Embed one prompt; text beyond the encoder's length is cut."""

    def encode_image(self, pixels: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 to scaled latents (C, h, w) on the CPU, float32 or wider: the posterior's mode."""

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Scaled latents (C, h, w) to (H, W, 3) uint8."""

    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        """Predict noise and data of R rows in one network call; answers lie on the model's device.

        Raises:
            EditError: the model lacks what a control needs, or rows lack what it takes beside the latents.
        """
