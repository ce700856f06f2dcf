"""Packing: the rows of all pending `Denoise` calls, in network calls of one fixed shape.

In calls of one shape a row's answer does not depend on its neighbours, bit for bit; across shapes it does, in the last
digits. So a short call is filled up with copies that nobody reads, and results depend on the call size alone.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.levels import Prediction, stacked
from pipeline.engine.calls import Denoise, Denoised, NetworkAnswer, NetworkCall
from pipeline.engine.controls import PLAIN, Plan, Seen, Watch
from pipeline.engine.stacking import seen_by

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


GRADIENT_SHARE = 4  # a call that keeps its activations has this fraction of a plain call's rows


@dataclass(slots=True, eq=False)
class PendingCall:
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


@dataclass(slots=True, eq=False)
class CallRow:
    """One row of a network call, and everyone who asked for it: a `Denoise` call and the place of the row in it."""

    askers: list[tuple[PendingCall, int]]

    @property
    def pending(self) -> PendingCall:
        """The first call that asked for it."""
        return self.askers[0][0]

    @property
    def at(self) -> int:
        """Its place in that call."""
        return self.askers[0][1]

    @property
    def sameness(self) -> tuple[Any, ...] | None:
        """Equal for rows that are the same computation; None for a row that is nobody else's.

        Several edits of one image ask for the same predictions at their first step: views of the trajectory's latents,
        under prompts that were encoded once. Where these lie in memory tells them, so no numbers are compared.
        """
        call, at = self.pending.call, self.at
        if call.control is not None or call.beside or call.cotangent is not None:
            return None
        return (
            *self.pending.kind,
            _place_of(call.latents[at]),
            call.levels[at],
            id(call.conditioning[at]),
            () if call.watch is None else tuple(call.watch[at]),
        )


def shapes_of(parts: Mapping[str, Tensor]) -> Shapes:
    """What must agree for bundles of tensors to stand in one call."""
    return tuple((name, tuple(part.shape)) for name, part in sorted(parts.items()))


def _place_of(latents: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory. While it is held, nothing else can lie there."""
    return latents.data_ptr(), latents.stride()


