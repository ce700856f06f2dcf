"""What the engine may ask of a model. Everything behind this is a checkpoint; everything above it knows none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pipeline.diffusion.levels import Schedule
from pipeline.engine.arriving import Wait, mark
from pipeline.engine.calls import Conditioning, NetworkAnswer, NetworkCall, PixelFunction, Valued
from pipeline.engine.controls import WATCHED_FACTOR, Openings
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

    openings: Openings = field(default_factory=Openings)  # where calls may let controls in
    inputs: frozenset[str] = frozenset()  # what it must be given beside the latents, by name
    embedding_gradients: bool = False  # of a prediction with respect to the text's embedding
    # Why it cannot be guided away from a prompt or walked backwards: it was distilled to few steps or to one guidance.
    # "": it can be.
    distilled: str = ""

    @property
    def watches(self) -> bool:
        """Whether it has cross-attention maps of the size that is watched."""
        return bool(self.openings.watched)

    def check_watchable(self, height: int, width: int) -> None:
        """Refuse latents (height, width) of which no attention maps can be had.

        Raises:
            EditError: names the grid that would be needed, and those that there are.
        """
        if self.watches and not height % WATCHED_FACTOR and not width % WATCHED_FACTOR:
            return
        layers = sorted(self.openings.layers, key=lambda layer: layer.factor)
        grids = dict.fromkeys(layer.grid(height, width) for layer in layers if layer.place != "mid")
        raise EditError(
            f"attention masks are read from maps of a quarter of the latents' side, {height / WATCHED_FACTOR:g}x"
            f"{width / WATCHED_FACTOR:g} here, and this model has attention at "
            f"{', '.join(f'{rows}x{columns}' for rows, columns in grids) or 'none'}. Set editing.mask: noise, use "
            f"sides that are multiples of {WATCHED_FACTOR} latents, or another checkpoint"
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

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to scaled latents (B, C, h, w), float32 or wider, on its device: the posterior's mode."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to (B, H, W, 3) uint8, on its device."""

    def decode_gradient(self, latents: Tensor, function: PixelFunction) -> Valued:
        """A function's value at the pixels of scaled latents (C, h, w), and its gradient at these: `DecodeGradient`."""

    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        """Predict noise and data of R rows in one network call; answers lie on the model's device.

        Raises:
            EditError: the model lacks what a control needs, or rows lack what it takes beside the latents.
        """

    def mark(self) -> Wait:
        """Mark the end of what the device has been given so far; what is returned waits until it has got there."""
        return mark(self.device)
