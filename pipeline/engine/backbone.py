"""What the engine may ask of a model. Everything behind this is a checkpoint; everything above it knows none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.levels import Schedule
from pipeline.engine.arriving import Wait, mark
from pipeline.engine.calls import Conditioning, NetworkAnswer, NetworkCall, PixelFunction, Product
from pipeline.engine.controls import WATCHED_FACTOR, Openings
from pipeline.engine.tuning import UNTUNED, Tuning, Ways
from pipeline.errors import EditError, ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """Which model made a result; goes into every run's record."""

    name: str  # as the recipe names it
    revision: str  # resolved commit of a hub model, "" for others
    digest: str  # SHA-256 over weights and configurations, first 16 hexadecimal digits
    dtype: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """The narrowest place of a network, and of what it is a function."""

    layer: str  # the module that puts it out
    channels: int  # C'
    factor: int  # latents' side over its own
    latent_channels: int  # C
    latent_scale: int  # pixels per latent, along a side
    side: int  # of the latents, at the size that is asked for

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C', h', w') for latents (height, width)."""
        return self.channels, -(-height // self.factor), -(-width // self.factor)

    def rank(self, height: int, width: int) -> int:
        """What the rank of its Jacobian is at most: the smaller one of both spaces."""
        channels, rows, columns = self.shape(height, width)
        return min(self.latent_channels * height * width, channels * rows * columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offers:
    """What a model offers to methods, as its configuration tells without its weights. Methods say what they need."""

    openings: Openings = field(default_factory=Openings)  # where calls may let controls in
    inputs: frozenset[str] = frozenset()  # what it must be given beside the latents, by name
    embedding_gradients: bool = False  # of a prediction with respect to the text's embedding
    # Whether a row is told the guidance scale that it shall answer for: `guidance` () among its conditioning's parts.
    embedded_guidance: bool = False
    references: bool = False  # whether a row may bring an image to read: "reference" (R, C, h', w') beside the latents
    reads_pictures: bool = False  # whether its text encoder reads the picture that a prompt speaks of
    # Why it cannot be guided away from a prompt or walked backwards: it was distilled to few steps or to one guidance.
    # "": it can be.
    distilled: str = ""
    is_absent: bool = False  # whether there is no model at all, for methods that read none
    bottleneck: Bottleneck | None = None  # whose Jacobian products can be had, in both modes; None: none can

    def at_size(self, size: int | None) -> Offers:
        """The same for images of another side in pixels; None: the checkpoint's own."""
        if size is None or self.bottleneck is None:
            return self
        return replace(self, bottleneck=replace(self.bottleneck, side=size // self.bottleneck.latent_scale))

    @property
    def watches(self) -> bool:
        """Whether it has cross-attention maps of the size that is watched."""
        return bool(self.openings.watched)

    def check_watchable(self, height: int, width: int) -> None:
        """Refuse latents (height, width) of which no attention maps can be had.

        Raises:
            EditError: names the grid that would be needed, and those that there are.
        """
        factor = self.openings.watched_factor
        if self.watches and not height % factor and not width % factor:
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
    max_side: int | None = None  # pixels; None: any
    tuning: Tuning = UNTUNED  # how it runs at present
    ways: Ways = MappingProxyType({})  # in which it can run besides, on its device

    def encode_text(self, prompt: str) -> Conditioning:
        """Embed one prompt; text beyond the encoder's length is cut."""

    def encode_texts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Embed several prompts in one call, whose size decides their last bits; these lie on its device."""
        return [self.encode_text(prompt) for prompt in prompts]

    def encode_text_of(self, prompt: str, picture: np.ndarray) -> Conditioning:
        """Embed one prompt that speaks of a picture (H, W, 3) uint8, which the text encoder reads as well.

        Raises:
            EditError: it reads none, or the prompt is longer than its places.
        """
        raise EditError(
            "this model's text encoder reads no pictures. Use a checkpoint whose does, such as Qwen/Qwen-Image-Edit"
        )

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to scaled latents (B, C, h, w), float32 or wider, on its device: the posterior's mode."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to (B, H, W, 3) uint8, on its device."""

    def decode_gradient(self, latents: Tensor, function: PixelFunction) -> tuple[Tensor, Tensor]:
        """A function's value () at the pixels of scaled latents (C, h, w), and its gradient at these: `DecodeGradient`.
        Both lie on its device."""

    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        """Predict noise and data of R rows in one network call; answers lie on the model's device.

        Raises:
            EditError: the model lacks what a control needs, or rows lack what it takes beside the latents.
        """

    def tune(self, tuning: Tuning) -> None:
        """Run in another way from now on.

        Raises:
            ModelError: it cannot.
        """
        if tuning != self.tuning:
            raise ModelError(f"'{self.record.name}' cannot be run {tuning}. Set another sink.folder for a new run")

    def product(self, call: Product) -> Tensor:
        """Multiply R vectors with the bottleneck's Jacobian at R latents; the answer lies on the model's device.

        Raises:
            EditError: the model offers no such products.
        """
        raise EditError(
            "this model gives no Jacobian products of its bottleneck (forward and reverse mode). Use a checkpoint of "
            "Stable Diffusion 1.x, 2.x or XL"
        )

    def mark(self) -> Wait:
        """Mark the end of what the device has been given so far; what is returned waits until it has got there."""
        return mark(self.device)
