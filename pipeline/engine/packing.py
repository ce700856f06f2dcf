"""Packing: the rows of all pending `Denoise` and `Product` calls, in network calls of one fixed shape.

In calls of one shape a row's answer does not depend on its neighbours, bit for bit; across shapes it does, in the last
digits. So a short call is filled up with copies that nobody reads, and results depend on the call size alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Prediction
from pipeline.engine.arriving import begin_copy
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import Denoise, NetworkAnswer, NetworkCall, Product
from pipeline.engine.controls import Watch
from pipeline.engine.pending import Kind, PendingCall, PendingDenoise, PendingProduct, rows_per_call
from pipeline.engine.stacking import seen_by


@dataclass(slots=True, eq=False)
class CallRow:
    """One row of a network call, and everyone who asked for it: a call and the place of the row in it."""

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
        here = (*self.pending.kind, _place_of(call.latents[at]), call.levels[at], id(call.conditioning[at]))
        if isinstance(call, Product):
            return (*here, _place_of(call.vectors[at]))
        if call.control is not None or call.beside or call.cotangent is not None:
            return None
        return (*here, () if call.watch is None else tuple(call.watch[at]))


def _place_of(latents: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory. While it is held, nothing else can lie there."""
    return latents.data_ptr(), latents.stride()


@dataclass(slots=True)
class Batch(ABC):
    """The rows of one network call, not yet padded; groups stand together."""

    rows: list[CallRow]

    @staticmethod
    def of(rows: list[CallRow]) -> Batch:
        """Rows of one kind."""
        return ProductBatch(rows) if isinstance(rows[0].pending, PendingProduct) else DenoiseBatch(rows)

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

    def singly(self) -> list[Batch]:
        """Group by group."""
        return [Batch.of(group) for group in self.groups]

    @abstractmethod
    def ask(self, backbone: Backbone, size: int) -> Any:
        """Make the call of `size` rows, filled up with copies of its first ones. Its answer is on its way to the CPU.

        Methods compute there in float32: cheap beside a network call, and the same bits on every kind of GPU.
        """

    def deliver(self, answer: Any) -> Iterator[PendingCall]:
        """Hand out the answers of a call; yields the calls that have all theirs."""
        for number, row in enumerate(self.rows):
            for pending, at in row.askers:
                self._give(pending, at, number, answer)
                pending.missing -= 1
                if pending.missing == 0:
                    yield pending

    @abstractmethod
    def _give(self, pending: PendingCall, at: int, number: int, answer: Any) -> None:
        """Row `number` of an answer is that of row `at` of a call."""

    @staticmethod
    def _padded(items: Sequence[Any], size: int) -> list[Any]:
        # Copies of a real row, not zeros: whatever a network does with zeros, it does not do here.
        return [*items, *[items[0]] * (size - len(items))]


class ProductBatch(Batch):
    """Jacobian products of one mode."""

    @override
    def ask(self, backbone: Backbone, size: int) -> Tensor:
        rows = [(row.pending.call, row.at) for row in self.rows if isinstance(row.pending, PendingProduct)]
        call = Product(
            latents=torch.stack(self._padded([call.latents[at] for call, at in rows], size)),
            levels=self._padded([call.levels[at] for call, at in rows], size),
            conditioning=self._padded([call.conditioning[at] for call, at in rows], size),
            vectors=torch.stack(self._padded([call.vectors[at] for call, at in rows], size)),
            mode=rows[0][0].mode,
        )
        return begin_copy(backbone.product(call))

    @override
    def _give(self, pending: PendingCall, at: int, number: int, answer: Tensor) -> None:
        assert isinstance(pending, PendingProduct), "rows of one kind ask for the same"
        pending.products[at] = answer[number]


