"""A KL autoencoder: between pixels and the latents that a network was trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.copying import to_device
from pipeline.engine.calls import PixelFunction
from pipeline.models.gradients import pulled_back
from pipeline.models.kernels import exact_float32


class Autoencoder:
    """diffusers' `AutoencoderKL`, or FLUX.2's, on its device, in its dtype.

    A checkpoint says how the encoder's latents z are brought to unit scale: ((z - mean) / std - shift) * scale, with a
    mean and a standard deviation per channel or, in most, none. FLUX.2's has these alone, per channel and place in
    squares of two by two latents, which its network reads as one token.
    """

    def __init__(self, vae: Any, outside: torch.dtype) -> None:
        """`outside`: of the latents that it takes and gives."""
        self.vae, self._outside = vae, outside
        vae.requires_grad_(False)  # its gradients are of latents alone
        normalises = getattr(vae, "bn", None) is not None
        self._scale: float = 1.0 if normalises else vae.config.scaling_factor
        self._shift: float = 0.0 if normalises else vae.config.get("shift_factor") or 0.0
        self._statistics = _per_place(vae) if normalises else _per_channel(vae)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent, along a side

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to latents (B, C, h, w) on its device: the posterior's mode."""
        image = to_device(pixels, self.vae.device).to(self.vae.dtype)
        # Laid out plane by plane: other strides would choose other kernels, whose last bits differ.
        image = image.permute(0, 3, 1, 2).contiguous() / 127.5 - 1.0
        with exact_float32(image):
            latents = self.vae.encode(image).latent_dist.mode()
        if self._statistics is not None:
            mean, std = (_over(latents, one) for one in self._statistics)
            latents = (latents - mean) / std
        return ((latents - self._shift) * self._scale).to(self._outside)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to (B, H, W, 3) uint8 on its device."""
        image = self._decoded(to_device(latents, self.vae.device).to(self.vae.dtype)).float()
        return ((image.permute(0, 2, 3, 1) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def decode_gradient(self, latents: Tensor, function: PixelFunction) -> tuple[Tensor, Tensor]:
        """A function's value at the pixels of latents (C, h, w), and its gradient at these: see `DecodeGradient`."""

        def decode(leaf: Tensor) -> Tensor:
            return self._decoded(leaf[None].to(self.vae.dtype))[0].to(self._outside)

        return pulled_back(to_device(latents, self.vae.device).to(self._outside), decode, function)

    def _decoded(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W), nominally in [-1, 1], in the autoencoder's dtype."""
        scaled = latents / self._scale + self._shift
        if self._statistics is not None:
            mean, std = (_over(scaled, one) for one in self._statistics)
            scaled = scaled * std + mean
        with exact_float32(scaled):
            image: Tensor = self.vae.decode(scaled).sample
        return image


def _over(latents: Tensor, statistic: Tensor) -> Tensor:
    """A statistic (C, p, p) of squares of p by p latents, for each of latents (B, C, h, w): (C, h, w), or (C, 1, 1)."""
    side = statistic.shape[-1]
    if side == 1:
        return statistic
    return statistic.repeat(1, latents.shape[-2] // side, latents.shape[-1] // side)


def _per_place(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C, 2, 2) that a batch norm has gathered of squares' channels, in this order."""
    squares = (-1, *vae.config.patch_size)
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return vae.bn.running_mean.reshape(squares), std.reshape(squares)


def _per_channel(vae: Any) -> tuple[Tensor, Tensor] | None:
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return None
    mean, std = (torch.tensor(one, device=vae.device, dtype=vae.dtype)[:, None, None] for one in (mean, std))
    return mean, std