def rows_per_call(kind: Kind, call_size: int) -> int:
    """Rows of a network call of a kind: whole groups, and fewer where gradients are wanted. Zero where not one group
    fits. It depends on nothing else, so that a row's bits do not either."""
    size = max(kind.group, call_size // GRADIENT_SHARE) if kind.wants_gradients else call_size
    return min(size, call_size) // kind.group * kind.group


@dataclass(slots=True)
class Batch:
    """The rows of one network call, not yet padded; groups stand together."""

    rows: list[CallRow]

    @property
    def kind(self) -> Kind:
        """What its rows have in common."""
        return self.rows[0].pending.kind

    @property
    def asked_for(self) -> int:
        """Rows that were asked for: one row of the call may answer several."""
        return sum(len(row.askers) for row in self.rows)

    @property
    def groups(self) -> list[list[CallRow]]:
        """Its rows by group."""
        size = self.kind.group
        return [self.rows[start : start + size] for start in range(0, len(self.rows), size)]

    def as_call(self, size: int) -> NetworkCall:
        """The call of `size` rows, filled up with copies of its first ones."""
        kind = self.kind
        controls = [(number * kind.group, group[0].pending.call.control) for number, group in enumerate(self.groups)]
        rows = [(row.pending.call, row.at) for row in self.rows]
        return NetworkCall(
            latents=torch.stack(self._padded([call.latents[at] for call, at in rows], size)),
            levels=self._padded([call.levels[at] for call, at in rows], size),
            conditioning=self._padded([call.conditioning[at] for call, at in rows], size),
            watch=self._watch(size),
            beside=self._beside(size),
            controls=tuple((start, control) for start, control in controls if control is not None),
            plan=kind.plan,
            group=kind.group,
            cotangents=self._cotangents(size),
            alike=self._alike(size),
        )

    def _alike(self, size: int) -> list[int]:
        """Where latents lie in memory tells which are the same: a method that asks for several prompts at one point
        gives views of one tensor. Rows that only fill the call up are copies of the first."""
        first: dict[tuple[Any, ...], int] = {}
        rows = [(row.pending.call, row.at) for row in self.rows]
        places = [(*_place_of(call.latents[at]), call.levels[at]) for call, at in rows]
        return self._padded([first.setdefault(place, number) for number, place in enumerate(places)], size)

    def _watch(self, size: int) -> Tensor | None:
        """(size, S, L): the weights of everything that is watched; None where nothing is."""
        length = self.rows[0].pending.call.conditioning[0].length
        weights = torch.zeros((size, self.kind.plan.sums, length))
        anything = False
        for number, row in enumerate(self.rows):
            call = row.pending.call
            if call.watch is not None and len(call.watch[row.at]):
                weights[number, 0, list(call.watch[row.at])] = 1.0
                anything = True
            for part in () if call.control is None or row.at else call.control.parts:
                if isinstance(part, Watch):
                    weights[number + part.row, : len(part.weights)] = part.weights
                    anything = True
        return weights if anything else None

    def _beside(self, size: int) -> dict[str, Tensor]:
        calls = [(row.pending.call, row.at) for row in self.rows]
        return {
            name: torch.stack(self._padded([call.beside[name][at] for call, at in calls], size))
            for name in calls[0][0].beside
        }

    def _cotangents(self, size: int) -> tuple[Callable[[Prediction], Prediction], ...] | None:
        given = [row.pending.call.cotangent for row in self.rows if row.pending.call.cotangent is not None]
        return tuple(self._padded(given, size)) if given else None

    def deliver(self, answer: NetworkAnswer) -> Iterator[PendingCall]:
        """Hand out the answers of a call; yields the calls that have all theirs."""
        for number, row in enumerate(self.rows):
            for pending, at in row.askers:
                pending.predictions[at] = answer.predictions[number]
                if answer.attention is not None and pending.call.watch is not None:
                    pending.attention[at] = answer.attention[number, 0]
                if answer.embedding_grads is not None:
                    pending.embedding_grads[at] = answer.embedding_grads[number]
                if pending.call.control is not None and at == 0:
                    group = pending.group
                    pending.seen = seen_by(pending.call.control, number, group, answer.attention, answer.recorded)
                pending.missing -= 1
                if pending.missing == 0:
                    yield pending

    @staticmethod
    def _padded(items: Sequence[Any], size: int) -> list[Any]:
        # Copies of a real row, not zeros: whatever a network does with zeros, it does not do here.
        return [*items, *[items[0]] * (size - len(items))]


class RowQueue:
    """Rows that wait for a network call, oldest first, by kind. A row that is asked for again while it waits is
    computed once."""

    def __init__(self) -> None:
        self._by_kind: OrderedDict[Kind, deque[CallRow]] = OrderedDict()
        self._waiting: dict[tuple[Any, ...], CallRow] = {}  # by sameness

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._by_kind.values())

    def push(self, pending: PendingCall) -> None:
        """Queue all rows of a call."""
        rows = self._by_kind.setdefault(pending.kind, deque())
        for at in range(len(pending.call.levels)):
            row = CallRow([(pending, at)])
            if (sameness := row.sameness) is not None:
                waiting = self._waiting.setdefault(sameness, row)
                if waiting is not row:
                    waiting.askers += row.askers
                    continue
            rows.append(row)

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
        for row in batch.rows:
            self._forget(row)
        if not rows:
            del self._by_kind[kind]
        return batch

    def put_back(self, batch: Batch) -> None:
        """Return the rows of a call that was not made to the head of their queue, in their order."""
        self._by_kind.setdefault(batch.kind, deque()).extendleft(reversed(batch.rows))

    def calls(self) -> list[PendingCall]:
        """Calls that wait for answers, once each."""
        rows = (row for waiting in self._by_kind.values() for row in waiting)
        return list(dict.fromkeys(asker for row in rows for asker, _ in row.askers))

    def too_large(self, call_size: int) -> list[PendingCall]:
        """Calls whose group does not fit into a network call, once each."""
        found = [
            row.pending for kind, rows in self._by_kind.items() if rows_per_call(kind, call_size) == 0 for row in rows
        ]
        return list(dict.fromkeys(found))

    def drop(self, pending: PendingCall) -> None:
        """Forget the rows of a call that failed, but for those that others asked for, too."""
        for kind, rows in list(self._by_kind.items()):
            for row in rows:
                if any(asker is pending for asker, _ in row.askers):
                    self._forget(row)
                    row.askers = [(asker, at) for asker, at in row.askers if asker is not pending]
            self._by_kind[kind] = deque(row for row in rows if row.askers)
            if not self._by_kind[kind]:
                del self._by_kind[kind]

    def _forget(self, row: CallRow) -> None:
        """No later asker may join a row."""
        sameness = row.sameness
        if sameness is not None and self._waiting.get(sameness) is row:
            del self._waiting[sameness]
