"""Calls that wait for their rows, and what rows have in common that may share a network call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.levels import Prediction, stacked
from pipeline.engine.calls import Denoise, Denoised, Mode, Product
from pipeline.engine.controls import PLAIN, Plan, Seen

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Of named tensors."""


class Kind(NamedTuple):
    """What the rows of one network call have in common."""

    latents: tuple[int, ...]  # shape of a row's
    conditioning: Shapes  # of a row's parts
    beside: Shapes  # of what a row has beside its latents
    plan: Plan  # of its controls
    group: int  # rows that must share a call
    wants_gradients: bool
    mode: Mode | None = None  # of Jacobian products; None: predictions


# A call that keeps its activations has this fraction of a plain call's rows. So has a call in forward mode, which keeps
# none: its attention is made of explicit maps, and every tensor comes with its tangent.
GRADIENT_SHARE = 4


@dataclass(slots=True, eq=False)
class PendingProduct:
    """One `Product` call whose rows are on their way."""

    owner: Any  # whoever waits for the answer
    call: Product
    products: list[Tensor | None] = field(default_factory=list)
    missing: int = 0

    def __post_init__(self) -> None:
        counts = {len(self.call.levels), len(self.call.latents), len(self.call.conditioning), len(self.call.vectors)}
        if len(counts) != 1:
            raise ValueError("a Product call has one level, prompt and vector for each of its latents")
        self.missing = len(self.call.levels)
        self.products = [None] * self.missing

    @property
    def kind(self) -> Kind:
        """What its rows have in common."""
        call = self.call
        return Kind(
            latents=tuple(call.latents.shape[1:]),
            conditioning=shapes_of(call.conditioning[0].parts),
            beside=(),
            plan=PLAIN,
            group=self.group,
            wants_gradients=True,
            mode=call.mode,
        )

    @property
    def group(self) -> int:
        """Rows that must share a network call."""
        return 1

    def answer(self) -> Tensor:
        """The answer, once no row is missing."""
        return torch.stack([row for row in self.products if row is not None])


@dataclass(slots=True, eq=False)
class PendingDenoise:
    """One `Denoise` call whose rows are on their way."""

    owner: Any  # whoever waits for the answer
    call: Denoise
    predictions: list[Prediction | None] = field(default_factory=list)
    attention: list[Tensor | None] = field(default_factory=list)
    embedding_grads: list[Tensor | None] = field(default_factory=list)
    seen: Seen | None = None
    missing: int = 0

    def __post_init__(self) -> None:
        rows = len(self.call.levels)
        if not rows == self.call.latents.shape[0] == len(self.call.conditioning):
            raise ValueError(
                f"a Denoise call has {self.call.latents.shape[0]} latents, {rows} levels and "
                f"{len(self.call.conditioning)} prompts; these are one per row"
            )
        if self.call.watch is not None and self.call.control is not None:
            raise ValueError("a Denoise call with a control watches by the control's Watch parts, not by `watch`")
        self.predictions = [None] * rows
        self.attention = [None] * rows
        self.embedding_grads = [None] * rows
        self.missing = rows

    @property
    def kind(self) -> Kind:
        """What its rows have in common."""
        call = self.call
        return Kind(
            latents=tuple(call.latents.shape[1:]),
            conditioning=shapes_of(call.conditioning[0].parts),
            beside=shapes_of({name: tensor[0] for name, tensor in call.beside.items()}),
            plan=PLAIN if call.control is None else call.control.plan,
            group=self.group,
            wants_gradients=call.cotangent is not None,
        )

    @property
    def group(self) -> int:
        """Rows that must share a network call."""
        return 1 if self.call.control is None else len(self.call.levels)

    def answer(self) -> Denoised:
        """The answer, once no row is missing."""
        predictions = stacked([row for row in self.predictions if row is not None])
        attention, grads = None, None
        if self.call.watch is not None:
            seen = next(row for row in self.attention if row is not None)
            attention = torch.stack([torch.zeros_like(seen) if row is None else row for row in self.attention])
        if self.call.cotangent is not None:
            grads = torch.stack([row for row in self.embedding_grads if row is not None])
        return Denoised(predictions, attention, self.seen, grads)


PendingCall = PendingDenoise | PendingProduct


def pending_call(owner: Any, call: Denoise | Product) -> PendingCall:
    """A call that somebody waits for."""
    return PendingProduct(owner, call) if isinstance(call, Product) else PendingDenoise(owner, call)


def shapes_of(parts: Mapping[str, Tensor]) -> Shapes:
    """What must agree for bundles of tensors to stand in one call."""
    return tuple((name, tuple(part.shape)) for name, part in sorted(parts.items()))


def rows_per_call(kind: Kind, call_size: int) -> int:
    """Rows of a network call of a kind: whole groups, and fewer where gradients are wanted. Zero where not one group
    fits. It depends on nothing else, so that a row's bits do not either."""
    size = max(kind.group, call_size // GRADIENT_SHARE) if kind.wants_gradients else call_size
    return min(size, call_size) // kind.group * kind.group


def does_not_fit(group: int, call_size: int) -> str:
    """Why a group of rows cannot be asked for, and the way out."""
    return (
        f"{group} rows read each other and must share a network call, which has {call_size} rows. Set run.call_size to "
        f"{group} or more"
    )
