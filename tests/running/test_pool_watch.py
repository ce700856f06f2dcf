"""When units wait for workers that cannot come back, by a fake executor; a real one: test_cluster_that_changes.py."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.running.on_ray.pool_watch import STRANDED_AFTER_S, PoolWatch, StrandedError, stranded


class Executor:
    """One operator with a pool, one without."""

    def __init__(self) -> None:
        self.workers: list[Any] = []
        self.active = self.finished = 0
        pool = SimpleNamespace(_running_actors={})
        self._pool = pool
        self._topology = {self._operator([pool]): None, self._operator([]): None}

    def _operator(self, pools: list[Any]) -> Any:
        executor = self

        class Operator:
            metrics = SimpleNamespace(num_tasks_finished=0, num_outputs_taken=0)

            def get_autoscaling_actor_pools(self) -> list[Any]:
                return pools

            def num_active_tasks(self) -> int:
                return executor.active

        return Operator()

    def has(self, *workers: tuple[bool, int]) -> None:
        """Workers as (restarting, units in hand)."""
        self._pool._running_actors = {
            number: SimpleNamespace(is_restarting=restarting, num_tasks_in_flight=units)
            for number, (restarting, units) in enumerate(workers)
        }


ALIVE, BUSY, DEAD_WITH_UNITS = (False, 0), (False, 1), (True, 3)


def steps(workers: list[Any]) -> Iterator[list[int]]:
    """Steps of a pool in which nothing moves, the last after the time that makes it stranded. Gives the sizes told."""
    now, executor, sizes = [0.0], Executor(), []
    watch = PoolWatch(sizes.append, clock=lambda: now[0])
    executor.has(*workers)
    for at in (0.0, 0.0, STRANDED_AFTER_S - 1, STRANDED_AFTER_S + 1):
        now[0] = at
        watch.on_execution_step(executor)
        yield sizes


@pytest.mark.parametrize(
    "workers",
    [
        [ALIVE, DEAD_WITH_UNITS],
        [ALIVE, (True, 0)],  # a finished unit went with its node: only its worker can make it again
    ],
)
def test_a_pass_ends_where_only_dead_workers_have_anything_left_to_do(workers: list[Any]) -> None:
    taken = steps(workers)
    assert [next(taken) for _ in range(3)] == [[1]] * 3
    with pytest.raises(StrandedError) as caught:
        next(taken)
    assert caught.value.workers == 1


@pytest.mark.parametrize(
    ("workers", "told"),
    [
        ([BUSY, DEAD_WITH_UNITS], [1]),
        ([DEAD_WITH_UNITS], []),  # nobody is left to go on: a node must come
        ([ALIVE, ALIVE], [2]),
    ],
)
def test_a_pass_goes_on_where_a_living_worker_is_busy_or_none_is_dead_or_none_lives(
    workers: list[Any], told: list[int]
) -> None:
    assert list(steps(workers)) == [told] * 4


def test_whatever_moves_puts_the_end_off_and_a_worker_that_is_back_calls_it_off() -> None:
    now, executor, sizes = [0.0], Executor(), []
    watch = PoolWatch(sizes.append, clock=lambda: now[0])
    executor.has(ALIVE, DEAD_WITH_UNITS)
    for executor.active in range(5):  # read tasks begin and end
        watch.on_execution_step(executor)
        watch.on_execution_step(executor)
        now[0] += STRANDED_AFTER_S - 1
        watch.on_execution_step(executor)
    executor.has(ALIVE, (False, 3))
    now[0] += 2
    watch.on_execution_step(executor)
    executor.has(ALIVE, DEAD_WITH_UNITS)
    watch.on_execution_step(executor)
    assert sizes == [1, 2, 1]


def test_the_end_is_found_in_whatever_it_is_wrapped() -> None:
    outer = RuntimeError("of Ray Data's")
    outer.__cause__ = StrandedError(2)
    assert stranded(outer) is outer.__cause__
    assert stranded(RuntimeError("another")) is None
