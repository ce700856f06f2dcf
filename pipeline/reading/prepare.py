"""From a sample to what the engine edits: pixels at model size, the user's mask, the requests. And the way back.

    crop      the centred square, scaled to size x size; what is outside stays the original's
    pad       scaled to fit size x size, edges replicated around it
    stretch   scaled to size x size, whatever the shape
    bucket    about size * size pixels in the image's own shape; sides become multiples of what the model needs

An image that needs no scaling keeps its very pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from pipeline.errors import DecodeError, PrepareError
from pipeline.reading.decode import Picture
from pipeline.reading.decoder import Decodes, DecodesHere
from pipeline.recipe import Recipe, parse_edits
from pipeline.records import EditRequest, Placement, Prepared, Sample

MAX_PROMPT = 2000  # characters of a caption that become a prompt; a text encoder reads about 300
MAX_ASPECT = 16  # a bucket's longer side over its shorter: beyond it, nothing of the image would be left

HERE = DecodesHere()
BUCKET_AREA = 0.1  # an image that is a bucket already keeps its pixels: by how much its area may differ


def prepare(sample: Sample, recipe: Recipe, *, size: int, multiple: int, decoder: Decodes = HERE) -> Prepared:
    """Decode a sample, bring it to model size, and find out what to change in it.

    Args:
        sample: as read.
        recipe: the run's.
        size: side of the model's square, or of the square with the bucket's area, in pixels.
        multiple: what both sides must be multiples of.
        decoder: of the image and the mask.

    Raises:
        DecodeError: the bytes are no image that may be opened, or take too much to decode.
        PrepareError: no usable edit, a mask of another shape, or a size that the model cannot take.
    """
    return prepare_picture(sample, sample.image, sample.mask, recipe, size=size, multiple=multiple, decoder=decoder)


def prepare_picture(
    sample: Sample,
    image: Picture,
    mask: Picture | None,
    recipe: Recipe,
    *,
    size: int,
    multiple: int,
    decoder: Decodes = HERE,
) -> Prepared:
    """`prepare` for an image and a mask that do not stand in the sample as bytes."""
    requests = requests_of(sample, recipe)
    original, orientation = decoder.image(image, recipe.source.max_pixels)
    placement = place((original.shape[0], original.shape[1]), recipe.model.fit, size=size, multiple=multiple)
    user_mask = None
    if mask is not None:
        try:
            user_mask = decoder.mask(mask, recipe.source.max_pixels, orientation, placement.original)
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
        requests=requests,
    )


def requests_of(sample: Sample, recipe: Recipe) -> dict[str, EditRequest]:
    """What to change in an image, by edit name: the row's own requests, else the job's.

    Raises:
        PrepareError: the row's request cannot be understood, or there is none at all.
    """
    if sample.edits is not None:
        requests = parse_edits(sample.edits, f"the row's '{recipe.source.edit}'", recipe.source.max_row_concepts)
    else:
        requests = dict(recipe.edits)
    if not requests:
        raise PrepareError(
            f"no usable edit: the row has none under '{recipe.source.edit}', and the recipe has no edits. "
            "Give one of them"
        )
    caption = sample.caption.strip()[:MAX_PROMPT].strip()
    if not recipe.source.caption_is_source_prompt or not caption:
        return requests
    return {
        name: request if request.source_prompt else request.model_copy(update={"source_prompt": caption})
        for name, request in requests.items()
    }


def place(
    original: tuple[int, int], fit: Literal["crop", "pad", "stretch", "bucket"], *, size: int, multiple: int
) -> Placement:
    """Where an image of (height, width) goes on the model's canvas.

    Raises:
        PrepareError: `size` is not a multiple of `multiple`, or the shape is too long for a bucket.
    """
    height, width = original
    if fit != "bucket" and size % multiple:
        raise PrepareError(f"model.size {size} is not a multiple of {multiple}, which the model needs")
    canvas = scaled = (size, size)
    crop = (0, 0, height, width)
    offset = (0, 0)
    if fit == "crop":
        side = min(height, width)
        crop = ((height - side) // 2, (width - side) // 2, side, side)
    elif fit == "pad":
        scale = size / max(height, width)
        scaled = (max(1, round(height * scale)), max(1, round(width * scale)))
        offset = ((size - scaled[0]) // 2, (size - scaled[1]) // 2)
    elif fit == "bucket":
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise PrepareError(
                f"an image of {height} x {width} is too long for model.fit bucket (at most {MAX_ASPECT}:1). "
                "Use pad or crop"
            )
        canvas = scaled = _bucket(height, width, size, multiple)
    return Placement(original=original, crop=crop, scaled=scaled, offset=offset, canvas=canvas)


def _bucket(height: int, width: int, size: int, multiple: int) -> tuple[int, int]:
    fits = height % multiple == 0 and width % multiple == 0
    if fits and abs(height * width / size**2 - 1) <= BUCKET_AREA:
        return height, width
    aspect = math.sqrt(height / width)
    return _to_multiple(size * aspect, multiple), _to_multiple(size / aspect, multiple)


def apply(original: UInt8[np.ndarray, "H W 3"], placement: Placement) -> UInt8[np.ndarray, "h w 3"]:
    """Bring an image to the model's canvas; padding repeats the edge."""
    top, left, height, width = placement.crop
    scaled = _resize(original[top : top + height, left : left + width], placement.scaled, Image.Resampling.LANCZOS)
    return np.pad(scaled, (*_padding(placement), (0, 0)), mode="edge")


