"""Contrast of the report's colours, computed from its style sheet: WCAG 2.2 AA, in light and in dark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pipeline.looking.report.page

CSS = Path(pipeline.looking.report.page.__file__).with_name("page.css").read_text(encoding="utf-8")
TEXT, GRAPHIC = 4.5, 3.0
PAIRS = [
    *((text, ground, TEXT) for text in ("ink", "soft", "accent") for ground in ("paper", "card", "well")),
    *((text, "card", TEXT) for text in ("good", "fair", "poor")),
    *((text, f"{text}-soft", TEXT) for text in ("good", "fair", "poor", "accent")),
    ("ink", "poor-soft", TEXT),  # the reason of a failure
    ("paper", "ink", TEXT),  # the page one is on
    *((f"{grade}-dot", ground, GRAPHIC) for grade in ("good", "fair", "poor") for ground in ("card", "well", "paper")),
    *(("edge", ground, GRAPHIC) for ground in ("card", "paper")),  # the border of what can be typed into or pressed
]


def palette(dark: bool) -> dict[str, str]:
    light, night = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light)) | (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", night)) if dark else {}
    )


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_measure_is_that_of_the_standard():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("front", "ground", "least"), PAIRS)
def test_text_and_marks_stand_out_from_their_ground(front, ground, least, dark):
    colours = palette(dark)
    assert contrast(colours[front], colours[ground]) >= least


def test_labels_on_pictures_are_readable_on_any_picture():
    shade = re.search(r"\.tag \{[^}]*color: (#\w{6}); background: rgb\((\d+) (\d+) (\d+) / ([.\d]+)\)", CSS)
    assert shade is not None
    alpha = float(shade[5])
    over_white = "#" + "".join(f"{round(int(part) * alpha + 255 * (1 - alpha)):02x}" for part in shade.group(2, 3, 4))
    assert contrast(shade[1], over_white) >= TEXT


def test_no_text_has_a_colour_of_its_own_beside_the_tested_ones():
    found = set(re.findall(r"[^-]color: ([^;]+);", CSS)) - {"inherit"}
    assert found <= {"#ffffff", *(f"var(--{front})" for front, _, least in PAIRS if least == TEXT)}
