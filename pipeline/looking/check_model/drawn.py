"""A picture to check a model with where none is given: drawn here, since no photograph comes with the package."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.models.demo.shards import demo_scene
from pipeline.models.demo.world import draw

GRAIN = 14.0  # standard deviation, in levels of 255


def drawn_face(side: int, *, grain: bool) -> bytes:
    """A drawn face as PNG, `side` pixels square.

    Grain makes of flat colours what an autoencoder meets in photographs: noise of every size, whose power falls with
    the square of the frequency. Its decibels are then near those of a photograph, and no more than near.
    """
    pixels = draw(demo_scene(0), side).astype(np.float64)
    if grain:
        pixels += GRAIN * _pink_noise(side)[..., None]
    out = io.BytesIO()
    Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def _pink_noise(side: int) -> np.ndarray:
    """(side, side) of mean 0 and standard deviation 1."""
    white = np.random.default_rng(0).standard_normal((side, side))
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    pink = np.fft.irfft2(np.fft.rfft2(white) / frequency, s=(side, side))
    return np.asarray(pink / pink.std())
