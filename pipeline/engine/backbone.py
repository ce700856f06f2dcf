"""What the engine may ask of a model. Everything behind this is a checkpoint; everything above it knows none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.engine.calls import NetworkAnswer, NetworkCall, TextConditioning
from pipeline.engine.controls import Openings


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """Which model made a result; goes into every run's record."""

    name: str  # as the recipe names it
    revision: str  # resolved commit of a hub model, "" for others
    digest: str  # SHA-256 over weights and configurations, first 16 hexadecimal digits
    dtype: str
    device: str


class Backbone(Protocol):
    """A loaded text-to-image latent diffusion model.

    A row's answer must not depend on its neighbours in a batch of one size, bit for bit.
    """

    record: ModelRecord
    schedule: NoiseSchedule
    device: torch.device
    image_size: int  # side in pixels that the model was made for
    latent_channels: int
    latent_scale: int  # pixels per latent, along a side
    multiple: int  # sides in pixels are multiples of this
    inpaints: bool  # whether the network takes a mask and a masked image beside the latents
    openings: Openings  # where controls act; none in a model whose answers they do not change

    def encode_text(self, prompt: str) -> TextConditioning:
        """Embed one prompt; text beyond the encoder's length is cut."""

    def encode_image(self, pixels: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 to scaled latents (C, h, w) on the CPU, float32 or wider: the posterior's mode."""

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Scaled latents (C, h, w) to (H, W, 3) uint8."""

    def check_watchable(self, height: int, width: int) -> None:
        """Refuse latents (height, width) at which no cross-attention layer has a grid of a quarter of the side.

        Raises:
            EditError: names the grids that there are.
        """

    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        """Predict the noise of R rows in one network call; answers lie on the model's device.

        Raises:
            EditError: the model lacks what a control or an inpainting row needs.
        """
