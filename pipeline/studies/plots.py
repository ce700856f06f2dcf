"""Lines over two axes as a small picture: enough for a figure, without a plotting library."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 640, 400  # pixels
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 20, 50  # around the axes; the legend stands at the right
COLOURS = ("#1f5fbf", "#c8502d", "#3c8c50", "#7d5aaa", "#a08019", "#2d9696", "#b4468c", "#5a5a5a", "#d9a0c8", "#101010")
TICKS = 5


class Line(NamedTuple):
    """One line of a figure."""

    name: str
    points: Sequence[tuple[float, float]]


class _Axis(NamedTuple):
    low: float
    high: float

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def plot(lines: Sequence[Line], across: str, up: str) -> bytes:
    """A figure as PNG; the same lines give the same bytes.

    Args:
        lines: each with at least one point.
        across: what the horizontal axis says.
        up: what the vertical one says; it begins at 0 where that is below all points.
    """
    horizontal = _axis([x for line in lines for x, _ in line.points])
    vertical = _axis([0.0, *(y for line in lines for _, y in line.points)])
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + horizontal.share(x) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - vertical.share(y) * (HEIGHT - TOP - BOTTOM),
        )

    for number in range(TICKS + 1):
        x, y = (axis.low + number * (axis.high - axis.low) / TICKS for axis in (horizontal, vertical))
        pen.line([place(horizontal.low, y), place(horizontal.high, y)], "#dddddd")
        pen.text((LEFT - 8, place(x, y)[1]), f"{y:.3g}", "black", font, anchor="rm")
        pen.text((place(x, y)[0], HEIGHT - BOTTOM + 8), f"{x:.3g}", "black", font, anchor="mt")
    pen.line([place(horizontal.low, vertical.high), place(horizontal.low, vertical.low)], "black")
    pen.line([place(horizontal.low, vertical.low), place(horizontal.high, vertical.low)], "black")
    pen.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18), across, "black", font, anchor="mm")
    pen.text((LEFT, TOP - 8), up, "black", font, anchor="lm")
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        points = [place(x, y) for x, y in sorted(line.points)]
        if len(points) > 1:
            pen.line(points, colour, width=2)
        for x, y in points:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        height = TOP + 10 + 18 * number
        pen.line([(WIDTH - RIGHT + 12, height), (WIDTH - RIGHT + 32, height)], colour, width=2)
        pen.text((WIDTH - RIGHT + 38, height), line.name, "black", font, anchor="lm")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _axis(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    if low == high:
        return _Axis(low - 0.5, high + 0.5)
    step = 10.0 ** math.floor(math.log10(high - low)) / 2.0
    return _Axis(math.floor(low / step) * step, math.ceil(high / step) * step)
