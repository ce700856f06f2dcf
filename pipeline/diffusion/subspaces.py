"""Geometry of subspaces: bases by iteration, angles and distances, transport, means and spectra of their vectors.

The pullback metric of a map h has the norm |J v|; its basis at x are the right singular vectors of J (Park et al.,
arXiv 2307.12868, section 3). Here a basis is a pair of row sets: V, orthonormal in the space of x, and U = J V / S in
that of h. Vectors are rows; the sign of a pair means nothing, and is fixed so that it is stored in one way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Leading(NamedTuple):
    """Leading singular vectors of a Jacobian, strongest first: J v_k = s_k u_k."""

    tangents: Tensor  # V (n, D), orthonormal rows
    stretches: Tensor  # S (n,), descending
    features: Tensor  # U (n, M), orthonormal rows


def orthonormal(rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Orthonormal rows that span the same; n is at most D."""
    return torch.linalg.qr(rows.mT).Q.mT


def improved(pulled: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"]]:
    """The end of one step of subspace iteration: next rows V and their S, of J^T J V."""
    _, squared, rows = torch.linalg.svd(pulled, full_matrices=False)
    return rows, squared.sqrt()


def finished(tangents: Float[Tensor, "n D"], pushed: Float[Tensor, "n M"], keep: int) -> Leading:
    """Rayleigh-Ritz: the best singular vectors that a subspace holds, so that J v_k = s_k u_k to rounding.

    Args:
        tangents: V, orthonormal.
        pushed: J V.
        keep: how many, at most n.
    """
    mixing, stretches, features = torch.linalg.svd(pushed, full_matrices=False)
    turned, features = with_fixed_signs((mixing.mT @ tangents)[:keep], features[:keep])
    return Leading(turned, stretches[:keep], features)


def with_fixed_signs(
    tangents: Float[Tensor, "n D"], features: Float[Tensor, "n M"]
) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n M"]]:
    """Both of a pair turned round where the largest entry of the first is negative: a pair turned round is the same."""
    largest = tangents.abs().argmax(dim=1, keepdim=True)
    signs = torch.where(tangents.gather(1, largest) < 0, -1.0, 1.0).to(tangents)
    return tangents * signs, features * signs


def principal_angles(one: Float[Tensor, "n D"], other: Float[Tensor, "m D"]) -> Float[Tensor, "k"]:
    """Angles between the spans of orthonormal rows, ascending, in radians; as many as the smaller one has.

    By sine and cosine: the arc cosine alone loses half of the digits near 0.
    """
    if len(one) > len(other):
        one, other = other, one
    products = one @ other.mT  # (n, m)
    cosines = torch.linalg.svdvals(products)  # descending
    sines = torch.linalg.svdvals(one - products @ other).flip(0)
    return torch.atan2(sines, cosines)


def geodesic_distance(one: Float[Tensor, "n D"], other: Float[Tensor, "m D"]) -> float:
    """Distance on the Grassmann manifold: the length of the principal angles, 0 to sqrt(n) pi / 2."""
    return float(principal_angles(one, other).square().sum().sqrt())


def largest_sine(one: Float[Tensor, "n D"], other: Float[Tensor, "n D"]) -> float:
    """Of the angles between two spans: 0 equal, 1 where a direction of one is orthogonal to all of the other."""
    return math.sin(float(principal_angles(one, other).max()))


class Transported(NamedTuple):
    """A direction carried to another sample."""

    direction: Tensor  # (D,), unit length
    kept: float  # share of the feature direction that the other sample's basis holds, 0..1


def transported(feature: Float[Tensor, "M"], basis: Leading) -> Transported:
    """Parallel transport of a unit feature direction into the tangents of another sample's basis (section 4.2).

    Where nothing is kept the direction is zero.
    """
    coordinates = basis.features @ feature
    carried = basis.tangents.mT @ coordinates
    kept = float(coordinates.norm())
    return Transported(carried / kept if kept > 0.0 else carried, kept)


def mean_directions(bases: Float[Tensor, "B n M"], keep: int) -> Float[Tensor, "keep M"]:
    """The extrinsic mean of B subspaces: leading eigenvectors of the sum of their projectors, strongest first."""
    _, _, rows = torch.linalg.svd(bases.flatten(0, 1), full_matrices=False)
    return with_fixed_signs(rows[:keep], rows[:keep])[0]


def power_spectrum(vectors: Float[Tensor, "n C h w"]) -> Float[Tensor, "bins"]:
    """Share of the vectors' power by spatial frequency: bins of whole radii, from 0; they add up to 1.

    Radii are in cycles per side; for sides of unequal length, per the longer one.
    """
    height, width = vectors.shape[-2:]
    power = torch.fft.fft2(vectors.double(), norm="ortho").abs().square().sum(dim=(0, 1))
    longer = max(height, width)
    rows = torch.fft.fftfreq(height, dtype=torch.float64) * longer
    columns = torch.fft.fftfreq(width, dtype=torch.float64) * longer
    radii = torch.hypot(rows[:, None], columns[None, :]).round().long()
    sums = torch.zeros(int(radii.max()) + 1, dtype=torch.float64).index_add(0, radii.flatten(), power.flatten())
    return sums / sums.sum()
