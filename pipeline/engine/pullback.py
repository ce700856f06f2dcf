"""The local latent basis: which directions of noisy latents change the network's bottleneck most, and by how much.

Leading right singular vectors of the bottleneck's Jacobian by subspace iteration, matrix-free (Park et al., arXiv
2307.12868, section 3.2 and appendix). Cost: with m rows and I iterations, I m products in forward mode and I m in
reverse mode, and m in forward mode to finish. Memory: m vectors like the latents, m like the bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.levels import Level
from pipeline.diffusion.subspaces import Leading, finished, improved, largest_sine, orthonormal
from pipeline.engine.backbone import Bottleneck
from pipeline.engine.calls import Conditioning, Mode, Product, Steps
from pipeline.errors import EditError


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a Jacobian is taken: one latent at one level, under one prompt."""

    latents: Tensor  # (C, h, w)
    level: Level
    conditioning: Conditioning

    def multiply(self, vectors: Tensor, mode: Mode) -> Steps[Tensor]:
        """Products with m vectors, all at this place."""
        count = len(vectors)
        products: Tensor = yield Product(
            latents=self.latents.expand(count, *self.latents.shape),
            levels=[self.level] * count,
            conditioning=[self.conditioning] * count,
            vectors=vectors,
            mode=mode,
        )
        if not bool(torch.isfinite(products).all()):
            raise EditError("the network's Jacobian gave values that are not finite. Try model.dtype float32")
        return products.to(vectors)

    def push(self, tangents: Tensor) -> Steps[Tensor]:
        """J v of flat rows (m, D): (m, C', h', w')."""
        return (yield from self.multiply(tangents.unflatten(1, self.latents.shape), "push"))

    def pull(self, features: Tensor) -> Steps[Tensor]:
        """J^T w of (m, C', h', w'): flat rows (m, D)."""
        return (yield from self.multiply(features, "pull")).flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalBasis:
    """What was found at a place."""

    leading: Leading  # n vectors, flat
    shape: tuple[int, ...]  # (C', h', w') of the bottleneck
    iterations: int
    residual: float  # sine of the largest angle that the last iteration turned the n leading vectors by
    timestep: float  # where it was found
    latent_shape: tuple[int, ...]  # (C, h, w)
    prompt: Tensor  # (D_text,), mean of what the network reads of the prompt: tells prompts that are alike
    layer: str = ""  # the bottleneck's name, where the model's offers are at hand

    @property
    def picture(self) -> Tensor:
        """(h, w) uint8: how long its vectors are at each place of the latents, 255 where they are longest."""
        lengths = self.leading.tangents.view(-1, *self.latent_shape).square().sum(dim=(0, 1)).sqrt()
        longest = lengths.max().clamp_min(torch.finfo(lengths.dtype).tiny)
        return (255.0 * lengths / longest).round().to(torch.uint8)


def size_problems(count: int, bottleneck: Bottleneck) -> Iterator[str]:
    """Why there are not so many vectors in latents of the model's size, and the way out."""
    height = width = bottleneck.side
    rank = bottleneck.rank(height, width)
    if count > rank:
        yield (
            f"a basis of {count} vectors (num_vectors and oversample) is asked for, and latents of {height} x {width} "
            f"have at most {rank} to the bottleneck '{bottleneck.layer}'. Ask for fewer, or raise model.size"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Iterated:
    """What subspace iteration has come to, not yet finished."""

    rows: Tensor  # V (m, D), orthonormal
    stretches: Tensor  # S (m,), descending
    iterations: int
    residual: float  # see `LocalBasis`


def iterated(place: Place, start: Tensor, *, keep: int, max_iterations: int, tolerance: float) -> Steps[Iterated]:
    """Subspace iteration from orthonormal rows (m, D).

    It stops once neither the span of the leading `keep` rows nor their S changes by more than `tolerance`. Spans are
    compared, not rows: a decomposition may turn any row round.
    """
    rows, before = start, start.new_full((len(start),), torch.inf)
    number, turned = 0, 1.0
    while number < max_iterations:
        pulled = yield from place.pull((yield from place.push(rows)))
        better, stretches = improved(pulled)
        number, turned = number + 1, largest_sine(better[:keep], rows[:keep])
        change = (stretches - before).abs() / stretches.clamp_min(torch.finfo(start.dtype).tiny)
        rows, before = better, stretches
        if turned < tolerance and float(change[:keep].max()) < tolerance:
            break
    return Iterated(rows=rows, stretches=before, iterations=number, residual=turned)


def local_basis(place: Place, start: Tensor, *, keep: int, max_iterations: int, tolerance: float) -> Steps[LocalBasis]:
    """The `keep` leading singular vectors of the bottleneck's Jacobian at a place.

    Args:
        place: where.
        start: (m, D) random rows, at least `keep`: the more, the fewer iterations.
        keep: n.
        max_iterations: at most, at least 1.
        tolerance: see `iterated`.

    Raises:
        EditError: the latents have fewer than m numbers, or the network gave values that are not finite.
    """
    if len(start) > (numbers := place.latents.numel()):
        raise EditError(
            f"a basis of {len(start)} vectors (num_vectors and oversample) is asked for, and the latents have "
            f"{numbers} numbers. Ask for fewer, or raise model.size"
        )
    rows = orthonormal(start)
    found = yield from iterated(place, rows, keep=keep, max_iterations=max_iterations, tolerance=tolerance)
    pushed = yield from place.push(found.rows)
    return LocalBasis(
        leading=finished(found.rows, pushed.flatten(1), keep),
        shape=tuple(pushed.shape[1:]),
        iterations=found.iterations,
        residual=found.residual,
        timestep=place.level.timestep,
        latent_shape=tuple(place.latents.shape),
        prompt=prompt_vector(place.conditioning),
    )


def prompt_vector(conditioning: Conditioning) -> Tensor:
    """(D_text,): mean embedding of a prompt's own tokens; of all of its places where it has none."""
    places = list(conditioning.positions) or slice(None)
    return conditioning.embedding[places].mean(dim=0).to("cpu", torch.float32)
