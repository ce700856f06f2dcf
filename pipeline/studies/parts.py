"""The comparison of bases, cut into parts that are computed and committed one by one.

A part compares two blocks of samples, or the bases of one block of samples among each other; blocks are cut by id, so
that parts do not depend on who computes them. Within a part every number depends on two rows alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from operator import mul
from typing import Any, Literal

from torch import Tensor

from pipeline.diffusion.subspaces import Leading, geodesic_distance, power_spectrum
from pipeline.studies.bases import Bases, BasisRow
from pipeline.studies.config import GeometryConfig

Kind = Literal["samples", "timesteps", "prompts"]
"""What two compared bases differ in; all else is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Two blocks of ids, which may be the same one."""

    one: tuple[str, ...]
    other: tuple[str, ...]
    digest: str  # of the whole comparison

    @property
    def name(self) -> str:
        """Of its file."""
        text = json.dumps([self.digest, self.one, self.other])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def parts_of(rows: Sequence[BasisRow], config: GeometryConfig, digest: str) -> list[Part]:
    """All parts, in a fixed order."""
    ids = sorted({row.id for row in rows})
    size = config.block_size
    blocks = [tuple(ids[start : start + size]) for start in range(0, len(ids), size)]
    pairs = [(blocks[at], blocks[other]) for at in range(len(blocks)) for other in range(at, len(blocks))]
    return [Part(one=one, other=other, digest=digest) for one, other in pairs]


def computed(part: Part, rows: Sequence[BasisRow], bases: Bases, config: GeometryConfig) -> dict[str, Any]:
    """What a part finds: `distances` between bases, and `spectra` of those of a block, as rows of a table."""
    inside = set(part.one) | set(part.other)
    mine = [row for row in rows if row.id in inside]
    distances: list[dict[str, Any]] = []
    spectra: list[dict[str, Any]] = []
    # One condition at a time is held: a prompt's bases at a level, of both blocks.
    for some in _grouped(mine, lambda row: (row.prompt, row.timestep)).values():
        found = bases.load(some)
        one, other = ([row for row in some if row.id in block] for block in (part.one, part.other))
        pairs = combinations(one, 2) if part.one == part.other else product(one, other)
        distances += [_distance("samples", *pair, found, config) for pair in pairs]
        if part.one == part.other:
            spectra += [_spectrum(row, found[row.key]) for row in some]
    if part.one == part.other:
        for some in _grouped(mine, lambda row: row.id).values():
            found = bases.load(some)
            distances += [_distance(kind, *pair, found, config) for kind, pair in _within(some)]
    return {"distances": distances, "spectra": spectra}


def _within(rows: Sequence[BasisRow]) -> Iterator[tuple[Kind, tuple[BasisRow, BasisRow]]]:
    """Pairs of one sample's bases that differ in their level, or in their prompt."""
    for one, other in combinations(rows, 2):
        if one.prompt == other.prompt and one.timestep != other.timestep:
            yield "timesteps", (one, other)
        if one.prompt != other.prompt and one.timestep == other.timestep:
            yield "prompts", (one, other)


def _grouped(rows: Sequence[BasisRow], key: Any) -> Mapping[Any, list[BasisRow]]:
    groups: dict[Any, list[BasisRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _distance(
    kind: Kind, one: BasisRow, other: BasisRow, found: Mapping[Any, Leading], config: GeometryConfig
) -> dict[str, Any]:
    """A row of `distances`. kept: mean share that the other's basis keeps of a feature direction, one way and back."""
    first, second = found[one.key], found[other.key]
    compared = [getattr(basis, config.space) for basis in (first, second)]
    shared: Tensor = first.features @ second.features.mT  # (n, m)
    return {
        "differ_in": kind,
        "id": one.id,
        "other_id": other.id,
        "prompt": one.prompt,
        "other_prompt": other.prompt,
        "timestep": one.timestep,
        "other_timestep": other.timestep,
        "distance": geodesic_distance(*compared),
        "kept": float(shared.norm(dim=1).mean()),
        "kept_back": float(shared.norm(dim=0).mean()),
        "prompt_similarity": cosine(one.prompt_vector, other.prompt_vector),
    }


def _spectrum(row: BasisRow, basis: Leading) -> dict[str, Any]:
    vectors = basis.tangents.view(-1, *row.latent_shape)
    return {
        "id": row.id,
        "prompt": row.prompt,
        "timestep": row.timestep,
        "spectrum": power_spectrum(vectors).tolist(),
        "singular_values": basis.stretches.tolist(),
    }


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Of the angle between two vectors; 0 where one is 0."""
    lengths = math.hypot(*one) * math.hypot(*other)
    return sum(map(mul, one, other)) / lengths if lengths else 0.0
