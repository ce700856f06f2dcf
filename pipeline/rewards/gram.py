"""Style as Gram matrices of features (Gatys et al., arXiv 1508.06576, equations 3 and 4)."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import conv2d, interpolate
from typing_extensions import override

from pipeline.rewards.base import Reward, RewardSample, reference_of
from pipeline.rewards.closed_form import half_square

CHANNELS = (3, 24, 48)  # of the random features, layer by layer
SEED = 20250302  # of their kernels: the same in every run and on every machine


def gram(features: Tensor) -> Tensor:
    """(C, C): mean over places of the products of features (C, N)."""
    return features @ features.mT / features.shape[1]


@cache
def kernels() -> tuple[Tensor, ...]:
    """Kernels (C_out, C_in, 3, 3) of random features, scaled to keep the size of what they see."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    return tuple(
        torch.randn((after, before, 3, 3), generator=generator) * (2.0 / (9 * before)) ** 0.5
        for before, after in pairwise(CHANNELS)
    )


class RandomGram(Reward):
    """Distance of the Gram matrices of random features to those of a picture."""

    names_reference: ClassVar = True
    reads_image: ClassVar = False

    method: Literal["random_gram"] = "random_gram"
    """Distance to a picture's style: Gram matrices of fixed random features, which need no weights (Ulyanov et al.,
    arXiv 1606.05897, say how far random ones go)."""
    reference: str = Field(min_length=1)
    """Which of editing.references has the style."""

    @override
    def loss(self, pixels: Tensor, sample: RewardSample) -> Tensor:
        style = reference_of(sample).to(pixels)
        if style.shape != pixels.shape:
            style = interpolate(style[None], size=pixels.shape[-2:], mode="bilinear", antialias=True)[0]
        pairs = zip(random_features(pixels), random_features(style), strict=True)
        return sum((half_square(gram(ours) - gram(theirs)) for ours, theirs in pairs), pixels.new_zeros(()))


def random_features(pixels: Tensor) -> list[Tensor]:
    """(C, N) after each layer of strided convolutions; the pixels themselves come first, for their colours."""
    found, hidden = [pixels.flatten(1)], pixels[None]
    for kernel in kernels():
        hidden = conv2d(hidden, kernel.to(pixels), stride=2, padding=1).tanh()
        found.append(hidden[0].flatten(1))
    return found
