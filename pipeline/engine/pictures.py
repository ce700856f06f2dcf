"""Calls of the autoencoder: pictures of one shape, whoever asked, in batches of one size.

As with the network, a picture's bits depend on the size of its batch and not on what else is in it; so a short batch is
filled up with copies that nobody reads.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import DecodeGradient, DecodeLatents, EncodeImage, PixelFunction, Valued

PICTURE_SHARE = 8  # on a GPU a batch of the autoencoder has this fraction of a network call's rows


def pictures_per_call(call_size: int, device: torch.device) -> int:
    """Pictures of one call of the autoencoder. It depends on nothing else, so that a picture's bits do not either.

    A CPU gains nothing from a batch, and would compute for nobody where one is filled up.
    """
    return max(1, call_size // PICTURE_SHARE) if device.type == "cuda" else 1


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the pictures of one batch have in common."""

    encodes: bool
    shape: tuple[int, ...]
    alone: Picture | None  # one that shares its call with no other


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One that waits."""

    owner: Any  # whoever waits for the answer
    data: Tensor  # pixels (H, W, 3) uint8, or latents (C, h, w)
    encodes: bool = False
    function: PixelFunction | None = None  # of the decoded pixels, whose gradient is wanted in their place

    @classmethod
    def of(cls, owner: Any, call: EncodeImage | DecodeLatents | DecodeGradient) -> Picture:
        """What a call asks for."""
        if isinstance(call, EncodeImage):
            return cls(owner, torch.from_numpy(np.ascontiguousarray(call.pixels)), encodes=True)
        return cls(owner, call.latents, function=call.function if isinstance(call, DecodeGradient) else None)

    @property
    def kind(self) -> _Kind:
        """What it shares with those of its batch."""
        return _Kind(self.encodes, tuple(self.data.shape), None if self.function is None else self)


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """The pictures of one call of the autoencoder, not yet filled up."""

    pictures: list[Picture]

    @property
    def is_gradient(self) -> bool:
        """Whether it is one picture, and the gradient of a function of it is wanted."""
        return self.pictures[0].function is not None

    def run(self, backbone: Backbone, size: int) -> tuple[Tensor, ...]:
        """The call: of `size` pictures, or more where more are there. Its answer lies on the model's device."""
        first = self.pictures[0]
        if first.function is not None:
            return backbone.decode_gradient(first.data, first.function)
        data = [picture.data for picture in self.pictures]
        stacked = torch.stack(data + data[:1] * (size - len(data)))
        return (backbone.encode_images(stacked) if first.encodes else backbone.decode_latents(stacked),)

    def deliver(self, answers: tuple[Tensor, ...]) -> Iterator[tuple[Any, Any]]:
        """Each owner and its answer: latents, pixels as an array, or a value and its gradient."""
        if self.is_gradient:
            value, gradient = answers
            yield self.pictures[0].owner, Valued(float(value), gradient)
            return
        (answer,) = answers
        for number, picture in enumerate(self.pictures):
            own = answer[number].clone()  # alone: the others' memory is free again when they are done
            yield picture.owner, own if picture.encodes else own.numpy()

    def singly(self) -> list[PictureBatch]:
        """One by one."""
        return [PictureBatch([picture]) for picture in self.pictures]


def encode_picture(backbone: Backbone, pixels: np.ndarray) -> Tensor:
    """Latents (C, h, w) of pixels (H, W, 3) uint8, on the CPU: one picture, without an engine."""
    return PictureBatch([Picture.of(None, EncodeImage(pixels))]).run(backbone, 1)[0][0].cpu()


def decode_picture(backbone: Backbone, latents: Tensor) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of latents (C, h, w): one picture, without an engine."""
    return PictureBatch([Picture.of(None, DecodeLatents(latents))]).run(backbone, 1)[0][0].cpu().numpy()


class PictureQueue:
    """Pictures that wait for the autoencoder, oldest first, by kind."""

    def __init__(self) -> None:
        self._by_kind: OrderedDict[_Kind, deque[Picture]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._by_kind.values()))

    def push(self, picture: Picture) -> None:
        """Queue one."""
        self._by_kind.setdefault(picture.kind, deque()).append(picture)

    def has_full(self, size: int) -> bool:
        """Whether some kind fills a batch."""
        return any(len(waiting) >= size or kind.alone is not None for kind, waiting in self._by_kind.items())

    def pop(self, size: int) -> PictureBatch:
        """The next batch: of the kind that fills most of one."""
        kind = max(self._by_kind, key=lambda kind: min(len(self._by_kind[kind]), size))
        waiting = self._by_kind[kind]
        batch = PictureBatch([waiting.popleft() for _ in range(min(size, len(waiting)))])
        if not waiting:
            del self._by_kind[kind]
        return batch

    def put_back(self, batch: PictureBatch) -> None:
        """Return the pictures of a call that was not made to the head of their queue, in their order."""
        self._by_kind.setdefault(batch.pictures[0].kind, deque()).extendleft(reversed(batch.pictures))

    def drop(self, is_gone: Callable[[Any], bool]) -> None:
        """Forget the pictures of owners that are gone."""
        for kind, waiting in list(self._by_kind.items()):
            left = deque(picture for picture in waiting if not is_gone(picture.owner))
            if left:
                self._by_kind[kind] = left
            else:
                del self._by_kind[kind]
