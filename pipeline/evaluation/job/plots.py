"""Plots of the comparison page, as SVG: nothing to load, sharp at any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.evaluation.tables import Tables, number

COLORS = ("#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6", "#dd4477", "#66aa00", "#b82e2e", "#316395")
WIDTH, HEIGHT, MARGIN = 640, 380, 56
ROW, LABEL = 22, 170  # of a box plot: height of a line, width of its name


def color_of(place: int) -> str:
    """Of a method, by its place."""
    return COLORS[place % len(COLORS)]


def trade_off(tables: Tables, kept: str, done: str) -> Markup:
    """Means of two measures against each other, a point per method, with their intervals: what an edit left alone to
    the right, how far it went upwards; a measure of which less is better is turned round."""
    points = []
    for place, method in enumerate(tables.methods):
        x, y = (tables.lines[name][method].common for name in (kept, done))
        if x.mean_of_items is not None and y.mean_of_items is not None:
            points.append((place, method, x, y))
    if not points:
        return Markup("")
    axis_x = _Axis.over([end for _, _, x, _ in points for end in _ends(x)], tables.measures[kept].higher_is_better)
    axis_y = _Axis.over([end for _, _, _, y in points for end in _ends(y)], tables.measures[done].higher_is_better)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="trade-off">',
        f'<rect x="{MARGIN}" y="10" width="{WIDTH - MARGIN - 10}" height="{HEIGHT - MARGIN - 10}" class="frame"/>',
        f'<text x="{(WIDTH + MARGIN) / 2}" y="{HEIGHT - 12}" class="axis">{escape(tables.measures[kept].title)}</text>',
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" class="axis">'
        f"{escape(tables.measures[done].title)}</text>",
    ]
    for value in axis_x.marks():
        parts.append(
            f'<text x="{_x(axis_x.share(value)):.1f}" y="{HEIGHT - 30}" class="tick">'
            f"{escape(number(value, tables.measures[kept]))}</text>"
        )
    for value in axis_y.marks():
        parts.append(
            f'<text x="{MARGIN - 6}" y="{_y(axis_y.share(value)) + 4:.1f}" class="tick end">'
            f"{escape(number(value, tables.measures[done]))}</text>"
        )
    for place, method, x, y in points:
        left, right = (_x(axis_x.share(end)) for end in _ends(x))
        low, high = (_y(axis_y.share(end)) for end in _ends(y))
        at_x, at_y = _x(axis_x.share(x.mean_of_items or 0.0)), _y(axis_y.share(y.mean_of_items or 0.0))
        color = color_of(place)
        parts += [
            f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{at_y:.1f}" y2="{at_y:.1f}" stroke="{color}" opacity=".5"/>',
            f'<line x1="{at_x:.1f}" x2="{at_x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{color}" opacity=".5"/>',
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="5" fill="{color}"><title>{escape(method)}</title></circle>',
            f'<text x="{at_x + 8:.1f}" y="{at_y - 7:.1f}" class="name">{escape(method)}</text>',
        ]
    return Markup("".join([*parts, "</svg>"]))


def boxes(tables: Tables, name: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    """How a measure is distributed: per method the middle half as a box, the median, and the outer ninetieths."""
    measure = tables.measures[name]
    values = {
        method: [row[name] for row in rows if row["method"] == method and row[name] is not None]
        for method in tables.methods
    }
    every = [value for some in values.values() for value in some]
    axis = _Axis.over(every, True)
    height = 26 + ROW * len(values) + 20
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(measure.title)}">',
        f'<text x="4" y="15" class="head">{escape(measure.title)}</text>',
    ]

    def at(value: float) -> float:
        return LABEL + axis.share(value) * (WIDTH - LABEL - 14)

    for place, (method, some) in enumerate(values.items()):
        y = 26 + ROW * place
        parts.append(f'<text x="4" y="{y + 13}" class="name">{escape(method[:26])}</text>')
        if some:
            low, first, middle, third, high = (at(one) for one in np.quantile(some, [0.05, 0.25, 0.5, 0.75, 0.95]))
            color = color_of(place)
            parts += [
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 9}" y2="{y + 9}" stroke="{color}"/>',
                f'<rect x="{first:.1f}" width="{max(1.0, third - first):.1f}" y="{y + 2}" height="14" fill="{color}" '
                'opacity=".45"/>',
                f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{y}" y2="{y + 18}" stroke="{color}" stroke-width="3"/>',
            ]
    for value in axis.marks():
        parts.append(f'<text x="{at(value):.1f}" y="{height - 5}" class="tick">{escape(number(value, measure))}</text>')
    return Markup("".join([*parts, "</svg>"]))


def _ends(described: Any) -> tuple[float, float]:
    mean: float = described.mean_of_items
    return described.interval or (mean, mean)


def _x(share: float) -> float:
    return MARGIN + 20 + share * (WIDTH - MARGIN - 150)  # names stand to the right of their points


def _y(share: float) -> float:
    return HEIGHT - MARGIN - 15 - share * (HEIGHT - MARGIN - 40)


class _Axis:
    """From values to shares of an axis, 0..1."""

    def __init__(self, low: float, high: float, rises: bool) -> None:
        self._low, self._high, self._rises = low, high, rises

    @classmethod
    def over(cls, values: Sequence[float], rises: bool | None) -> _Axis:
        """An axis that holds all values."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        return cls(low, high if high > low else low + 1.0, rises is not False)

    def share(self, value: float) -> float:
        """Where a value is."""
        share = (value - self._low) / (self._high - self._low)
        return share if self._rises else 1 - share

    def marks(self) -> list[float]:
        """Values that are written at the axis."""
        return [self._low + part * (self._high - self._low) for part in (0.0, 0.5, 1.0)]
