"""Where an edit may act: masks from cross-attention and from the strength of a direction (LEDITS++, section 3.3).

Every threshold is a quantile of one image's one concept; nothing here is ever shared by a batch. It is taken over the
image alone, without the padding around it (`of_image`), and holds in the padding, too: what reaches an edge goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, max_pool2d, pad

OfImage = Callable[[Tensor], Tensor]
"""Cuts maps (..., h, w), of whatever size, to the part that shows the image: `Source.of_image`."""


def everything(maps: Tensor) -> Tensor:
    """The maps of an image that fills its canvas."""
    return maps


def strongest_region(
    scores: Float[Tensor, "E h w"], thresholds: Float[Tensor, "E"], over: Float[Tensor, "E ih iw"] | None = None
) -> Bool[Tensor, "E h w"]:
    """Keep, for each of E score maps, the (1 - threshold) share of positions with the highest scores.

    The threshold is the linearly interpolated quantile, in the precision of the scores; of all of them, or of `over`.
    """
    flat = (scores if over is None else over).flatten(1)
    quantiles = torch.stack(
        [quantile_of(row, float(share)) for row, share in zip(flat, thresholds.to(flat), strict=True)]
    )
    return scores >= quantiles[:, None, None]


def quantile_of(values: Float[Tensor, "N"], share: float) -> Float[Tensor, ""]:
    """The linearly interpolated quantile of N numbers, in their precision: `torch.quantile`'s bits, without its sort.

    Two neighbours in order are found by selection, which takes a third of the time for a map of latents.
    """
    if values.isnan().any():
        return values.new_tensor(math.nan)
    rank = values.new_tensor(share) * (len(values) - 1)
    below, above = int(rank), math.ceil(rank)
    first, second = (values.kthvalue(place + 1).values for place in (below, above))
    return torch.lerp(first, second, rank - below)


def smooth_attention(attention: Float[Tensor, "E h w"]) -> Float[Tensor, "E h w"]:
    """Blur with the 3 x 3 kernel of the maintained implementation, borders reflected.

    It is named sigma 0.5 there, but divides by 2 sigma rather than by 2 sigma squared: exp(-1) beside 1.
    """
    edge = math.exp(-1.0)
    row = torch.tensor([edge, 1.0, edge], dtype=attention.dtype, device=attention.device)
    kernel = torch.outer(row, row)
    kernel = (kernel / kernel.sum())[None, None]
    # A map that is one cell wide has nothing to reflect: the cell itself stands on both sides of it.
    rows, columns = ("reflect" if length > 1 else "replicate" for length in attention.shape[-2:])
    framed = pad(pad(attention[:, None], (1, 1, 0, 0), mode=columns), (0, 0, 1, 1), mode=rows)
    return conv2d(framed, kernel)[:, 0]


def attention_mask(
    attention: Float[Tensor, "E gh gw"],
    thresholds: Float[Tensor, "E"],
    size: tuple[int, int],
    of_image: OfImage = everything,
) -> Bool[Tensor, "E h w"]:
    """Mask M1: where a concept's tokens are attended to most, brought to the latents' (h, w) without interpolation."""
    # The image is smoothed by itself for its threshold: its edge is then reflected, as a canvas's is.
    region = strongest_region(smooth_attention(attention), thresholds, smooth_attention(of_image(attention)))
    return interpolate(region[:, None].to(attention.dtype), size=size, mode="nearest")[:, 0] > 0.5


def noise_mask(
    directions: Float[Tensor, "E C h w"], thresholds: Float[Tensor, "E"], of_image: OfImage = everything
) -> Bool[Tensor, "E h w"]:
    """Mask M2: where a concept's direction is strongest, magnitudes summed over channels."""
    strength = directions.abs().sum(dim=1)
    return strongest_region(strength, thresholds, of_image(strength))


def change_of_data(directions: Float[Tensor, "E C h w"]) -> Float[Tensor, "E h w"]:
    """The power by which directions move the prediction of the clean latents, given as their data halves; blurred.

    In these units the noisy steps, which lay an object out, weigh more than the last ones, which work at edges
    everywhere; and so do, squared, strong places.
    """
    power = directions.square().sum(dim=1)
    return smooth_attention(smooth_attention(power))


