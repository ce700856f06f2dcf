"""Alignment of pairs: half a pixel of a photograph is seen, whatever the edit, the light and the encoding do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.pairs import Displacement, decoded, displaced, edit, jpeg, region, sources
from pipeline.pairs.affine import scaling
from pipeline.pairs.alignment import _judged, _Level, _luma, align

SIDE = 256


def made(by: Displacement, seed: int = 0, *, name: str = "astronaut.png", side: int = SIDE) -> tuple[np.ndarray, ...]:
    """Source, edited and mask of a crop of a photograph."""
    rng = np.random.default_rng(seed)
    photograph = sources()[name]
    mask = region(rng, side)
    edited = edit(rng, displaced(photograph, 60, 100, side, by), mask)
    return decoded(jpeg(photograph[60 : 60 + side, 100 : 100 + side], 90)), decoded(jpeg(edited, 90)), mask


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize(("dx", "dy"), [(0.5, 0.0), (-1.25, 2.0), (7.0, -9.0)])
def test_a_shift_is_measured_in_its_direction_within_a_twentieth_of_a_pixel(dx, dy, with_mask):
    source, edited, mask = made(Displacement(dx=dx, dy=dy))
    found = align(source, edited, mask if with_mask else None)
    assert (found.dx, found.dy) == pytest.approx((dx, dy), abs=0.05)
    assert (found.sx, found.sy) == pytest.approx((1, 1), abs=0.0005)
    assert found.verdict == ("undecided" if dx == 0.5 else "misaligned")


def test_a_zoom_of_a_fifth_of_a_percent_is_found_at_400_pixels():
    source, edited, _ = made(Displacement(scale=1.002), side=400)
    found = align(source, edited)
    assert (found.sx, found.sy) == pytest.approx((1.002, 1.002), abs=0.0003)
    assert found.verdict == "undecided"


@pytest.mark.parametrize("seed", range(3))
def test_an_edit_alone_is_no_displacement(seed):
    source, edited, mask = made(Displacement(), seed)
    for found in (align(source, edited, mask), align(source, edited)):
        assert found.verdict == "aligned"
        assert found.corner_px < 0.1


def test_light_that_grows_across_the_image_is_no_displacement():
    source, edited, _ = made(Displacement())
    ramp = np.linspace(-40, 40, SIDE, dtype=np.float32)[None, :, None]
    found = align(source, np.clip(edited + ramp, 0, 255).astype(np.uint8))
    assert found.verdict == "aligned"


def test_a_turn_is_measured_and_displaces_the_corners():
    source, _, _ = made(Displacement())
    turned = Image.fromarray(source).rotate(-0.5, Image.Resampling.BICUBIC)  # clockwise
    found = align(source, np.asarray(turned))
    assert found.rotation == pytest.approx(0.5, abs=0.03)
    assert found.corner_px == pytest.approx(np.radians(0.5) * 127.5 * np.sqrt(2), abs=0.1)
    assert found.verdict == "misaligned"


def test_half_the_size_is_aligned_and_another_aspect_ratio_is_not():
    source, edited, _ = made(Displacement())
    half = np.asarray(Image.fromarray(edited).resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS))
    assert align(source, half).verdict == "aligned"
    cut = align(source, edited[:, : SIDE - 6])
    assert (cut.verdict, cut.note) == ("misaligned", "aspect")


def test_two_photographs_are_unrelated_and_a_mirror_image_is_called_so():
    source, _, _ = made(Displacement())
    other, _, _ = made(Displacement(), name="camera.png")
    assert align(source, other).verdict == "unrelated"
    mirrored = align(source, source[:, ::-1])
    assert (mirrored.verdict, mirrored.note) == ("unrelated", "mirrored")


def test_what_has_no_texture_is_undetermined():
    stripes = np.broadcast_to(((np.arange(SIDE) // 8 % 2) * 200).astype(np.uint8)[None, :, None], (SIDE, SIDE, 3))
    plain = np.full((SIDE, SIDE, 3), 90, dtype=np.uint8)
    for picture in (stripes, plain):
        assert align(picture, picture).verdict == "undetermined"


def test_a_mask_over_nearly_all_leaves_nothing_to_compare():
    source, edited, _ = made(Displacement())
    everything = np.ones((SIDE, SIDE), dtype=bool)
    found = align(source, edited, everything)
    assert (found.verdict, found.note) == ("undetermined", "mask")


@pytest.mark.parametrize(
    ("shift", "error", "verdict"),
    [
        (0.3, 0.05, "aligned"),
        (0.3, 0.2, "undetermined"),
        (0.38, 0.03, "undecided"),
        (0.38, 0.01, "aligned"),
        (0.5, 0.05, "undecided"),
        (0.7, 0.05, "misaligned"),
        (0.7, 0.2, "undetermined"),
        (3.0, 0.2, "misaligned"),
        (3.0, 1.2, "unrelated"),
    ],
)
def test_a_fit_whose_error_could_turn_the_verdict_is_undetermined(shift, error, verdict):
    source, _, _ = made(Displacement())
    luma = _luma(source)
    level = _Level(luma, luma, torch.ones_like(luma), by_blocks=False, block=32)
    level.score = level.likeness = lambda found: 1.0
    assert _judged(replace(scaling(1.0, (shift, 0.0)), error=error), level).verdict == verdict