class DenoiseBatch(Batch):
    """Predictions."""

    @property
    def _calls(self) -> list[tuple[Denoise, int]]:
        """Of each row the call that asked first, and its place there."""
        return [(row.pending.call, row.at) for row in self.rows if isinstance(row.pending, PendingDenoise)]

    @override
    def ask(self, backbone: Backbone, size: int) -> NetworkAnswer:
        return backbone.denoise(self.as_call(size)).each(begin_copy)

    def as_call(self, size: int) -> NetworkCall:
        """The call of `size` rows, filled up with copies of its first ones."""
        kind, rows = self.kind, self._calls
        controls = [(first, rows[first][0].control) for first in range(0, len(rows), kind.group)]
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
        places = [(*_place_of(call.latents[at]), call.levels[at]) for call, at in self._calls]
        return self._padded([first.setdefault(place, number) for number, place in enumerate(places)], size)

    def _watch(self, size: int) -> Tensor | None:
        """(size, S, L): the weights of everything that is watched; None where nothing is."""
        length = self._calls[0][0].conditioning[0].length
        weights = torch.zeros((size, self.kind.plan.sums, length))
        anything = False
        for number, (call, at) in enumerate(self._calls):
            if call.watch is not None and len(call.watch[at]):
                weights[number, 0, list(call.watch[at])] = 1.0
                anything = True
            for part in () if call.control is None or at else call.control.parts:
                if isinstance(part, Watch):
                    weights[number + part.row, : len(part.weights)] = part.weights
                    anything = True
        return weights if anything else None

    def _beside(self, size: int) -> dict[str, Tensor]:
        calls = self._calls
        return {
            name: torch.stack(self._padded([call.beside[name][at] for call, at in calls], size))
            for name in calls[0][0].beside
        }

    def _cotangents(self, size: int) -> tuple[Callable[[Prediction], Prediction], ...] | None:
        given = [call.cotangent for call, _ in self._calls if call.cotangent is not None]
        return tuple(self._padded(given, size)) if given else None

    @override
    def _give(self, pending: PendingCall, at: int, number: int, answer: NetworkAnswer) -> None:
        assert isinstance(pending, PendingDenoise), "rows of one kind ask for the same"
        pending.predictions[at] = answer.predictions[number]
        if answer.attention is not None and pending.call.watch is not None:
            pending.attention[at] = answer.attention[number, 0]
        if answer.embedding_grads is not None:
            pending.embedding_grads[at] = answer.embedding_grads[number]
        if pending.call.control is not None and at == 0:
            group = pending.group
            pending.seen = seen_by(pending.call.control, number, group, answer.attention, answer.recorded)


class RowQueue:
    """Rows that wait for a network call, oldest first, by kind. A row that is asked for again before its answer is
    there is computed once."""

    def __init__(self) -> None:
        self._by_kind: OrderedDict[Kind, deque[CallRow]] = OrderedDict()
        self._unanswered: dict[tuple[Any, ...], CallRow] = {}  # by sameness; in a call or not yet

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._by_kind.values())

    def push(self, pending: PendingCall) -> None:
        """Queue all rows of a call."""
        rows = self._by_kind.setdefault(pending.kind, deque())
        for at in range(len(pending.call.levels)):
            row = CallRow([(pending, at)])
            if (sameness := row.sameness) is not None:
                waiting = self._unanswered.setdefault(sameness, row)
                if waiting is not row:
                    waiting.askers += row.askers
                    continue
            rows.append(row)

    def has_full(self, call_size: int) -> bool:
        """Whether some kind fills a call."""
        return any(len(rows) >= rows_per_call(kind, call_size) for kind, rows in self._by_kind.items())

    def pop(self, call_size: int) -> Batch:
        """The next call: of a kind that fills one if any does, else of the kind that fills most of one.

        Others may still ask for its rows, until `forget`.
        """

        def filled(kind: Kind) -> float:
            return min(len(self._by_kind[kind]) / rows_per_call(kind, call_size), 1.0)

        kind = max(self._by_kind, key=filled)
        rows = self._by_kind[kind]
        batch = Batch.of([rows.popleft() for _ in range(min(rows_per_call(kind, call_size), len(rows)))])
        if not rows:
            del self._by_kind[kind]
        return batch

    def put_back(self, batch: Batch) -> None:
        """Return the rows of a call that was not made to the head of their queue, in their order."""
        self._by_kind.setdefault(batch.kind, deque()).extendleft(reversed(batch.rows))

    def forget(self, batch: Batch) -> None:
        """The rows of a call have their answers: who asks for them from now on asks anew."""
        for row in batch.rows:
            self._forget(row)

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
        if sameness is not None and self._unanswered.get(sameness) is row:
            del self._unanswered[sameness]
