"""How the images of a set read each other inside the network: what ConsiStory says to the engine (arXiv 2402.03286).

B images of a group share a network call. With `halves` = 2 their rows are all unconditional ones, then all conditional
ones; with 1 the conditional ones alone. Behind them may stand as many rows again: the same images, which read nobody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.diffusion.subject import Matches
from pipeline.engine.controls import ANY, HIDDEN, Blend, GivenClasses, Layers, MixQueries, Read


class Rows(NamedTuple):
    """Where the rows of a group stand."""

    images: int  # B
    halves: int

    @property
    def readers(self) -> int:
        """Rows without those that read nobody."""
        return self.images * self.halves

    def of(self, image: int, half: int) -> int:
        """The row of an image in a half."""
        return half * self.images + image

    def cond(self, image: int) -> int:
        """Its conditional row."""
        return self.of(image, self.halves - 1)


def who_reads_whom(images: int, anchors: int) -> Bool[Tensor, "B B"]:
    """[i, j], whether image i reads image j: itself, and the anchors, which are the first."""
    reads = torch.eye(images, dtype=torch.bool)
    reads[:, :anchors] = True
    return reads


def others_of(reads: Bool[Tensor, "B B"]) -> list[list[int]]:
    """Per image the other ones that it reads, in their order."""
    return [[int(other) for other in row.nonzero() if int(other) != image] for image, row in enumerate(reads)]


def most_sources(reads: Bool[Tensor, "B B"]) -> int:
    """J: images that one reads at most, itself included."""
    return 1 + max(map(len, others_of(reads)))


def shared_attention(
    reads: Bool[Tensor, "B B"],
    subjects: Bool[Tensor, "B sh sw"],
    layers: Layers,
    size: tuple[int, int],
    rows: Rows,
    weight: float = 1.0,
) -> list[Read]:
    """Subject-driven self-attention (section 4.2): all of an image's own places, and the subject's places of others.

    Either half of guidance reads its own. An image that reads nobody else has no part in it.

    Args:
        reads: who reads whom.
        subjects: places that others may read, at the size of the layers' maps.
        layers: where, all of one size of map.
        size: of the latents.
        rows: of the group.
        weight: how many times each of the others' places counts; 1 is the paper's.
    """
    shown = torch.where(spread(subjects, size), ANY, HIDDEN)  # (B, h, w)
    everywhere, nowhere = torch.full(size, ANY), torch.full(size, HIDDEN)
    most = most_sources(reads)
    parts = []
    for half in range(rows.halves):
        for image, others in enumerate(others_of(reads)):
            if not others:
                continue
            # All parts name as many images: the places of one that stands in for another are hidden.
            spare = most - 1 - len(others)
            theirs = torch.stack([everywhere, *shown[others], *[nowhere] * spare])
            sources = [image, *others, *[image] * spare]
            parts.append(
                Read(
                    row=rows.of(image, half),
                    sources=tuple(rows.of(source, half) for source in sources),
                    layers=layers,
                    classes=GivenClasses(own=everywhere, theirs=theirs),
                    weights=None if weight == 1 else (1.0, *[weight] * (most - 1)),
                )
            )
    return parts


def spread(maps: Bool[Tensor, "B sh sw"], size: tuple[int, int]) -> Bool[Tensor, "B h w"]:
    """Maps brought to a larger size, so that nearest neighbours of their own size find every number again."""
    rows, columns = (_sources(large, small) for large, small in zip(size, maps.shape[1:], strict=True))
    return maps[:, rows][:, :, columns]


def _sources(large: int, small: int) -> Tensor:
    """For each of `large` places the one of `small` that it shows."""
    starts = torch.tensor([math.floor(place * large / small) for place in range(small)])
    return torch.bucketize(torch.arange(large), starts, right=True) - 1


def mixed_queries(rows: Rows, layers: Layers, strength: float) -> list[MixQueries]:
    """Vanilla query mixing (section 4.2): every row asks in part as the row behind it, which reads nobody."""
    return [
        MixQueries(row=row, source=rows.readers + row, layers=layers, share=strength) for row in range(rows.readers)
    ]


def injected_features(matches: Matches, shares: Float[Tensor, "B P"], layers: Layers, rows: Rows) -> list[Blend]:
    """Feature injection (section 4.3): places take a share of their match's result, in the conditional half.

    All is read before anything is written: an image takes what its match had, not what that took from a third.
    """
    return [
        Blend(
            row=rows.cond(image),
            layers=layers,
            sources=rows.cond(0) + matches.images[image],
            places=matches.places[image],
            shares=shares[image],
        )
        for image in range(rows.images)
        if bool(shares[image].any())
    ]


def strengths(ends: tuple[float, float], steps: int) -> Sequence[float]:
    """Of query mixing: from the first to the last of some steps, evenly."""
    return torch.linspace(*ends, steps, dtype=torch.float64).tolist()
