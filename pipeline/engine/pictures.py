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
from pipeline.engine.calls import DecodeLatents, EncodeImage

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


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One that waits."""

    owner: Any  # whoever waits for the answer
    data: Tensor  # pixels (H, W, 3) uint8, or latents (C, h, w)
    encodes: bool

    @classmethod
    def of(cls, owner: Any, call: EncodeImage | DecodeLatents) -> Picture:
        """What a call asks for."""
        if isinstance(call, EncodeImage):
            return cls(owner, torch.from_numpy(np.ascontiguousarray(call.pixels)), encodes=True)
        return cls(owner, call.latents, encodes=False)

    @property
    def kind(self) -> _Kind:
        """What it shares with those of its batch."""
        return _Kind(self.encodes, tuple(self.data.shape))


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """The pictures of one call of the autoencoder, not yet filled up."""

    pictures: list[Picture]

    def run(self, backbone: Backbone, size: int) -> Tensor:
        """The call: of `size` pictures, or more where more are there. Its answer lies on the model's device."""
        data = [picture.data for picture in self.pictures]
        stacked = torch.stack(data + data[:1] * (size - len(data)))
        return backbone.encode_images(stacked) if self.pictures[0].encodes else backbone.decode_latents(stacked)

    def deliver(self, answer: Tensor) -> Iterator[tuple[Any, Any]]:
        """Each owner and its answer: latents, or pixels as an array."""
        for number, picture in enumerate(self.pictures):
            own = answer[number].clone()  # alone: the others' memory is free again when they are done
            yield picture.owner, own if picture.encodes else own.numpy()

    def singly(self) -> list[PictureBatch]:
        """One by one."""
        return [PictureBatch([picture]) for picture in self.pictures]


def encode_picture(backbone: Backbone, pixels: np.ndarray) -> Tensor:
    """Latents (C, h, w) of pixels (H, W, 3) uint8, on the CPU: one picture, without an engine."""
    return PictureBatch([Picture.of(None, EncodeImage(pixels))]).run(backbone, 1)[0].cpu()


def decode_picture(backbone: Backbone, latents: Tensor) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of latents (C, h, w): one picture, without an engine."""
    return PictureBatch([Picture.of(None, DecodeLatents(latents))]).run(backbone, 1)[0].cpu().numpy()


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
        return any(len(waiting) >= size for waiting in self._by_kind.values())

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
