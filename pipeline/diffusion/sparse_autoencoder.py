"""A k-sparse autoencoder of vectors, such as what a block writes at one place (Gao et al., arXiv 2406.04093).

    p = W (x - b) + c,    z = ReLU of the k largest p, 0 elsewhere,    x' = sum over features of z_f d_f + b

Its F features have directions d_f of unit length. Letters in shapes: B vectors, D numbers of a vector, F features, k
features that a vector may have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

FIRES_ABOVE = 1e-3  # a feature that is no stronger counts as silent, as in the published code


class Codes(NamedTuple):
    """Sparse codes of B vectors."""

    features: Int[Tensor, "B k"]
    values: Float[Tensor, "B k"]  # at least 0; 0 where a vector has fewer than k features

    def dense(self, num_features: int) -> Tensor:
        """(B, F), zero for features that are not there."""
        codes = self.values.new_zeros((len(self.values), num_features))
        return codes.scatter(1, self.features, self.values)

    def fired(self, num_features: int) -> Tensor:
        """(F,) bool: the features that some vector has."""
        found = torch.zeros(num_features, dtype=torch.bool, device=self.values.device)
        found[self.features[self.values > FIRES_ABOVE]] = True
        return found


@dataclass(slots=True, eq=False)
class SparseAutoencoder:
    """The parameters, and what they make of vectors. Rows do not interact: what is beside a vector has no say in it."""

    encoder: Tensor  # (F, D), W
    directions: Tensor  # (F, D), d_f, rows of unit length: the decoder's matrix, transposed
    bias: Tensor  # (D,), b
    latent_bias: Tensor  # (F,), c
    k: int

    def __post_init__(self) -> None:
        features, size = self.encoder.shape
        shapes = (self.directions.shape, self.bias.shape, self.latent_bias.shape)
        if shapes != ((features, size), (size,), (features,)):
            found = ", ".join("x".join(map(str, shape)) for shape in shapes)
            raise ValueError(f"an encoder of {features}x{size} does not go with directions, biases of {found}")
        if not 1 <= self.k <= features:
            raise ValueError(f"k is {self.k}, and should be from 1 to the number of features, {features}")

    @property
    def num_features(self) -> int:
        """F."""
        return len(self.encoder)

    @property
    def size(self) -> int:
        """D."""
        return int(self.encoder.shape[1])

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All tensors, in one fixed order."""
        return self.encoder, self.directions, self.bias, self.latent_bias

    def preactivations(self, vectors: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        """p: how strongly each feature answers, before the choice."""
        return torch.addmm(self.latent_bias, vectors - self.bias, self.encoder.mT)

    def encode(self, vectors: Float[Tensor, "B D"]) -> Codes:
        """The codes of some vectors."""
        return strongest(self.preactivations(vectors), self.k)

    def decode(self, codes: Codes) -> Float[Tensor, "B D"]:
        """What codes stand for."""
        return self.combined(codes) + self.bias

    def combined(self, codes: Codes) -> Float[Tensor, "B D"]:
        """The sum of the directions of codes, without the bias."""
        return embedding_bag(codes.features, self.directions, per_sample_weights=codes.values, mode="sum")


def strongest(preactivations: Float[Tensor, "B F"], count: int) -> Codes:
    """The codes of the `count` largest entries of each row; of negative ones the value is 0."""
    values, features = preactivations.topk(count, dim=1)
    return Codes(features, values.relu())


def codes_of_map(autoencoder: SparseAutoencoder, written: Float[Tensor, "D h w"]) -> Float[Tensor, "h w F"]:
    """The codes of every place of what a block wrote, in float32: of halves other features tie."""
    size, height, width = written.shape
    codes = autoencoder.encode(written.reshape(size, -1).mT.to(autoencoder.encoder))
    return codes.dense(autoencoder.num_features).unflatten(0, (height, width))


def initial(
    vectors: Float[Tensor, "B D"], num_features: int, k: int, generator: torch.Generator, *, centred_on: int = 32768
) -> SparseAutoencoder:
    """Before training: a random encoder, the same directions, and the geometric median of vectors as the bias.

    Args:
        vectors: a shuffled sample of what will be encoded; neighbours in one image are alike.
        num_features: F.
        k: features that a vector may have.
        generator: on the CPU; rows are uniform, as torch draws a linear layer.
        centred_on: how many of the vectors the median is taken of.
    """
    size = vectors.shape[1]
    reach = size**-0.5
    drawn = torch.rand((num_features, size), generator=generator, dtype=torch.float32)
    encoder = ((2.0 * drawn - 1.0) * reach).to(vectors)
    return SparseAutoencoder(
        encoder=encoder,
        directions=unit_rows(encoder),
        bias=geometric_median(vectors[:centred_on]),
        latent_bias=vectors.new_zeros(num_features),
        k=k,
    )


def unit_rows(rows: Float[Tensor, "F D"]) -> Float[Tensor, "F D"]:
    """Rows of unit length in the same directions."""
    return rows / rows.norm(dim=1, keepdim=True)


def geometric_median(vectors: Float[Tensor, "B D"], iterations: int = 100, nearest: float = 1e-6) -> Float[Tensor, "D"]:
    """The point whose distances to the vectors have the smallest sum, by Weiszfeld's iteration from the mean.

    `nearest` is the distance below which a vector counts as so far away: it would have all the weight.
    """
    median = vectors.mean(dim=0)
    for _ in range(iterations):
        weights = 1.0 / (vectors - median).norm(dim=1).clamp_min(nearest)
        moved = (weights[:, None] * vectors).sum(dim=0) / weights.sum()
        if torch.equal(moved, median):
            break
        median = moved
    return median


def explained_variance(vectors: Float[Tensor, "B D"], decoded: Float[Tensor, "B D"]) -> float:
    """Share of the vectors' variance around their mean that is decoded; 1: all."""
    missed = (vectors - decoded).square().sum()
    whole = (vectors - vectors.mean(dim=0)).square().sum()
    return float(1.0 - missed / whole)


def dead(last_fired: Int[Tensor, "F"], dead_after: int) -> Bool[Tensor, "F"]:
    """The features that have been silent for more than `dead_after` batches."""
    return last_fired > dead_after
