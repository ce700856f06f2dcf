"""Packing: the rows of all pending `Denoise` calls, in UNet calls of one fixed shape.

In calls of one shape a row's answer does not depend on its neighbours, bit for bit; across shapes it does, in the last
digits. So a short call is filled up with copies that nobody reads, and results depend on the call size alone.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.calls import Denoise, Denoised, UNetAnswer, UNetCall

Kind = tuple[Any, ...]
"""What the rows of one UNet call have in common: shapes, size of their groups, whether gradients are wanted."""

GRADIENT_SHARE = 4  # a call that keeps its activations has this fraction of a plain call's rows


@dataclass(slots=True, eq=False)
class Pending:
    """One `Denoise` call whose rows are on their way."""

    owner: Any  # whoever waits for the answer
    call: Denoise
    noise_preds: list[Tensor | None] = field(default_factory=list)
    attention: list[Tensor | None] = field(default_factory=list)
    embedding_grads: list[Tensor | None] = field(default_factory=list)
    seen: Any = None
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
        self.embedding_grads = [None] * rows
        self.missing = rows

    @property
    def kind(self) -> Kind:
        """See `Kind`."""
        return (
            *self.call.latents.shape[1:],
            *self.call.conditioning[0].embedding.shape,
            self.call.inpaint is not None,
            self.call.cotangent is not None,
            self.group,
        )

    @property
    def group(self) -> int:
        """Rows that must share a UNet call."""
        return 1 if self.call.control is None else len(self.call.timesteps)

    def answer(self) -> Denoised:
        """The answer, once no row is missing."""
        noise_preds = torch.stack([row for row in self.noise_preds if row is not None])
        attention, grads = None, None
        if self.call.watch is not None:
            seen = next(row for row in self.attention if row is not None)
            attention = torch.stack([torch.zeros_like(seen) if row is None else row for row in self.attention])
        if self.call.cotangent is not None:
            grads = torch.stack([row for row in self.embedding_grads if row is not None])
        return Denoised(noise_preds, attention, self.seen, grads)


Row = tuple[Pending, int]


def rows_per_call(kind: Kind, call_size: int) -> int:
    """Rows of a UNet call of a kind: whole groups, and fewer where gradients are wanted. It hangs on nothing else, so
    that a row's bits do not either. Zero where not one group fits."""
    wants_gradients, group = kind[-2:]
    size = max(group, call_size // GRADIENT_SHARE) if wants_gradients else call_size
    return int(min(size, call_size) // group * group)


@dataclass(slots=True)
class Batch:
    """The rows of one UNet call, not yet padded; groups stand together."""

    rows: list[Row]

    @property
    def kind(self) -> Kind:
        """What its rows have in common."""
        return self.rows[0][0].kind

    @property
    def groups(self) -> list[list[Row]]:
        """Its rows by group."""
        size = self.rows[0][0].group
        return [self.rows[start : start + size] for start in range(0, len(self.rows), size)]

    def as_call(self, size: int) -> UNetCall:
        """The call of `size` rows, filled up with copies of its first ones."""
        controls = [(start, group[0][0].call.control) for start, group in self._starts()]
        return UNetCall(
            latents=torch.stack(self._padded([pending.call.latents[at] for pending, at in self.rows], size)),
            timesteps=self._padded([pending.call.timesteps[at] for pending, at in self.rows], size),
            embeddings=self._padded([pending.call.conditioning[at].embedding for pending, at in self.rows], size),
            watch=self._watch(size),
            first_alike=self._first_alike(size),
            inpaint=self._inpaint(size),
            controls=tuple(
                (slice(start, start + self.rows[0][0].group), control) for start, control in controls if control
            ),
            cotangents=self._cotangents(size),
        )

    def _starts(self) -> Iterator[tuple[int, list[Row]]]:
        start = 0
        for group in self.groups:
            yield start, group
            start += len(group)

    def _first_alike(self, size: int) -> list[int]:
        """Rows are told to be alike by where their latents lie: a method that asks for several prompts at one point
        gives views of one tensor. Rows that only fill the call up are copies of the first."""
        first: dict[tuple[int, int], int] = {}
        alike = []
        for row, (pending, at) in enumerate(self.rows):
            latents = pending.call.latents[at]
            alike.append(first.setdefault((latents.data_ptr(), pending.call.timesteps[at]), row))
        return self._padded(alike, size)

    def _watch(self, size: int) -> Tensor | None:
        wanted = [pending.call.watch[at] if pending.call.watch is not None else () for pending, at in self.rows]
        if not any(len(tokens) for tokens in wanted):
            return None
        pending, at = self.rows[0]
        weights = torch.zeros((size, pending.call.conditioning[at].embedding.shape[0]))
        for row, tokens in enumerate(wanted):
            weights[row, list(tokens)] = 1.0
        return weights

    def _inpaint(self, size: int) -> Tensor | None:
        given = [pending.call.inpaint[at] for pending, at in self.rows if pending.call.inpaint is not None]
        return torch.stack(self._padded(given, size)) if given else None

    def _cotangents(self, size: int) -> tuple[Callable[[Tensor], Tensor], ...] | None:
        given = [pending.call.cotangent for pending, _ in self.rows if pending.call.cotangent is not None]
        return tuple(self._padded(given, size)) if given else None

    def deliver(self, answer: UNetAnswer) -> Iterator[Pending]:
        """Hand out the answers of a call; yields the calls that have all theirs."""
        seen = iter(answer.seen)
        for row, (pending, at) in enumerate(self.rows):
            pending.noise_preds[at] = answer.noise_preds[row]
            if answer.attention is not None and pending.call.watch is not None:
                pending.attention[at] = answer.attention[row]
            if answer.embedding_grads is not None:
                pending.embedding_grads[at] = answer.embedding_grads[row]
            if pending.call.control is not None and at == 0:
                pending.seen = next(seen)
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

    def has_full(self, call_size: int) -> bool:
        """Whether some kind fills a call."""
        return any(len(rows) >= rows_per_call(kind, call_size) for kind, rows in self._by_kind.items())

    def pop(self, call_size: int) -> Batch:
        """The next call: of a kind that fills one if any does, else of the kind that fills most of one."""

        def filled(kind: Kind) -> float:
            return min(len(self._by_kind[kind]) / rows_per_call(kind, call_size), 1.0)

        kind = max(self._by_kind, key=filled)
        rows = self._by_kind[kind]
        batch = Batch([rows.popleft() for _ in range(min(rows_per_call(kind, call_size), len(rows)))])
        if not rows:
            del self._by_kind[kind]
        return batch

    def put_back(self, batch: Batch) -> None:
        """Return the rows of a call that was not made to the head of their queue, in their order."""
        self._by_kind.setdefault(batch.kind, deque()).extendleft(reversed(batch.rows))

    def too_large(self, call_size: int) -> list[Pending]:
        """Calls whose group does not fit into a UNet call, once each."""
        found = [
            pending
            for kind, rows in self._by_kind.items()
            if rows_per_call(kind, call_size) == 0
            for pending, _ in rows
        ]
        return list(dict.fromkeys(found))

    def drop(self, pending: Pending) -> None:
        """Forget the rows of a call that failed."""
        for kind, rows in list(self._by_kind.items()):
            self._by_kind[kind] = deque(row for row in rows if row[0] is not pending)
            if not self._by_kind[kind]:
                del self._by_kind[kind]
