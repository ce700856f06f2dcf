"""Where an image lies on the model's canvas."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How an image was brought to the model's size: the inverse brings the result back.

    The oriented original (height, width) was cut to `crop` = (top, left, height, width), scaled to `scaled` =
    (height, width), and set into the model canvas at `offset` = (top, left); the rest of the canvas is padding.
    """

    original: tuple[int, int]
    crop: tuple[int, int, int, int]
    scaled: tuple[int, int]
    offset: tuple[int, int]
    canvas: tuple[int, int]

    def image_part(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of a (height, width) map of the canvas that show the image; the rest is padding.

        Those that are at least half image, and at least one of each.
        """
        rows, columns = (
            _cells(start, length, whole, count)
            for start, length, whole, count in zip(self.offset, self.scaled, self.canvas, size, strict=True)
        )
        return rows, columns

    def part_in(self, box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of a (height, width) map of the canvas that show a part of the image.

        Args:
            box: left, top, right, bottom of the part, as shares of the original's sides.
            size: of the map.

        Raises:
            ValueError: the part was cut away.
        """
        starts, lengths = [], []
        for axis, (begin, end) in enumerate(((box[1], box[3]), (box[0], box[2]))):
            scale = self.scaled[axis] / self.crop[2 + axis]
            first, last = (share * self.original[axis] - self.crop[axis] for share in (begin, end))
            first, last = (min(max(place, 0.0), float(self.crop[2 + axis])) * scale for place in (first, last))
            starts.append(self.offset[axis] + first)
            lengths.append(last - first)
        if min(lengths) <= 0:
            raise ValueError(
                f"the region {list(box)} lies in what model.fit crop cuts away. Set model.fit pad, or another region"
            )
        rows, columns = (
            _cells(start, length, whole, count)
            for start, length, whole, count in zip(starts, lengths, self.canvas, size, strict=True)
        )
        return rows, columns


def _cells(start: float, length: float, whole: int, count: int) -> slice:
    first = math.ceil(start * count / whole - 0.5)
    stop = math.floor((start + length) * count / whole + 0.5)
    if stop > first:
        return slice(first, stop)
    middle = min(int((start + length / 2) * count / whole), count - 1)
    return slice(middle, middle + 1)
