"""From a row and what is asked of it to what the engine edits: pixels at model size, and the user's mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from pipeline.errors import DecodeError, PrepareError
from pipeline.reading.decode import Picture
from pipeline.reading.decoder import Decodes, DecodesHere
from pipeline.reading.placement import apply, padding, place, resize
from pipeline.recipe import Recipe
from pipeline.records import Asked, Placement, Prepared

HERE = DecodesHere()
GREY = 127  # of a canvas that stands for no image


@dataclass(frozen=True, slots=True)
class Pictures:
    """An image and the user's mask, as they came."""

    image: Picture
    mask: Picture | None


def prepare(
    asked: Asked,
    recipe: Recipe,
    *,
    size: int,
    multiple: int,
    decoder: Decodes = HERE,
    pictures: Pictures | None = None,
) -> Prepared:
    """Decode a row's image and mask, and bring them to model size.

    Args:
        asked: the row; not one that is refused.
        recipe: the run's.
        size: side of the model's square, or of the square with the bucket's area, in pixels.
        multiple: what both sides must be multiples of.
        decoder: of the image and the mask.
        pictures: where they do not stand in the row as bytes.

    Raises:
        DecodeError: the bytes are no image that may be opened, or take too much to decode.
        PrepareError: a mask of another shape, or a size that the model cannot take.
    """
    sample = asked.sample
    if sample.blank:
        return _blank(asked, recipe, size, multiple)
    given = pictures or Pictures(sample.image, sample.mask)
    original, orientation = decoder.image(given.image, recipe.source.max_pixels)
    placement = place((original.shape[0], original.shape[1]), recipe.model.fit, size=size, multiple=multiple)
    user_mask = None
    if given.mask is not None:
        try:
            user_mask = decoder.mask(given.mask, recipe.source.max_pixels, orientation, placement.original)
        except DecodeError as error:
            raise PrepareError(f"{error}") from error
        user_mask = _at_image_size(user_mask, placement.original)
    return Prepared(
        sample=sample,
        original=original,
        pixels=apply(original, placement),
        placement=placement,
        mask=None if user_mask is None else _canvas_mask(user_mask, placement),
        allowed=None if user_mask is None else user_mask >= 128,
        requests=asked.requests,
        attempt=asked.attempt,
        only=asked.only,
    )


def _blank(asked: Asked, recipe: Recipe, size: int, multiple: int) -> Prepared:
    """A row that brings no image: a grey canvas of the model's size.

    Raises:
        PrepareError: an inversion of the recipe would invert it.
    """
    for method in recipe.all_methods.values():
        if "path" in method.inversion.provides:
            raise PrepareError(
                f"the row brings no image, and inversion.method '{method.inversion.method}' inverts one. Set "
                "inversion.method: noise, or give the set an anchor_image"
            )
    side = -(-size // multiple) * multiple
    whole = (side, side)
    placement = Placement(original=whole, crop=(0, 0, side, side), scaled=whole, offset=(0, 0), canvas=whole)
    canvas = np.full((side, side, 3), GREY, dtype=np.uint8)
    return Prepared(
        sample=asked.sample,
        original=canvas,
        pixels=canvas,
        placement=placement,
        mask=None,
        allowed=None,
        requests=asked.requests,
        attempt=asked.attempt,
        only=asked.only,
    )


def _at_image_size(mask: UInt8[np.ndarray, "h w"], size: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
    """The user's mask at the image's (height, width)."""
    if mask.shape != size:
        # Of the same shape at another scale is fine; a pixel of rounding in its smaller side is, too.
        height, width = mask.shape
        if abs(height * size[1] - width * size[0]) > max(size):
            raise PrepareError(
                f"the mask is {height} x {width}, the image {size[0]} x {size[1]} (height x width): not the same "
                "shape. Draw the mask at the image's size"
            )
        mask = resize(mask, size, Image.Resampling.BOX)
    return mask


def _canvas_mask(mask: UInt8[np.ndarray, "H W"], placement: Placement) -> Float[np.ndarray, "h w"]:
    """The user's mask on the canvas, in [0, 1]; zero in the padding, where nobody asked for an edit."""
    top, left, height, width = placement.crop
    kept = mask[top : top + height, left : left + width]
    if mask.any() and not kept.any():
        raise PrepareError(
            "the mask lies outside of the square that model.fit crop keeps, where nothing is edited. Set model.fit: pad"
        )
    scaled = resize(kept, placement.scaled, Image.Resampling.BOX)
    return np.pad(scaled, padding(placement)).astype(np.float32) / 255.0
