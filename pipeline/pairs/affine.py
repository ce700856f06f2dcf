"""An affine map between two gray pictures, and how sure it is.

Each Gauss-Newton step solves for the map, and for gain, offset and ramp of the brightness, at once, with the mean of
both pictures' gradients (Benhimane and Malis 2004, "efficient second-order minimisation"): few steps, and less bias by
noise than one picture's own. Coordinates are counted from the pictures' centres, so that a map of one size is that of
another but for its shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, pad

STILL = 0.01  # pixels: a smaller step of every corner ends the search
SETTLED = 0.3  # pixels: a last step below that is a map, if a rough one
OVERLAP = 0.3  # share of the weights that must fall on both pictures
CLUSTER = 16  # pixels: errors within a block of that side are taken for dependent on one another


@dataclass(frozen=True, slots=True)
class Map:
    """Content at x of one picture is at `matrix @ (x, 1)` of the other, both from their centres, in pixels (x, y)."""

    matrix: Float[Tensor, "2 3"]  # float64
    error: float = 0.0  # standard error of the corner that is known worst, pixels; 0: not asked for

    @property
    def dx(self) -> float:
        """Shift to the right, pixels."""
        return float(self.matrix[0, 2])

    @property
    def dy(self) -> float:
        """Shift down, pixels."""
        return float(self.matrix[1, 2])

    @property
    def sx(self) -> float:
        """Scale along the first picture's x axis."""
        return math.hypot(float(self.matrix[0, 0]), float(self.matrix[1, 0]))

    @property
    def sy(self) -> float:
        """Scale across it."""
        return float(torch.linalg.det(self.matrix[:, :2])) / self.sx

    @property
    def rotation(self) -> float:
        """Degrees, clockwise on the screen."""
        return math.degrees(math.atan2(float(self.matrix[1, 0]), float(self.matrix[0, 0])))

    def corner(self, height: int, width: int) -> float:
        """The largest displacement of a corner of a picture of that size, pixels."""
        return _largest_move(self.matrix - identity().matrix, height, width)

    def warp(self, other: Float[Tensor, "h w"]) -> tuple[Float[Tensor, "h w"], Bool[Tensor, "h w"]]:
        """The other picture, laid on the first one, and where it has pixels."""
        height, width = other.shape
        xs, ys = _axes(height, width)
        (a, b, c), (d, e, f) = self.matrix.tolist()
        across = a * xs + b * ys + c
        down = d * xs + e * ys + f
        grid = torch.stack([across * (2 / width), down * (2 / height)], dim=-1)
        sampled = grid_sample(other[None, None], grid[None], padding_mode="border", align_corners=False)[0, 0]
        return sampled, (across.abs() <= (width - 1) / 2) & (down.abs() <= (height - 1) / 2)

    def rescaled(self, before: tuple[int, int], after: tuple[int, int]) -> Map:
        """The same map between pictures of another size (height, width)."""
        scale = torch.tensor([after[1] / before[1], after[0] / before[0]], dtype=torch.float64)
        matrix = self.matrix * scale[:, None]
        matrix[:, :2] /= scale
        return Map(matrix)


def identity() -> Map:
    """Everything is where it was."""
    return Map(torch.eye(2, 3, dtype=torch.float64))


def scaling(scale: float, shift: tuple[float, float] = (0.0, 0.0)) -> Map:
    """A zoom, and a shift (x, y) in pixels."""
    return Map(torch.tensor([[scale, 0, shift[0]], [0, scale, shift[1]]], dtype=torch.float64))


def refine(
    one: Float[Tensor, "h w"],
    other: Float[Tensor, "h w"],
    weight: Float[Tensor, "h w"],
    start: Map,
    steps: int,
    *,
    with_error: bool = False,
) -> Map | None:
    """The map near `start` that lays `other` on `one` best, where `weight` is.

    Args:
        one: smooth, 0..1.
        other: of the same size.
        weight: 0 where the pictures need not agree.
        start: at most some pixels away.
        steps: at most.
        with_error: whether the map knows its standard error.

    Returns:
        None where too little of the pictures overlaps, or the steps do not end.
    """
    height, width = one.shape
    system = _System(one)
    found = start
    for number in range(steps):
        step = system.step(other, weight, found)
        if step is None:
            return None
        change = torch.eye(3, dtype=torch.float64)
        change[:2] += step.change
        found = Map(found.matrix @ change)
        if not bool(torch.isfinite(found.matrix).all()) or not 0.1 < float(torch.linalg.det(found.matrix[:, :2])) < 10:
            return None
        moved = _largest_move(step.change, height, width)
        if moved < STILL or (number == steps - 1 and moved < SETTLED):
            return replace(found, error=system.error(step)) if with_error else found
    return None


@dataclass(frozen=True, slots=True)
class _Step:
    change: Float[Tensor, "2 3"]
    solved: Float[Tensor, "10"]  # all unknowns
    residual: Float[Tensor, "h w"]
    columns: Float[Tensor, "10 h w"]  # what each unknown changes
    weighted: Float[Tensor, "10 h w"]
    inverse: Float[Tensor, "10 10"]  # of the normal matrix


