"""Where a subject is, and which places of two images show the same of it (ConsiStory, arXiv 2402.03286).

Masks come from cross-attention (section 4.1), correspondences from features of the decoder, as DIFT has them (Tang et
al., arXiv 2306.03881). B images, P = h w places of a map, row by row; nothing here is shared between images but what
is said to be compared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, normalize

OTSU_BINS = 256
LEAST = 1e-12  # attention whose logarithm is taken: less is as good as none
OUTSIDE = 2.0  # the largest cosine distance: of places that are not of the subject


def otsu_threshold(values: Float[Tensor, "*shape"]) -> float:
    """The value that parts numbers into two groups of least variance within (Otsu, 1979).

    Of a histogram of 256 bins the centre of one, as scikit-image has it: above it is the upper group. Equal numbers
    are their own threshold, and none is above it.
    """
    flat = values.detach().double().flatten()
    low, high = float(flat.min()), float(flat.max())
    if low == high:
        return low
    edges = torch.linspace(low, high, OTSU_BINS + 1, dtype=torch.float64)
    bins = torch.bucketize(flat, edges, right=True).clamp(1, OTSU_BINS) - 1  # the last bin holds its upper edge
    counts = torch.bincount(bins, minlength=OTSU_BINS).double()
    centres = (edges[1:] + edges[:-1]) / 2
    below, above = counts.cumsum(0), counts.flip(0).cumsum(0).flip(0)
    sums = counts * centres
    mean_below = sums.cumsum(0) / below
    mean_above = sums.flip(0).cumsum(0).flip(0) / above
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return float(centres[int(between.argmax())])


def subject_mask(
    maps: Float[Tensor, "S mh mw"], size: tuple[int, int], *, logarithm: bool = False
) -> Bool[Tensor, "h w"]:
    """Where any of S tokens is attended to: each map, brought to `size`, above its own threshold. False without any.

    With `logarithm` the threshold is that of the map's logarithm: where nearly all attention is elsewhere, a token's
    own is so small and so uneven that few places make up a group of their own, and all others the second one.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    if len(maps) == 0:
        return mask
    for resized in interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]:
        values = resized.clamp_min(LEAST).log() if logarithm else resized
        mask |= values > otsu_threshold(values)
    return mask


def thinned(mask: Bool[Tensor, "*shape"], uniform: Float[Tensor, "*shape"], dropout: float) -> Bool[Tensor, "*shape"]:
    """A mask without the places whose number, from 0 to 1, lies below `dropout` (section 4.2)."""
    return mask & (uniform >= dropout)


def smoothed(features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
    """Blurred by a Gaussian of sigma 1, cut to 3 x 3 places, with zeros around the map."""
    row = torch.exp(-0.5 * torch.tensor([-1.0, 0.0, 1.0], dtype=features.dtype) ** 2)
    kernel = torch.outer(row, row)
    channels = features.shape[1]
    weight = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
    return conv2d(features, weight, padding=1, groups=channels)


class Nearest(NamedTuple):
    """For every place of a target its most similar place of a source."""

    places: Tensor  # (P,) integers
    distances: Tensor  # (P,) 1 - cosine, or `OUTSIDE` where the source's mask is empty


def nearest_places(
    target: Float[Tensor, "C P"], source: Float[Tensor, "C P"], source_mask: Bool[Tensor, "P"]
) -> Nearest:
    """For every place of a target the place inside a source's mask whose features are most like its own."""
    distances = 1.0 - normalize(target, dim=0).mT @ normalize(source, dim=0)  # (P, P)
    nearest = distances.masked_fill(~source_mask, OUTSIDE).min(dim=1)
    return Nearest(nearest.indices, nearest.values)


class Matches(NamedTuple):
    """For every place of B images the place of another image that it takes after."""

    images: Tensor  # (B, P) which other image
    places: Tensor  # (B, P) which of its places
    distances: Tensor  # (B, P); infinite where an image has nobody to take after


def best_matches(
    places: Int[Tensor, "B B P"], distances: Float[Tensor, "B B P"], reads: Bool[Tensor, "B B"]
) -> Matches:
    """Of the nearest places in all images those of the image that is nearest, place by place (section 4.3).

    Args:
        places: [i, j] of image i in image j.
        distances: of these.
        reads: [i, j], whether image i takes after image j; nobody takes after itself.
    """
    others = reads & ~torch.eye(len(reads), dtype=torch.bool)
    best = distances.masked_fill(~others[:, :, None], float("inf")).min(dim=1)
    chosen = places.gather(1, best.indices[:, None])[:, 0]
    return Matches(best.indices, chosen, best.values)


def taken_shares(matches: Matches, masks: Bool[Tensor, "B P"], strength: float) -> Float[Tensor, "B P"]:
    """How much each place takes of its match: `strength` inside the subject where the two are alike, 0 elsewhere.

    Alike are distances below the image's own Otsu threshold of all its distances.
    """
    shares = torch.zeros_like(matches.distances)
    for image, distances in enumerate(matches.distances):
        if bool(torch.isfinite(distances).all()):
            alike = distances < otsu_threshold(distances)
            shares[image] = strength * (alike & masks[image])
    return shares


def correspondences(
    features: Float[Tensor, "B C fh fw"],
    masks: Bool[Tensor, "B h w"],
    reads: Bool[Tensor, "B B"],
) -> tuple[Int[Tensor, "B B P"], Float[Tensor, "B B P"]]:
    """Nearest places and their distances between the images that read each other; 0 and infinite between the others.

    Features are brought to the masks' size first.
    """
    count, (height, width) = len(features), masks.shape[1:]
    at_size = interpolate(features, size=(height, width), mode="bilinear", align_corners=False).flatten(2)
    places = torch.zeros((count, count, height * width), dtype=torch.int64)
    distances = torch.full(places.shape, float("inf"), dtype=features.dtype)
    for image in range(count):
        for other in range(count):
            if reads[image, other] and image != other:
                found = nearest_places(at_size[image], at_size[other], masks[other].flatten())
                places[image, other], distances[image, other] = found
    return places, distances
