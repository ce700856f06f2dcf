"""Reads the attributes of a drawn face back from an image, knowing the world but no model.

Analysis by drawing: of all scenes, find the one whose drawing is closest to the image. Attributes and position are
improved in turn, each value of an attribute being tried, until nothing gets closer. Cost: about 190 drawings of
64 x 64 pixels, 0.11 s on one core. Blurred or slightly misplaced objects are read as what they resemble most; the
remaining distance tells how well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from pipeline.models.demo.world import (
    BACKGROUND_COLORS,
    FACE_COLORS,
    HAT_COLORS,
    RGB,
    Attribute,
    FaceShape,
    Mouth,
    Scene,
    draw,
    edited,
)

SIDE = 64  # pixels of the comparison: half of the image's, so that a shift by a pixel weighs less than an object
FAR = 90.0  # larger distances count as this: one wrong object shall not drag the whole face to itself
STEPS = (0.02, 0.01, 0.004)  # of position and radius, from coarse to fine
ROUNDS = 3

VALUES: dict[Attribute, tuple[str | bool | None, ...]] = {
    "background": tuple(BACKGROUND_COLORS),
    "face_color": tuple(FACE_COLORS),
    "face_shape": get_args(FaceShape),
    "hat": (None, *HAT_COLORS),
    "beard": (False, True),
    "sunglasses": (False, True),
    "mouth": get_args(Mouth),
}


@dataclass(frozen=True, slots=True)
class Match:
    """The scene that resembles an image most, and how far its drawing is from it."""

    scene: Scene
    distance: float  # mean over pixels, 0..`FAR`; below 5 for a clean drawing


def read(image: UInt8[np.ndarray, "H W 3"]) -> dict[Attribute, str | bool | None]:
    """The attributes of the face in a square image of any size."""
    return find(image).scene.attributes()


def find(image: UInt8[np.ndarray, "H W 3"]) -> Match:
    """The scene, position and size included, whose drawing is closest to the image."""
    target = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)).astype(np.float32)
    best = Match(first_guess(target), np.inf)
    for _ in range(ROUNDS):
        before = best.distance
        for name, values in VALUES.items():
            # A square face looks like a larger round one, so a shape is tried in several sizes.
            radii = (0.0, -0.02, 0.02) if name == "face_shape" else (0.0,)
            candidates = [
                replace(edited(best.scene, **{name: value}), radius=best.scene.radius + change)
                for value in values
                for change in radii
            ]
            best = closest(target, best, candidates)
        for step in STEPS:
            best = settled(target, best, step)
        if before - best.distance < 0.01:
            break
    return best_mouth(target, best)


def best_mouth(target: Float[np.ndarray, "side side 3"], best: Match) -> Match:
    """The best mouth, each tried in the place that suits it best.

    A mouth is a few pixels high: with the wrong one the face settles a pixel beside its place, where the right one fits
    no better. So the face settles anew with each.
    """
    for mouth in get_args(Mouth):
        if mouth != best.scene.mouth:
            start = closest(target, Match(best.scene, np.inf), [edited(best.scene, mouth=mouth)])
            for step in STEPS[1:]:
                start = settled(target, start, step)
            best = min(best, start, key=lambda match: match.distance)
    return best


def settled(target: Float[np.ndarray, "side side 3"], best: Match, step: float) -> Match:
    """Move and resize the scene in steps of one length as long as that brings it closer."""
    while True:
        candidates = [
            replace(best.scene, **{name: getattr(best.scene, name) + sign * step})
            for name in ("center_x", "center_y", "radius")
            for sign in (-1, 1)
        ]
        moved = closest(target, best, candidates)
        if moved is best:
            return best
        best = moved


def closest(target: Float[np.ndarray, "side side 3"], best: Match, candidates: list[Scene]) -> Match:
    """The best so far, or a candidate that is closer."""
    for scene in candidates:
        difference = np.abs(draw(scene, SIDE) - target).sum(axis=-1)
        distance = float(np.minimum(difference, FAR).mean())
        if distance < best.distance:
            best = Match(scene, distance)
    return best


def first_guess(target: Float[np.ndarray, "side side 3"]) -> Scene:
    """A plain face in the mean position, its colours read from places that nothing covers."""
    corner = SIDE // 12
    ends = slice(corner), slice(-corner, None)
    corners = np.concatenate([target[y, x].reshape(-1, 3) for y in ends for x in ends])
    nose = target[int(0.54 * SIDE) : int(0.62 * SIDE), int(0.46 * SIDE) : int(0.54 * SIDE)].reshape(-1, 3)
    return Scene(background=nearest(corners, BACKGROUND_COLORS), face_color=nearest(nose, FACE_COLORS))


def nearest(pixels: Float[np.ndarray, "N 3"], colors: dict[str, RGB]) -> str:
    """The colour that is closest to the median of some pixels."""
    median = np.median(pixels, axis=0)
    return min(colors, key=lambda name: float(np.abs(median - colors[name]).sum()))
