"""Decode a row's pictures in a process that may be killed: what breaks a limit fails alone, with the reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from typing_extensions import override

from pipeline.errors import DecodeError
from pipeline.reading import decode as plain
from pipeline.reading.channel import ClosedError, LateError, Message
from pipeline.reading.decode import Picture
from pipeline.reading.guarded import BreachError, Guarded, Limits, done_by_guarded, warm_up

if TYPE_CHECKING:
    from pipeline.recipe import SourceConfig


class Decodes(Protocol):
    """What decodes pictures."""

    def image(self, picture: Picture, max_pixels: int) -> tuple[np.ndarray, int]:
        """Pixels (H, W, 3) uint8, upright, and the EXIF orientation that they were stored in."""

    def mask(self, picture: Picture, max_pixels: int, orientation: int, size: tuple[int, int]) -> np.ndarray:
        """A user's mask (H, W) uint8; `orientation` and `size` are its image's."""


class DecodesHere(Decodes):
    """In this process, without limits: for pictures that the user holds already."""

    @override
    def image(self, picture: Picture, max_pixels: int) -> tuple[np.ndarray, int]:
        return plain.decode(picture, max_pixels)

    @override
    def mask(self, picture: Picture, max_pixels: int, orientation: int, size: tuple[int, int]) -> np.ndarray:
        return plain.decode_mask(picture, max_pixels, orientation, size)


class Decoder(Decodes):
    """In a guarded process, with the same results and errors. May be used from several threads.

    Args:
        source: says what a picture may take, `decode_seconds` and `decode_memory`.
    """

    def __init__(self, source: SourceConfig) -> None:
        self._limits = Limits.for_pictures(source)
        warm_up(self._limits)

    @override
    def image(self, picture: Picture, max_pixels: int) -> tuple[np.ndarray, int]:
        head, pixels = self._ask("image", picture, max_pixels, {})
        return pixels, int(head["orientation"])

    @override
    def mask(self, picture: Picture, max_pixels: int, orientation: int, size: tuple[int, int]) -> np.ndarray:
        return self._ask("mask", picture, max_pixels, {"orientation": orientation, "size": size})[1]

    def _ask(
        self, what: str, picture: Picture, max_pixels: int, more: dict[str, Any]
    ) -> tuple[dict[str, Any], np.ndarray]:
        assert isinstance(picture, bytes), "a row's pictures are encoded"
        question = {"job": what, "max_pixels": max_pixels, **more}
        try:
            head, blobs = done_by_guarded(self._limits, lambda guarded: _answer(guarded, question, picture))
        except BreachError as breach:
            raise DecodeError(f"the {what} {breach} when it was decoded") from None
        if "problem" in head:
            raise DecodeError(str(head["problem"]))
        if "fault" in head:
            raise RuntimeError(f"the decoder has a fault:\n{head['fault']}")
        return head, _array(head["shape"], blobs, max_pixels)


def _answer(guarded: Guarded, question: dict[str, Any], picture: bytes) -> Message:
    seconds = guarded.limits.wall_seconds
    try:
        guarded.channel.send(question, [picture], seconds=seconds)
        answer = guarded.channel.receive(seconds=seconds)
        if "memory" in answer[0]:
            raise MemoryError
    except (ClosedError, LateError, MemoryError) as error:
        raise guarded.breach(error) from None
    return answer


def _array(shape: Sequence[int], blobs: Sequence[bytearray], max_pixels: int) -> np.ndarray:
    """What a process that read strangers' bytes says is an array, if it can be one."""
    height, width, *channels = shape
    (data,) = blobs
    if len(data) != math.prod(shape) or not 0 < height * width <= max_pixels or channels not in ([], [3]):
        raise DecodeError("its decoder answered with what is no picture")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
