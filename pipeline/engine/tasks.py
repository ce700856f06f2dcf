"""What an engine keeps of the generators that it runs: whose they are, where their results go, what they cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.engine.calls import Call, Steps


@dataclass(slots=True)
class EngineStats:
    """What an engine has done since it was made."""

    network_rows: int = 0  # rows that somebody asked for
    shared_rows: int = 0  # of these, rows that another row's answer served
    padded_rows: int = 0  # rows that only filled a call up
    busy_seconds: float = 0.0  # in which the model had a call to work on


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one generator."""

    index: int  # its place in what `run` was given
    value: Any  # what it returned; None where it failed
    error: Exception | None
    network_rows: int  # that it, and what it forked, asked for


@dataclass(slots=True, eq=False)
class Task:
    """One generator."""

    generator: Generator[Call, Any, Any]
    session: Session
    index: int
    parent: Task | None = None
    children: list[Any] = field(default_factory=list)  # results of a fork, by place
    unfinished_children: int = 0
    network_rows: int = 0

    @property
    def is_wanted(self) -> bool:
        """Whether anybody fetches what it comes to."""
        return not self.session.is_left


@dataclass(slots=True, eq=False)
class Session:
    """One call of `run`: where its generators come from and where its results go."""

    source: Iterator[Steps[Any] | None]
    rank: int  # of sessions with places to fill the lowest goes first; equals take turns
    admitted: int = 0
    running: int = 0
    answered_rows: int = 0
    exhausted: bool = False
    finished: deque[Finished] = field(default_factory=deque)
    failure: BaseException | None = None  # raised by the source itself
    is_left: bool = False  # nobody fetches results any more

    @property
    def is_over(self) -> bool:
        """Whether everything was fetched."""
        return self.exhausted and self.running == 0 and not self.finished
