"""Watches a pool of Ray Data's while it works: how many workers live, and whether units wait for dead ones.

Ray restarts a worker that died, and keeps its units for it. Where its node is gone for good and no other has room,
they wait for ever: the other workers finish what is left, and then nothing moves. Then the driver is told, and begins
another pass over what is not committed, with the workers that are left (executor.py).

Ray Data calls a watch at each step of its executor (`DataContext.custom_execution_callback_classes`). Its pools tell
publicly how many workers restart, but not which of them have units in hand: that is read from a private attribute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

# of standstill: a restarted worker may first have to load its model, or a new node to come for it
STRANDED_AFTER_S = 120.0


class StrandedError(Exception):
    """Units wait for workers that cannot be restarted, and everything else is done.

    Args:
        workers: that are alive, all of them idle.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.workers = workers


class PoolWatch:
    """Ray Data's callback, for one execution.

    Args:
        resized: told of the number of living workers whenever it changes.
        clock: in seconds.
    """

    def __init__(self, resized: Callable[[int], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._resized, self._clock = resized, clock
        self._workers = 0
        self._since: float | None = None  # when nothing has moved any more
        self._then: list[tuple[int, ...]] = []  # how far the operators were

    def before_execution_starts(self, executor: Any) -> None:
        """Nothing is known yet."""

    def on_execution_step(self, executor: Any) -> None:
        """Look at the pool.

        Raises:
            StrandedError: which ends the execution.
        """
        operators = list(executor._topology)
        workers = [
            worker
            for operator in operators
            for pool in operator.get_autoscaling_actor_pools()
            for worker in pool._running_actors.values()
        ]
        alive = [worker for worker in workers if not worker.is_restarting]
        if len(alive) != self._workers:
            self._workers = len(alive)
            self._resized(len(alive))
        idle = not any(worker.num_tasks_in_flight for worker in alive)
        self._judge(len(alive), idle and len(alive) < len(workers), [_how_far(operator) for operator in operators])

    def _judge(self, alive: int, waits: bool, now: list[tuple[int, ...]]) -> None:
        if not (alive and waits and now == self._then):
            self._since, self._then = None, now
        elif self._since is None:
            self._since = self._clock()
        elif self._clock() - self._since >= STRANDED_AFTER_S:
            raise StrandedError(alive)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing is left to watch."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """The driver is told by the error itself."""


def _how_far(operator: Any) -> tuple[int, ...]:
    return operator.num_active_tasks(), operator.metrics.num_tasks_finished, operator.metrics.num_outputs_taken


def stranded(error: BaseException) -> StrandedError | None:
    """What a watch raised, in whatever Ray Data wrapped it."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, StrandedError):
            return at
        at = at.__cause__ or at.__context__
    return None
