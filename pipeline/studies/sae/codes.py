"""The codes of whole images beside what is to be seen there, and how well some codes tell it.

Codes are kept sparse: k features and values for each of M places, all images after each other. A region is kept as the
places of the block's map that it covers: on a map of 8 x 8 places a drawn mouth is smaller than one of them, so that
by area no choice of places could tell it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from pipeline.diffusion.sparse_autoencoder import SparseAutoencoder

LADDER = tuple(step / 20 for step in range(20))  # thresholds of a feature that are tried, as shares of its largest code
TRIED = 40  # thresholds of a set's score, between its least and its largest value
CANDIDATES = 64  # features that a set is chosen of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodedImages:
    """Codes and regions of some images, by one autoencoder."""

    ids: tuple[str, ...]
    grid: tuple[int, int]
    features: Tensor  # (M, k), M = images * places
    values: Tensor  # (M, k) float32
    num_features: int
    tags: tuple[str, ...]
    covered: Tensor  # (M, T) float32 in {0, 1}

    @property
    def places(self) -> int:
        """Of a map."""
        return self.grid[0] * self.grid[1]

    def of(self, images: Sequence[int]) -> CodedImages:
        """Some of the images, by number."""
        rows = (torch.tensor(images, dtype=torch.int64)[:, None] * self.places + torch.arange(self.places)).flatten()
        return CodedImages(
            ids=tuple(self.ids[number] for number in images),
            grid=self.grid,
            features=self.features[rows],
            values=self.values[rows],
            num_features=self.num_features,
            tags=self.tags,
            covered=self.covered[rows],
        )

    def showing(self, tag: int) -> list[int]:
        """Numbers of the images that show a tag."""
        found: list[int] = self.covered[:, tag].view(len(self.ids), -1).any(dim=1).nonzero()[:, 0].tolist()
        return found

    def score(self, features: Sequence[int], weights: Sequence[float]) -> Tensor:
        """(M,): the weighted sum of some features' codes."""
        found = self.values.new_zeros(len(self.values))
        for number, weight in zip(features, weights, strict=True):
            found += weight * (self.values * (self.features == number)).sum(dim=1)
        return found

    def dense(self, features: Sequence[int]) -> Tensor:
        """(M, n): the codes of some features."""
        place = torch.full((self.num_features,), len(features))
        place[list(features)] = torch.arange(len(features))
        found = self.values.new_zeros((len(self.values), len(features) + 1))
        return found.scatter_add(1, place[self.features], self.values)[:, :-1]

    def largest(self) -> Tensor:
        """(F,): the largest code of each feature."""
        found = self.values.new_zeros(self.num_features)
        return found.scatter_reduce(0, self.features.flatten(), self.values.flatten(), "amax")

    def density(self) -> Tensor:
        """(F,): share of the places that have each feature."""
        found = self.values.new_zeros(self.num_features)
        active = (self.values > 0).to(found)
        return found.scatter_add(0, self.features.flatten(), active.flatten()) / max(len(self.values), 1)

    def intensity(self) -> Tensor:
        """(images, F): mean code of each feature over an image's places."""
        images = len(self.ids)
        rows = torch.arange(images).repeat_interleave(self.places)[:, None].expand_as(self.features)
        found = self.values.new_zeros((images, self.num_features))
        return found.index_put((rows, self.features), self.values, accumulate=True) / self.places


def covered_places(region: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """(places,) in {0, 1}: the places of a map of which a region (H, W) covers at least half as much as of the one that
    it covers most. Of a large region these are the places that lie in it by half; a small one has a place, too."""
    shares = adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(region, dtype=np.float32))[None, None], grid)
    most = float(shares.max())
    return (shares.flatten() >= most / 2).float() if most > 0 else torch.zeros(grid[0] * grid[1])


@torch.no_grad()
def coded(autoencoder: SparseAutoencoder, written: Tensor) -> tuple[Tensor, Tensor]:
    """Features and values, (places, k) each, of what a block wrote, (D, h', w')."""
    codes = autoencoder.encode(written.flatten(1).mT.to(autoencoder.encoder))
    return codes.features, codes.values.float()


class Told(NamedTuple):
    """How well a score tells a region."""

    iou: float
    threshold: float


