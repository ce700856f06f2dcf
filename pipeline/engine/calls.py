"""The whole vocabulary of a method: what it may yield, and what it gets back.

A method is a generator over one image. It yields these records, the engine answers each of them:

    EncodeText    -> list[TextConditioning], one per prompt
    EncodeImage   -> latents (C, h, w)
    Denoise       -> Denoised: noise predictions (R, C, h, w) and, where asked, attention maps (R, h/4, w/4)
    DecodeLatents -> pixels (H, W, 3) uint8
    Fork          -> list of results or exceptions, one per child generator

R counts the rows of one call; rows do not interact and may be packed into different UNet calls.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TextConditioning:
    """One prompt as the UNet reads it. Opaque to methods but for its token positions."""

    prompt: str
    embedding: Tensor  # (L, D)
    token_count: int  # tokens of the prompt itself: without start, end and padding, after truncation to L - 2

    @property
    def positions(self) -> range:
        """Places of the prompt's own tokens among the L keys of cross-attention; place 0 is the start token."""
        return range(1, 1 + self.token_count)


@dataclass(frozen=True, slots=True)
class EncodeText:
    """Encode prompts. Each distinct prompt is encoded once per worker."""

    prompts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EncodeImage:
    """Encode pixels (H, W, 3) uint8 into scaled latents: the posterior's mode, so that nothing is random."""

    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class DecodeLatents:
    """Decode latents (C, h, w) into pixels (H, W, 3) uint8."""

    latents: Tensor


@dataclass(frozen=True, slots=True)
class Denoise:
    """Predict the noise of R latents.

    `watch` names, per row, the token positions whose cross-attention at a quarter of the latents' side is wanted
    (averaged over heads and over the down and up blocks' layers of that grid, summed over the tokens). An empty
    sequence watches nothing and costs nothing. Watching does not change a prediction.
    """

    latents: Tensor  # (R, C, h, w)
    timesteps: Sequence[int]  # R, what the UNet is told
    conditioning: Sequence[TextConditioning]  # R
    watch: Sequence[Sequence[int]] | None = None  # R


@dataclass(frozen=True, slots=True)
class Denoised:
    """Answer to `Denoise`."""

    noise_preds: Tensor  # (R, C, h, w), epsilon whatever the checkpoint predicts
    attention: Tensor | None  # (R, h/4, w/4), zero for rows that watched nothing; None without `watch`


@dataclass(frozen=True, slots=True)
class Fork:
    """Run children side by side; one that fails leaves its exception in its place."""

    children: tuple[Steps[Any], ...]


Call = EncodeText | EncodeImage | DecodeLatents | Denoise | Fork
Steps = Generator[Call, Any, T]
"""A generator over one image: yields calls, receives their answers, returns T."""
