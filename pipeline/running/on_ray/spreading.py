"""One function over many jobs on the cluster: each worker builds it once, and has a job ahead of the one it is at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

import ray

from pipeline.common import stopping
from pipeline.running.on_ray.executor import (
    RESTARTS,
    SECONDS_BETWEEN_CHECKS,
    connect,
    named,
    resources_of_cluster,
)
from pipeline.running.pool import plan_pool
from pipeline.settings.sections import RunConfig

Job = TypeVar("Job")
Done = TypeVar("Done")
AHEAD = 2  # jobs of a worker: one that it does and one that waits


class Spread:
    """A worker: builds the function where it runs."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._do = make()

    def do(self, job: Any) -> Any:
        """One job."""
        return self._do(job)


def spread(make: Callable[[], Callable[[Job], Done]], jobs: Iterable[Job], run: RunConfig) -> Iterator[Done]:
    """What the function makes of every job, as it comes.

    Args:
        make: builds the function, once per worker; it and the jobs travel.
        jobs: what is to be done.
        run: how many workers, and what each reserves.

    Raises:
        ClusterError: there is no cluster, or a worker is lost again and again.
        Stopped: a signal came.
    """
    ours = connect()
    left = iter(jobs)
    pool = plan_pool(run, resources_of_cluster())
    worker = ray.remote(
        num_cpus=pool.cpus_per_worker, num_gpus=pool.gpus_per_worker, max_restarts=RESTARTS, max_task_retries=-1
    )(Spread)
    pending: dict[Any, Any] = {}
    try:
        workers = [worker.remote(make) for _ in range(pool.workers)]
        for _ in range(AHEAD):
            for one, job in zip(workers, islice(left, len(workers)), strict=False):
                pending[one.do.remote(job)] = one
        while pending:
            done, _ = ray.wait(list(pending), timeout=SECONDS_BETWEEN_CHECKS)
            stopping.check()
            for ref in done:
                one = pending.pop(ref)
                for job in islice(left, 1):
                    pending[one.do.remote(job)] = one
                yield ray.get(ref)
    except ray.exceptions.RayError as error:
        raise named(error) from error
    finally:
        with suppress(ray.exceptions.RayError):
            for ref in pending:
                ray.cancel(ref)
        if ours:
            ray.shutdown()
