"""Packing: the rows of all pending `Denoise` calls, in UNet calls of one fixed shape.

In calls of one shape a row's answer does not depend on its neighbours, bit for bit; across shapes it does, in the last
digits. So a short call is filled up with copies that nobody reads, and results depend on the call size alone.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.calls import Denoise, Denoised

Kind = tuple[Any, ...]
"""What the rows of one UNet call have in common: the shapes of latents and embeddings."""


@dataclass(slots=True, eq=False)
class Pending:
    """One `Denoise` call whose rows are on their way."""

    owner: Any  # whoever waits for the answer
    call: Denoise
    noise_preds: list[Tensor | None] = field(default_factory=list)
    attention: list[Tensor | None] = field(default_factory=list)
    missing: int = 0

    def __post_init__(self) -> None:
        rows = len(self.call.timesteps)
        if not rows == self.call.latents.shape[0] == len(self.call.conditioning):
            raise ValueError(
                f"a Denoise call has {self.call.latents.shape[0]} latents, {rows} timesteps and "
                f"{len(self.call.conditioning)} prompts; these are one per row"
            )
        self.noise_preds = [None] * rows
        self.attention = [None] * rows
        self.missing = rows

    @property
    def kind(self) -> Kind:
        """See `Kind`."""
        return (*self.call.latents.shape[1:], *self.call.conditioning[0].embedding.shape)

    def answer(self) -> Denoised:
        """The answer, once no row is missing."""
        noise_preds = torch.stack([row for row in self.noise_preds if row is not None])
        if self.call.watch is None:
            return Denoised(noise_preds, None)
        seen = next(row for row in self.attention if row is not None)
        return Denoised(
            noise_preds, torch.stack([torch.zeros_like(seen) if row is None else row for row in self.attention])
        )


Row = tuple[Pending, int]


@dataclass(slots=True)
class Batch:
    """The rows of one UNet call, not yet padded."""

    rows: list[Row]

    def latents(self, size: int) -> Tensor:
        """(size, C, h, w)."""
        return torch.stack(self._padded([pending.call.latents[at] for pending, at in self.rows], size))

    def timesteps(self, size: int) -> list[int]:
        """`size` integers."""
        return self._padded([pending.call.timesteps[at] for pending, at in self.rows], size)

    def embeddings(self, size: int) -> list[Tensor]:
        """`size` of (L, D)."""
        return self._padded([pending.call.conditioning[at].embedding for pending, at in self.rows], size)

    def watch(self, size: int) -> Tensor | None:
        """(size, L) weights of watched tokens; None where no row watches any."""
        wanted = [pending.call.watch[at] if pending.call.watch is not None else () for pending, at in self.rows]
        if not any(len(tokens) for tokens in wanted):
            return None
        weights = torch.zeros((size, self.embeddings(1)[0].shape[0]))
        for row, tokens in enumerate(wanted):
            weights[row, list(tokens)] = 1.0
        return weights

    def deliver(self, noise_preds: Tensor, attention: Tensor | None) -> Iterator[Pending]:
        """Hand out the answers of a call; yields the calls that have all theirs."""
        for row, (pending, at) in enumerate(self.rows):
            pending.noise_preds[at] = noise_preds[row]
            if attention is not None and pending.call.watch is not None:
                pending.attention[at] = attention[row]
            pending.missing -= 1
            if pending.missing == 0:
                yield pending

    @staticmethod
    def _padded(items: Sequence[Any], size: int) -> list[Any]:
        # Copies of a real row, not zeros: whatever a network does with zeros, it does not do here.
        return [*items, *[items[0]] * (size - len(items))]


class RowQueue:
    """Rows that wait for a UNet call, oldest first, by kind."""

    def __init__(self) -> None:
        self._by_kind: OrderedDict[Kind, deque[Row]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._by_kind.values())

    def push(self, pending: Pending) -> None:
        """Queue all rows of a call."""
        rows = self._by_kind.setdefault(pending.kind, deque())
        rows.extend((pending, at) for at in range(len(pending.call.timesteps)))

    def has_full(self, size: int) -> bool:
        """Whether some kind fills a call."""
        return any(len(rows) >= size for rows in self._by_kind.values())

    def pop(self, size: int) -> Batch:
        """The next call: of a kind that fills one if any does, else of the kind with most rows."""
        kind = max(self._by_kind, key=lambda kind: min(len(self._by_kind[kind]), size))
        rows = self._by_kind[kind]
        batch = Batch([rows.popleft() for _ in range(min(size, len(rows)))])
        if not rows:
            del self._by_kind[kind]
        return batch

    def put_back(self, batch: Batch) -> None:
        """Return the rows of a call that was not made to the head of their queue, in their order."""
        self._by_kind.setdefault(batch.rows[0][0].kind, deque()).extendleft(reversed(batch.rows))

    def drop(self, pending: Pending) -> None:
        """Forget the rows of a call that failed."""
        for kind, rows in list(self._by_kind.items()):
            self._by_kind[kind] = deque(row for row in rows if row[0] is not pending)
            if not self._by_kind[kind]:
                del self._by_kind[kind]
