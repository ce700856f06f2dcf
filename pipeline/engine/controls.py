"""Controls: how the rows of one `Denoise` call may read each other inside the network, and what is recorded there.

A control travels with its call. For one network call the model asks it for a `Hook`, which sees the attention layers
and residual blocks in the order in which they run, and gives what it recorded at the end; after the call nothing is
left behind, so a call may be repeated. All rows of a call with a control share one network call: they are a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

NetworkPart = Literal["down", "mid", "up"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer of the network, told by its name; never by counting calls."""

    kind: Literal["self", "cross"]
    index: int  # of its transformer block, in order of execution, from 0; its self- and cross-attention share it
    place: NetworkPart
    index_in_place: int  # among the blocks of its place, from 0
    factor: int  # latents' side over the side of its map

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of its map for latents of (height, width)."""
        return -(-height // self.factor), -(-width // self.factor)


@dataclass(frozen=True, slots=True)
class Block:
    """One residual block of the UNet's decoder."""

    index: int  # of its up block, in order of execution, from 0
    index_in_block: int
    factor: int  # latents' side over the side of its features


class Routes(NamedTuple):
    """For each row of the group, the row whose queries, keys and values it attends with. Fused attention throughout."""

    query: Sequence[int]
    key: Sequence[int]
    value: Sequence[int]


class Hook:
    """What one control does in one network call. Overrides what it needs; the rest leaves everything as it is."""

    def routes(self, layer: Layer) -> Routes | None:
        """Before a layer attends: whose queries, keys and values each row uses. None: its own."""
        return None

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, scale: float, attended: Tensor) -> Tensor:
        """After a layer has attended.

        Args:
            layer: which.
            query: (R, heads, N, d) of the group, before any route.
            key: (R, heads, M, d), as are the values; M is N, or L tokens in cross-attention.
            value: see key.
            scale: that scores are multiplied with.
            attended: (R, heads, N, d), the layer's fused result. Not to be changed in place.

        Returns:
            The result to go on with.
        """
        return attended

    def features(self, block: Block, hidden: Tensor) -> Tensor:
        """Hidden state (R, C, h', w') of a decoder block after its second convolution, before its shortcut is added."""
        return hidden

    def answer(self) -> Any:
        """What was recorded, tensors on the CPU; the `seen` of `Denoised`."""
        return None


class Control(ABC):
    """Describes a hook. Immutable, and the same for every call that repeats it."""

    @abstractmethod
    def hook(self, height: int, width: int, device: torch.device) -> Hook:
        """A fresh hook for a network call on latents of (height, width)."""


def attention_probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Softmax of the scores, (..., N, M), in float32 or wider."""
    scores = (query @ key.transpose(-1, -2)) * scale
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