def restore(
    edited: UInt8[np.ndarray, "h w 3"], placement: Placement, original: UInt8[np.ndarray, "H W 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Bring an edited canvas back to the original's size: the inverse of `apply`. Outside a crop, `original` stays."""
    _check(edited.shape[:2], placement.canvas, "canvas")
    _check(original.shape[:2], placement.original, "original")
    top, left, height, width = placement.crop
    result = original.copy()
    inside = _resize(_cut(edited, placement), (height, width), Image.Resampling.LANCZOS)
    result[top : top + height, left : left + width] = inside
    return result


def restore_mask(mask: Bool[np.ndarray, "h w"], placement: Placement) -> Bool[np.ndarray, "H W"]:
    """Bring a canvas mask back to the original's size: a pixel is in it where at least half of its area is."""
    _check(mask.shape, placement.canvas, "canvas")
    top, left, height, width = placement.crop
    result = np.zeros(placement.original, dtype=np.bool_)
    inside = _resize(_cut(mask, placement).astype(np.uint8) * 255, (height, width), Image.Resampling.BOX)
    result[top : top + height, left : left + width] = inside >= 128
    return result


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
        mask = _resize(mask, size, Image.Resampling.BOX)
    return mask


def _canvas_mask(mask: UInt8[np.ndarray, "H W"], placement: Placement) -> Float[np.ndarray, "h w"]:
    """The user's mask on the canvas, in [0, 1]; zero in the padding, where nobody asked for an edit."""
    top, left, height, width = placement.crop
    kept = mask[top : top + height, left : left + width]
    if mask.any() and not kept.any():
        raise PrepareError(
            "the mask lies outside of the square that model.fit crop keeps, where nothing is edited. Set model.fit: pad"
        )
    scaled = _resize(kept, placement.scaled, Image.Resampling.BOX)
    return np.pad(scaled, _padding(placement)).astype(np.float32) / 255.0


def _resize(pixels: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    """(H, W, ...) uint8 at (height, width); the same pixels where the size is the same."""
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((size[1], size[0]), method))


def _cut(canvas: np.ndarray, placement: Placement) -> np.ndarray:
    (top, left), (height, width) = placement.offset, placement.scaled
    return canvas[top : top + height, left : left + width]


def _padding(placement: Placement) -> tuple[tuple[int, int], tuple[int, int]]:
    (top, left), (height, width), canvas = placement.offset, placement.scaled, placement.canvas
    return (top, canvas[0] - height - top), (left, canvas[1] - width - left)


def _to_multiple(length: float, multiple: int) -> int:
    return max(1, round(length / multiple)) * multiple


def _check(shape: tuple[int, ...], expected: tuple[int, int], what: str) -> None:
    if tuple(shape) != expected:
        raise ValueError(f"the {what} is {tuple(shape)}, the placement was made for {expected} (height, width)")
