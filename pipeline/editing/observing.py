"""What an editor's steps did, for whoever looks on: tests, replays of recordings, study. In a run nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step did."""

    step: int
    latents: Tensor  # (C, h, w) after the step
    masks: Tensor  # (E, h, w) bool, false where the concept is inactive
    attention: Tensor | None = None  # (E, h / 4, w / 4) before smoothing, 0 where not watched
    source_latents: Tensor | None = None  # (C, h, w) of the source branch after the step, where there is one
    details: Mapping[str, Tensor] = field(default_factory=dict)  # what else a method can show of a step


Observer = Callable[[StepRecord], None]

_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


def observer() -> Observer | None:
    """Who is told of each step. None: nobody, and what only they would read is not computed."""
    return _observer.get()


@contextmanager
def observed_by(tell: Observer) -> Iterator[None]:
    """Have editors tell of their steps, in this thread. A source branch is then walked to the end."""
    token = _observer.set(tell)
    try:
        yield
    finally:
        _observer.reset(token)