def above_average(maps: Float[Tensor, "E h w"], ratio: float, of_image: OfImage = everything) -> Bool[Tensor, "E h w"]:
    """Keep what exceeds `ratio / 2` times the mean of each of E maps, all at least 0; nothing of a map of zeros.

    Cutting a map off at `ratio` times its mean and taking half of that for the threshold (DiffEdit, arXiv 2210.11427,
    as its maintained implementation does) is this; so is, for ratio 2, taking what is positive after normalisation.
    """
    return maps > ratio / 2 * of_image(maps).mean(dim=(1, 2), keepdim=True)


def dilated(mask: Bool[Tensor, "h w"], passes: int) -> Bool[Tensor, "h w"]:
    """Grow a mask by its eight neighbours, `passes` times."""
    grown = mask[None, None].float()
    for _ in range(passes):
        grown = max_pool2d(grown, 3, stride=1, padding=1)
    return grown[0, 0] > 0.5


def otsu_threshold(values: Float[Tensor, "N"]) -> float:
    """The value above which the upper of two classes begins: the variance between these is largest (Otsu 1979).

    Of all splits of the sorted values; of equally good ones the first. Of equal values, nothing lies above.
    """
    ordered = values.double().sort().values
    count = torch.arange(1, len(ordered), dtype=torch.float64)  # of the lower class
    sums = ordered.cumsum(0)
    lower, upper = sums[:-1] / count, (sums[-1] - sums[:-1]) / (len(ordered) - count)
    between = count * (len(ordered) - count) * (upper - lower).square()
    between[ordered[1:] == ordered[:-1]] = 0.0  # no threshold divides equal values
    if len(between) == 0 or not bool((between > 0).any()):
        return float(ordered[-1])
    return float(ordered[int(between.argmax())])


def above_otsu(scores: Float[Tensor, "E h w"], of_image: OfImage = everything) -> Bool[Tensor, "E h w"]:
    """Keep, of each of E score maps, the upper one of the two classes that its values in the image fall into."""
    thresholds = [otsu_threshold(of_image(one).flatten()) for one in scores]
    return scores > torch.tensor(thresholds, dtype=torch.float64)[:, None, None].to(scores)


def with_soft_edge(mask: Bool[Tensor, "H W"], radius: int) -> Float[Tensor, "H W"]:
    """1 in a mask, falling to 0 over twice the radius around it, for compositing.

    The mask, widened by the radius, under a mean over squares that reach as far.
    """
    soft = mask[None, None].float()
    for across in ((0, radius), (radius, 0)):  # one way, then the other: squares, at the cost of lines
        soft = max_pool2d(soft, (1 + 2 * across[0], 1 + 2 * across[1]), stride=1, padding=across)
    for across in ((0, radius), (radius, 0)):
        lines = (1 + 2 * across[0], 1 + 2 * across[1])
        soft = avg_pool2d(soft, lines, stride=1, padding=across, count_include_pad=False)
    return soft[0, 0]


def blended(
    over: UInt8[Tensor, "H W 3"], under: UInt8[Tensor, "H W 3"], share: Float[Tensor, "H W"]
) -> UInt8[Tensor, "H W 3"]:
    """A picture laid over another, of which it takes a share in [0, 1] at each pixel."""
    weights = share[..., None]
    return (weights * over + (1.0 - weights) * under).round().clamp(0, 255).to(torch.uint8)


def softly_eroded(
    mask: Float[Tensor, "H W"], size: int = 13, passes: int = 7, threshold: float = 0.9
) -> Float[Tensor, "H W"]:
    """Shrink a mask in [0, 1] and let its edge fall off, for compositing (h-Edit's face recipe, arXiv 2503.02187).

    Each pass takes the smaller of the mask and its mean under a cone of `size` x `size` pixels; the last one is the
    mean alone. What reaches the threshold is 1, what does not is scaled by the largest such value. Nowhere does it
    exceed the mask.
    """
    radius = size // 2
    offsets = torch.arange(-radius, radius + 1, dtype=mask.dtype)
    distance = (offsets[:, None].square() + offsets.square()).sqrt()
    cone = distance.max() - distance
    cone = (cone / cone.sum())[None, None]
    soft = mask[None, None]
    for _ in range(passes - 1):
        soft = torch.minimum(soft, conv2d(soft, cone, padding=radius))
    soft = conv2d(soft, cone, padding=radius)[0, 0]
    inside = soft >= threshold
    below = torch.where(inside, torch.zeros_like(soft), soft)
    scaled = below / below.amax().clamp_min(torch.finfo(mask.dtype).tiny)
    return torch.minimum(torch.where(inside, torch.ones_like(soft), scaled), mask)
