"""Rewards that need no weights: a colour, and what a degraded picture still tells of the clean one.

All are halves of sums of squares over one picture, so that their gradients are residuals, whatever the picture's size.
Blur, downsampling and masking are the linear degradations of restoration tasks (as in DPS, Chung et al., arXiv
2209.14687, section 4): the estimate, degraded, shall equal what was observed.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad
from typing_extensions import override

from pipeline.rewards.base import Reward, RewardSample, mask_of

Channel = Annotated[int, Field(ge=0, le=255)]


def half_square(difference: Tensor) -> Tensor:
    """Half the sum of squares."""
    return 0.5 * difference.square().sum()


class MaskedColor(Reward):
    """Distance to one colour inside the row's mask."""

    reads_image: ClassVar = False

    method: Literal["masked_color"] = "masked_color"
    """Distance to one colour inside the row's mask; without a mask, everywhere."""
    color: tuple[Channel, Channel, Channel]
    """Red, green, blue, 0 to 255."""

    @override
    def loss(self, pixels: Tensor, sample: RewardSample) -> Tensor:
        color = torch.tensor(self.color).to(pixels)[:, None, None] / 127.5 - 1.0
        return half_square((pixels - color) * mask_of(sample).to(pixels).sqrt())


class GaussianBlur(Reward):
    """Distance of the blurred estimate to what was observed."""

    method: Literal["blur"] = "blur"
    """Distance of the blurred estimate to the source: deblurring, or keeping large shapes and colours."""
    sigma: float = Field(default=3.0, gt=0, le=100)
    """Standard deviation of the blur, in pixels at model size."""
    observed: Literal["image", "degraded"] = "image"
    """What the blurred estimate shall equal. image: the source as it is, a blurred picture that is to be restored;
    degraded: the blurred source, which keeps a clean source's large shapes and colours."""

    @override
    def loss(self, pixels: Tensor, sample: RewardSample) -> Tensor:
        image = sample.image.to(pixels)
        wanted = image if self.observed == "image" else gaussian_blur(image, self.sigma)
        return half_square(gaussian_blur(pixels, self.sigma) - wanted)


class Downsampling(Reward):
    """Distance of the estimate to the source, both averaged over squares of pixels."""

    method: Literal["downsampling"] = "downsampling"
    """Distance to the source, both averaged over squares of pixels: enlarging a small picture that was scaled up."""
    factor: int = Field(default=4, ge=2, le=64)
    """Side of the squares, in pixels at model size."""

    @override
    def loss(self, pixels: Tensor, sample: RewardSample) -> Tensor:
        difference = pixels - sample.image.to(pixels)
        return half_square(avg_pool2d(difference[None], self.factor, ceil_mode=True))


class Masking(Reward):
    """Distance to the source outside the row's mask."""

    reads_mask: ClassVar = True

    method: Literal["masking"] = "masking"
    """Distance to the source outside the row's mask: filling what is masked. For user_mask: rewards, since a mask that
    bounds the edit leaves nothing to pull outside."""

    @override
    def loss(self, pixels: Tensor, sample: RewardSample) -> Tensor:
        known = 1.0 - mask_of(sample).to(pixels)
        return half_square((pixels - sample.image.to(pixels)) * known.sqrt())


def gaussian_blur(pixels: Tensor, sigma: float) -> Tensor:
    """(3, H, W) under a normalised Gaussian, cut off at three deviations; the edge's pixels go on outside."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1).to(pixels)
    row = torch.exp(offsets.square() / (-2 * sigma**2))
    row = (row / row.sum())[None, None]
    framed = pad(pixels[:, None], (radius,) * 4, mode="replicate")  # (3, 1, H + 2r, W + 2r)
    return conv2d(conv2d(framed, row[..., None, :]), row[..., None])[:, 0]