class _System:
    """The normal equations of one picture's steps."""

    def __init__(self, one: Tensor) -> None:
        self.one = one
        self.side = float(max(one.shape))
        xs, ys = _axes(*one.shape)
        # In units of the longer side, so that all unknowns are of one size.
        self.x, self.y = xs / self.side, ys / self.side

    def step(self, other: Tensor, weight: Tensor, start: Map) -> _Step | None:
        warped, inside = start.warp(other)
        weights = weight * inside
        total = float(weights.sum())
        if total < max(OVERLAP * float(weight.sum()), 1e-6):
            return None
        weights = weights / total
        centred, moved = self.one - (weights * self.one).sum(), warped - (weights * warped).sum()
        power = float((weights * moved**2).sum())
        if power < 1e-9:
            return None
        moved = moved * math.sqrt(float((weights * centred**2).sum()) / power)
        down, across = torch.gradient((centred + moved) / 2)
        columns = torch.stack(
            [
                across * self.x,
                across * self.y,
                across,
                down * self.x,
                down * self.y,
                down,
                centred,
                torch.ones_like(centred),
                self.x.expand_as(centred),
                self.y.expand_as(centred),
            ]
        )
        weighted = columns * weights
        normal = (weighted.flatten(1) @ columns.flatten(1).T).double()
        normal += torch.diag(1e-9 * torch.diag(normal).clamp(min=1e-12))
        inverse, failed = torch.linalg.inv_ex(normal)
        if int(failed) or not bool(torch.isfinite(inverse).all()):
            return None
        residual = centred - moved
        solved = inverse @ (weighted.flatten(1) @ residual.flatten()).double()
        step = solved[:6].reshape(2, 3).clone()
        step[:, :2] /= self.side
        return _Step(step, solved, residual, columns, weighted, inverse)

    def error(self, step: _Step) -> float:
        """Standard error of a corner after a step, by the sandwich of Huber and White over blocks: what is left over,
        of JPEG's blocks or of an edit that was not told, is no noise that differs from pixel to pixel."""
        left = step.residual - torch.einsum("k,khw->hw", step.solved.float(), step.columns)
        scores, inverse = step.weighted * left, step.inverse
        area = CLUSTER * CLUSTER
        bottom, right = -scores.shape[1] % CLUSTER, -scores.shape[2] % CLUSTER
        clusters = avg_pool2d(pad(scores, (0, right, 0, bottom)), CLUSTER).flatten(1).double() * area
        spread = (inverse @ (clusters @ clusters.T) @ inverse)[:6, :6]
        right_end, bottom_end = float(self.x.max()), float(self.y.max())
        worst = 0.0
        for x in (-right_end, right_end):
            for y in (-bottom_end, bottom_end):
                at = torch.tensor([x, y, 1.0], dtype=torch.float64)
                worst = max(worst, float(at @ spread[:3, :3] @ at + at @ spread[3:, 3:] @ at))
        return math.sqrt(max(worst, 0.0))


def phase_shift(
    one: Float[Tensor, "h w"], other: Float[Tensor, "h w"], weight: Float[Tensor, "h w"]
) -> tuple[int, int]:
    """Where `one`'s content is in `other`, to a pixel (x, y), by phase correlation under a window."""
    height, width = one.shape
    window = torch.hann_window(height, periodic=False)[:, None] * torch.hann_window(width, periodic=False)
    window = window * weight

    def spectrum(image: Tensor) -> Tensor:
        mean = (image * window).sum() / window.sum().clamp(min=1e-9)
        transformed: Tensor = torch.fft.rfft2((image - mean) * window)
        return transformed

    cross = spectrum(other) * spectrum(one).conj()
    place = int(torch.fft.irfft2(cross / cross.abs().clamp(min=1e-8), s=(height, width)).argmax())
    down, across = place // width, place % width
    return across - width * (across > width // 2), down - height * (down > height // 2)


def correlation(one: Tensor, other: Tensor, weight: Tensor) -> float:
    """Pearson's, under weights; 0 where either is plain."""
    weight = weight / weight.sum().clamp(min=1e-9)
    first, second = one - (one * weight).sum(), other - (other * weight).sum()
    norm = math.sqrt(float((weight * first**2).sum()) * float((weight * second**2).sum()))
    return float((weight * first * second).sum()) / norm if norm > 1e-9 else 0.0


def blur(image: Float[Tensor, "h w"], sigma: float) -> Float[Tensor, "h w"]:
    """A Gaussian; borders are repeated."""
    radius = math.ceil(2.5 * sigma)
    at = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = pad(image[None, None], (radius, radius, radius, radius), mode="replicate")[0, 0]
    return _weighed(_weighed(padded, kernel, 1), kernel, 0)


def _weighed(image: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Sums of shifted pictures: for a kernel of one row that takes a third of the time of `conv2d`."""
    length = image.shape[dim] - len(kernel) + 1
    first, *others = kernel.tolist()
    total = image.narrow(dim, 0, length) * first
    for at, weight in enumerate(others, 1):
        total.add_(image.narrow(dim, at, length), alpha=weight)
    return total


def resized(image: Float[Tensor, "H W"], size: tuple[int, int]) -> Float[Tensor, "h w"]:
    """To (height, width), averaging where that is smaller."""
    if tuple(image.shape) == size:
        return image
    mode = "bicubic" if size[0] > image.shape[0] else "bilinear"
    return interpolate(image[None, None], size=size, mode=mode, antialias=True, align_corners=False)[0, 0]


def _axes(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Coordinates x (1, w) and y (h, 1) from the centre."""
    xs = torch.arange(width, dtype=torch.float32) - (width - 1) / 2
    return xs[None, :], (torch.arange(height, dtype=torch.float32) - (height - 1) / 2)[:, None]


def _largest_move(change: Tensor, height: int, width: int) -> float:
    right, bottom = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[x, y, 1.0] for x in (-right, right) for y in (-bottom, bottom)], dtype=torch.float64)
    return float((change @ corners.T).norm(dim=0).max())
