"""How far a result is from its input outside of what shall change, as PIE-Bench's tables measure it.

Masked pixels are zero in both pictures and stay in the denominator, so that these figures rise with the mask's size:
that is how the published numbers are made, and they are compared with those. `psnr_unedit_part_area_normalised` alone
divides by the area that is looked at.

SSIM is the mean over the whole windows of 11 x 11, as torchmetrics had it up to 1.2, with which the numbers were made;
today's averages over reflected borders as well, and differs by 0.15 in the printed column.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, UInt8

from pipeline.evaluation.metrics import WINDOW, ssim_map

Pixels = UInt8[np.ndarray, "H W 3"]
Figures = dict[str, float | None]

WHOLE = ("psnr", "mse", "ssim")
UNEDITED = ("psnr_unedit_part", "mse_unedit_part", "ssim_unedit_part", "psnr_unedit_part_area_normalised")


def whole_figures(source: Pixels, result: Pixels) -> Figures:
    """`WHOLE`, of the pictures as they are; PSNR is None where they are equal."""
    error = mean_square(source, result)
    return {"mse": error, "psnr": decibels(error), "ssim": mean_ssim(source, result)}


def unedited_figures(source: Pixels, result: Pixels, region: Bool[np.ndarray, "H W"]) -> Figures:
    """`UNEDITED`: outside of the region that shall change; all None where that is the whole picture.

    Args:
        source: the input.
        result: of its size.
        region: True where the edit shall act.

    Returns:
        mse_unedit_part of values 0..1, over all pixels; psnr_unedit_part in dB of the same, None where it is infinite;
        ssim_unedit_part, -1..1; and the PSNR over the pixels outside alone.
    """
    if region.all():
        return dict.fromkeys(UNEDITED)
    outside = ~region
    kept, made = source * outside[..., None], result * outside[..., None]
    error = mean_square(kept, made)
    return {
        "mse_unedit_part": error,
        "psnr_unedit_part": decibels(error),
        "ssim_unedit_part": mean_ssim(kept, made),
        "psnr_unedit_part_area_normalised": decibels(error / float(outside.mean())),
    }


def mean_square(one: Pixels, other: Pixels) -> float:
    """Mean squared difference of values 0..1, over all of them."""
    difference = one.astype(np.int32) - other
    return float(np.square(difference).sum(dtype=np.int64)) / difference.size / 255.0**2


def decibels(error: float) -> float | None:
    """PSNR of a mean squared error of values 0..1; None for no error: a mean over rows would be infinite."""
    return None if error == 0 else 10.0 * math.log10(1.0 / error)


def mean_ssim(one: Pixels, other: Pixels) -> float | None:
    """Mean structural similarity over the whole windows of all channels; None for pictures smaller than one."""
    if min(one.shape[:2]) < WINDOW:
        return None
    maps = (ssim_map(one[..., channel], other[..., channel]) for channel in range(3))
    return float(np.mean([one_map.mean(dtype=np.float64) for one_map in maps]))


def truth_figures(truth: Pixels, result: Pixels, region: Bool[np.ndarray, "H W"] | None) -> Figures:
    """`truth_psnr`: of a result against the perfect outcome, in dB, inside the region that shall change, or anywhere
    without one; None where they are equal or the region is empty."""
    inside = np.ones(result.shape[:2], dtype=bool) if region is None else region
    if not inside.any():
        return {"truth_psnr": None}
    return {"truth_psnr": decibels(mean_square(truth[inside][:, None], result[inside][:, None]))}


def overlap(mask: Bool[np.ndarray, "H W"] | None, region: Bool[np.ndarray, "H W"]) -> float | None:
    """Intersection over union of a method's own mask with the region that shall change; None without one."""
    if mask is None or not (mask | region).any():
        return None
    return float((mask & region).sum() / (mask | region).sum())


def finite_mean(values: Iterable[float | None]) -> float | None:
    """Mean of the numbers among some values; None where there is none."""
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None