def iou_of(found: Tensor, covered: Tensor) -> Tensor:
    """Intersection over union of places (..., M) and (M,), both in {0, 1}; 0 where both are empty."""
    both = (found * covered).sum(dim=-1)
    union = found.sum(dim=-1) + covered.sum() - both
    return torch.where(union > 0, both / union.clamp_min(1e-9), torch.zeros_like(union))


def mean_iou(found: Tensor, covered: Tensor) -> Tensor:
    """Mean over images of the IoU of places (..., images, places) and (images, places), both in {0, 1}."""
    both = (found * covered).sum(dim=-1)
    union = found.sum(dim=-1) + covered.sum(dim=-1) - both
    return (both / union.clamp_min(1e-9)).mean(dim=-1)


def best_threshold(score: Tensor, covered: Tensor) -> Told:
    """The threshold under which a score (M,) tells a region (M,) best, over all images together."""
    tried = _tried(score)
    ious = iou_of(torch.stack([(score > one).float() for one in tried]), covered)
    best = int(ious.argmax())
    return Told(float(ious[best]), tried[best])


def best_place_threshold(score: Tensor, covered: Tensor) -> Told:
    """The same for scores and regions (images, places) of images that all show it: by the mean over images."""
    tried = _tried(score)
    ious = mean_iou(torch.stack([(score > one).float() for one in tried]), covered)
    best = int(ious.argmax())
    return Told(float(ious[best]), tried[best])


def _tried(score: Tensor) -> list[float]:
    """Also below zero: a region may be told by features that are elsewhere."""
    between: list[float] = torch.linspace(float(score.min()), float(score.max()), TRIED + 1)[:-1].tolist()
    return [0.0, *between]


def single_ious(images: CodedImages) -> tuple[Tensor, Tensor]:
    """Of every feature and tag the best IoU over all images, and the threshold: (F, T) each."""
    largest = images.largest()
    best = torch.zeros((images.num_features, len(images.tags)))
    thresholds = torch.zeros_like(best)
    total = images.covered.sum(dim=0)
    for share in LADDER:
        limits = share * largest
        active = (images.values > limits[images.features]).float()
        flat = images.features.flatten()
        counts = torch.zeros(images.num_features).index_add(0, flat, active.flatten())
        both = torch.zeros_like(best)
        for column in range(images.features.shape[1]):
            both.index_add_(0, images.features[:, column], images.covered * active[:, column, None])
        ious = both / (counts[:, None] + total - both).clamp_min(1e-9)
        better = ious > best
        best = torch.where(better, ious, best)
        thresholds = torch.where(better, limits[:, None].expand_as(best), thresholds)
    return best, thresholds


def chosen_set(images: CodedImages, tag: int, size: int) -> tuple[list[int], list[float]]:
    """A few features whose weighted codes tell a tag's region, by orthogonal matching pursuit.

    Each time the feature is taken that goes best with what the others leave; then all weights are fitted anew, by
    least squares. A negative weight tells where the region is not.
    """
    target = images.covered[:, tag] - images.covered[:, tag].mean()
    sums = torch.zeros(images.num_features).index_add(
        0, images.features.flatten(), (images.values * target[:, None]).flatten()
    )
    squares = torch.zeros(images.num_features).index_add(0, images.features.flatten(), images.values.square().flatten())
    pull = (sums.abs() / squares.clamp_min(1e-9).sqrt()).topk(min(CANDIDATES, images.num_features)).indices.tolist()
    codes = images.dense(pull)
    codes = codes - codes.mean(dim=0)
    lengths = codes.norm(dim=0).clamp_min(1e-9)
    picked: list[int] = []
    left, weights = target, torch.zeros(0)
    for _ in range(min(size, len(pull))):
        goes = (codes.mT @ left).abs() / lengths
        goes[picked] = -1.0
        best = int(goes.argmax())
        if float(goes[best]) <= 1e-6:
            break
        picked.append(best)
        some = codes[:, picked].double()
        weights = torch.linalg.lstsq(some, target.double()[:, None]).solution[:, 0]
        left = target - (some @ weights).float()
    return [pull[number] for number in picked], weights.tolist()


def amounts_of(images: CodedImages, tag: int, features: Sequence[int]) -> list[float]:
    """Mean codes of some features where a tag's region is, less those elsewhere."""
    codes, inside = images.dense(features), images.covered[:, tag]
    within = (inside @ codes) / inside.sum().clamp_min(1e-9)
    outside = ((1 - inside) @ codes) / (1 - inside).sum().clamp_min(1e-9)
    found: list[float] = (within - outside).tolist()
    return found
