"""How many workers a run gets, and what each of them reserves. Light to import: it stands below worker.py and Ray."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from pipeline.errors import ClusterError
from pipeline.recipe import RunConfig

IO_CPUS = 0.25  # of a read or write task. At Ray's default of 1, commits starve behind reads on small machines


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What every worker of a run has in common, decided before the first unit."""

    call_size: int  # rows of a UNet call
    threads: int  # of a CPU worker; another number gives other rounding
    workers: int  # that share the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What there is to work on. `max_gpus` counts those that an autoscaler may add; without one it equals `gpus`."""

    cpus: float
    gpus: float
    max_gpus: float
    node_cpus: float  # of the largest node
    node_gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Workers, and what each of them reserves."""

    workers: int
    gpus_per_worker: float
    cpus_per_worker: float
    threads: int

    def line(self, *, compiles: bool = False) -> str:
        """What runs without a GPU says so, and what seems to stand still at first."""
        said = []
        if not self.gpus_per_worker:
            said.append(f"no GPU in use: {self.workers} worker(s) on CPU in float32, {self.threads} thread(s) each")
        if compiles:
            said.append("UNet calls are compiled first (model.compile), which takes a minute or more")
        return "; ".join(said)


def plan_pool(run: RunConfig, have: Resources) -> Pool:
    """How many workers on what.

    Raises:
        ClusterError: more GPUs are asked for than there are and can be; says the numbers.
    """
    auto = run.gpus_per_worker == "auto"
    per_worker = (1.0 if have.max_gpus > 0 else 0.0) if auto else float(run.gpus_per_worker)
    if per_worker == 0.0:
        return _cpu_pool(run.workers if isinstance(run.workers, int) else 1, have)
    workers = run.workers if isinstance(run.workers, int) else max(1, int(have.max_gpus // per_worker))
    # A node that the autoscaler has not started yet may be larger than those that run.
    fits_a_node = have.max_gpus > have.gpus or per_worker <= have.node_gpus
    if workers * per_worker > have.max_gpus or not fits_a_node:
        raise ClusterError(
            f"run.workers {workers} x run.gpus_per_worker {per_worker:g} asks for {workers * per_worker:g} GPU(s); "
            f"there are {have.gpus:g}, at most {have.node_gpus:g} on one node, and autoscaling can bring them to "
            f"{have.max_gpus:g}. Lower run.workers or run.gpus_per_worker (0 works on CPUs), or add GPUs"
        )
    return Pool(workers=workers, gpus_per_worker=per_worker, cpus_per_worker=0.0, threads=1)


# Of a CPU that a worker reserves, whatever its threads use: the workers of an aborted run may live on for a while, and
# the next run in the same process needs room beside them.
LARGEST_SHARE = 0.5


def _cpu_pool(workers: int, have: Resources) -> Pool:
    # Something is left for reading and writing, or nothing would be edited; on each node, since others may be lost.
    share = max(0.01, min((have.cpus - 2 * IO_CPUS) / workers, have.node_cpus - 2 * IO_CPUS, LARGEST_SHARE))
    on_a_node = math.ceil(workers * have.node_cpus / max(1.0, have.cpus))
    return Pool(
        workers=workers,
        gpus_per_worker=0.0,
        cpus_per_worker=int(share * 100) / 100,
        threads=cpu_threads(on_a_node, have.node_cpus),
    )


def cpu_threads(workers: int, cores: float) -> int:
    """Threads of one of `workers` on a machine of so many cores. OMP_NUM_THREADS goes first, as everywhere."""
    if (wish := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(wish) > 0:
        return int(wish)
    return max(1, int(cores) // max(1, workers))
