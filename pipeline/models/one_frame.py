"""A video's autoencoder, asked for one frame: what `Autoencoder` reads of one of pictures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class OneFrameConfig(SimpleNamespace):
    """What is read of an autoencoder's configuration."""

    def get(self, key: str, default: Any = None) -> Any:
        """A value that may be missing."""
        return getattr(self, key, default)


class OneFrame:
    """diffusers' `AutoencoderKLQwenImage`, whose tensors have a place for time behind the channels.

    Its latents are brought to unit scale by a mean and a standard deviation per channel alone.
    """

    def __init__(self, video: Any) -> None:
        self.video = video
        config = video.config
        self.config = OneFrameConfig(
            latent_channels=config.z_dim,
            scaling_factor=1.0,
            block_out_channels=[config.base_dim * one for one in config.dim_mult],
            latents_mean=config.latents_mean,
            latents_std=config.latents_std,
        )

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        device: torch.device = self.video.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        dtype: torch.dtype = self.video.dtype
        return dtype

    def requires_grad_(self, wanted: bool) -> None:
        """Whether its weights have gradients."""
        self.video.requires_grad_(wanted)

    def encode(self, image: Tensor) -> SimpleNamespace:
        """Pixels (B, 3, H, W) in [-1, 1] to `latent_dist`, whose `mode` is (B, C, h, w)."""
        posterior = self.video.encode(image[:, :, None]).latent_dist
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: posterior.mode()[:, :, 0]))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """Latents (B, C, h, w) to `sample`, pixels (B, 3, H, W), clipped to [-1, 1]."""
        return SimpleNamespace(sample=self.video.decode(latents[:, :, None]).sample[:, :, 0])
