"""Figures of one result: how much of the image the edit left alone, and how much it changed where it may.

Pixels are uint8 at the image's own size. A figure is None where it is undefined (no background, no mask, nothing to
compare with). Figures of a background are those of results with a mask alone: without one, how much of the image was
to change is not known, and means over both would tell nothing.

PSNR ends at 100 dB, which is also what equal images get: JSON knows no infinity, a mean over rows stays finite, and
eight-bit pictures closer than that differ by less than one step in one value of 150,000.

Cost: about 25 ms for 512 x 512 on one core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

MAX_PSNR = 100.0
WINDOW = 11  # pixels; with SIGMA the window of Wang et al. 2004
SIGMA = 1.5

NAMES: tuple[str, ...] = (
    "reconstruction_psnr",
    "image_psnr",
    "background_psnr",
    "background_ssim",
    "mask_share",
    "edit_change",
    "rest_change",
)
BAND_VALUES = 12 << 20  # of an image, looked at together: all of one of four megapixels
_THIRDS = np.arange(3 * 255 + 1, dtype=np.float32) / 3  # of the sum of three channels' changes: their mean
STRONGEST = 100  # one pixel in so many is taken for the edit's own: the size of a mouth in a portrait


def figures(
    original: UInt8[np.ndarray, "H W 3"],
    round_trip: UInt8[np.ndarray, "H W 3"] | None,
    edited: UInt8[np.ndarray, "H W 3"],
    mask: Bool[np.ndarray, "H W"] | None,
) -> dict[str, float | None]:
    """Figures of one result, by name (`NAMES`).

    Args:
        original: the input image.
        round_trip: the input through the model's autoencoder and back: the best that any edit in latents can do.
            None where it was not made.
        edited: the result.
        mask: where the edit acted; None where it has no region.

    Returns:
        reconstruction_psnr: of `round_trip` against `original`, dB.
        image_psnr: of `edited` against `original` everywhere, dB.
        background_psnr: of `edited` against `original` outside the mask, dB.
        background_ssim: structural similarity of the same, -1..1.
        mask_share: share of the image inside the mask, 0..1.
        edit_change: mean absolute difference to `round_trip`, 0..255, over the hundredth of the pixels that changed
            most, inside the mask or, without one, anywhere. The mean of all pixels would not tell a small edit from the
            error that an inversion spreads everywhere.
        rest_change: mean absolute difference to `round_trip` outside the mask, 0..255; without a mask that of the
            middle pixel, which an edit of less than half of the image does not move.
    """
    of_change = changes(round_trip, edited, mask)
    reconstruction = None if round_trip is None else psnr(original, round_trip)
    del round_trip  # at 64 megapixels it counts, where the caller has let it go, too
    background = None if mask is None else ~mask
    return {
        "reconstruction_psnr": reconstruction,
        "image_psnr": psnr(original, edited),
        "background_psnr": None if background is None else psnr(original, edited, background),
        "background_ssim": None if background is None else background_ssim(original, edited, background),
        "mask_share": None if mask is None else float(mask.mean()),
        **of_change,
    }


def changes(
    round_trip: UInt8[np.ndarray, "H W 3"] | None,
    edited: UInt8[np.ndarray, "H W 3"],
    mask: Bool[np.ndarray, "H W"] | None,
) -> dict[str, float | None]:
    """`edit_change` and `rest_change` of `figures`: against the round trip, so that its error counts as no change."""
    if round_trip is None:
        return {"edit_change": None, "rest_change": None}
    inside, rest = _counts_of_sums(round_trip, edited, mask)
    return {"edit_change": mean_of_strongest(inside), "rest_change": _median(inside) if mask is None else _mean(rest)}


def _counts_of_sums(
    one: UInt8[np.ndarray, "H W 3"], other: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"] | None
) -> tuple[Int[np.ndarray, "766"], Int[np.ndarray, "766"]]:
    """How many pixels there are of every sum of the three channels' absolute differences: inside the mask, or anywhere
    without one, and in the rest."""
    inside, rest = (np.zeros(3 * 255 + 1, dtype=np.int64) for _ in range(2))
    for band in _bands(one):
        # Channel by channel: three planes are summed in half the time of a sum over the last axis.
        planes = [np.abs(one[band, :, c].astype(np.int16) - other[band, :, c]) for c in range(3)]
        sums = planes[0] + planes[1] + planes[2]
        if mask is None:
            inside += np.bincount(sums.ravel(), minlength=len(inside))
            continue
        inside += np.bincount(sums[mask[band]], minlength=len(inside))
        rest += np.bincount(sums[~mask[band]], minlength=len(rest))
    return inside, rest


def mean_of_strongest(counts: Int[np.ndarray, "766"]) -> float | None:
    """Mean over the largest hundredth of the changes, at least over one; None for no changes."""
    left = -(-int(counts.sum()) // STRONGEST)
    strongest = np.zeros_like(counts)
    for value in range(len(counts) - 1, -1, -1):
        strongest[value] = min(int(counts[value]), left)
        left -= strongest[value]
    return _mean(strongest)


def _mean(counts: Int[np.ndarray, "766"]) -> float | None:
    number = int(counts.sum())
    return float((counts * _THIRDS.astype(np.float64)).sum()) / number if number else None


def _median(counts: Int[np.ndarray, "766"]) -> float:
    number, upto = int(counts.sum()), counts.cumsum()
    middle = [int(np.searchsorted(upto, at, side="right")) for at in ((number - 1) // 2, number // 2)]
    return float(_THIRDS[middle].mean())


def psnr(
    one: UInt8[np.ndarray, "*shape"],
    other: UInt8[np.ndarray, "*shape"],
    where: Bool[np.ndarray, "*pixels"] | None = None,
) -> float | None:
    """Peak signal-to-noise ratio in dB, at most `MAX_PSNR`, of all pixels or of those `where`; None for no pixels.

    Some lines of numpy instead of torchmetrics, whose import costs every worker several seconds; a test compares them.
    """
    total, number = 0.0, 0
    for band in _bands(one):
        a, b = one[band], other[band]
        if where is not None:
            a, b = a[where[band]], b[where[band]]
        total += float(np.square(a.astype(np.float32) - b).sum(dtype=np.float64))  # of whole numbers: exact
        number += a.size
    if not number:
        return None
    return MAX_PSNR if total == 0 else min(10.0 * math.log10(255.0**2 / (total / number)), MAX_PSNR)


def _bands(image: np.ndarray) -> Iterator[slice]:
    """Rows that are looked at together: an image of 64 megapixels takes a gigabyte in float32. What is summed over them
    are whole numbers, so that bands of any size give the same bits."""
    rows = max(1, BAND_VALUES // 4 // max(1, image[:1].size))
    return (slice(top, top + rows) for top in range(0, len(image), rows))


def background_ssim(
    original: UInt8[np.ndarray, "H W 3"], edited: UInt8[np.ndarray, "H W 3"], background: Bool[np.ndarray, "H W"]
) -> float | None:
    """Mean structural similarity over the windows centred in the background; None where there is none.

    The edit's inside is replaced by the original first: a window that reaches across the mask's edge judges only the
    pixels outside. Images smaller than one window have no such figure.
    """
    half = WINDOW // 2
    centres = background[half:-half, half:-half]
    if min(background.shape) < WINDOW or not centres.any():
        return None
    totals = [0.0, 0.0, 0.0]
    rows = max(1, BAND_VALUES // (3 * background.shape[1]))
    for top in range(0, len(centres), rows):
        some = slice(top, top + rows + 2 * half)  # the windows reach beyond the band
        outside = np.where(background[some, :, None], edited[some], original[some])
        inside = centres[top : top + rows]
        for c in range(3):
            # Channel by channel: a plane of a megabyte stays in the processor's cache, an interleaved picture does not.
            totals[c] += float(ssim_map(original[some, :, c], outside[..., c])[inside].sum(dtype=np.float64))
    number = int(centres.sum())
    return float(np.mean([total / number for total in totals]))


def ssim_map(one: UInt8[np.ndarray, "H W"], other: UInt8[np.ndarray, "H W"]) -> Float[np.ndarray, "H-10 W-10"]:
    """Structural similarity (Wang et al. 2004) of one channel in every whole Gaussian window of 11 x 11 pixels.

    torchmetrics has the same map, but runs the window as one two-dimensional convolution: 170 ms for 512 x 512, more
    than ten times the two one-dimensional passes here.
    """
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    # Variances do not change with an offset, and squares of centred values keep more of their digits in float32.
    x, y = one.astype(np.float32) - 128, other.astype(np.float32) - 128
    mean_x, mean_y = blurred(x), blurred(y)
    covariance = blurred(x * y) - mean_x * mean_y
    variances = blurred(x * x + y * y) - mean_x**2 - mean_y**2
    mean_x += 128
    mean_y += 128
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


def blurred(field: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H-10 W-10"]:
    """Gaussian mean over the whole windows, one axis after the other; the kernel is symmetric, so weights pair up."""
    half = WINDOW // 2
    weights = [math.exp(-0.5 * (offset / SIGMA) ** 2) for offset in range(half + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    for axis in (0, 1):
        length = field.shape[axis] - 2 * half
        across = [field[at : at + length] if axis == 0 else field[:, at : at + length] for at in range(WINDOW)]
        out = across[half] * np.float32(weights[0] / total)
        for offset in range(1, half + 1):
            pair = across[half - offset] + across[half + offset]
            pair *= np.float32(weights[offset] / total)
            out += pair
        field = out
    return field
