"""How many workers a run gets, and what each of them reserves. Light to import: it stands below worker.py and Ray."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from pipeline.engine.tuning import NOT_TUNED, UNTUNED, Fit, Tuned, Tuning
from pipeline.errors import ClusterError
from pipeline.recipe import RunConfig
from pipeline.settings.sections import WorkerRange

# CPUs of a read or write task: so few that workers always leave room for some. At Ray's default of 1, or a share that
# workers can use up, nothing would be read or committed on a cluster that has lost nodes. Not 0, or tasks would also
# run on a head node that offers no CPU, to be left alone. Their number is limited elsewhere.
IO_CPUS = 0.001
UNITS_AT_ONCE = 2  # of a worker: the tail of one unit and the head of the next share network calls
ENCODERS = 2  # threads of a worker that restore and encode, beside a model on CPUs
MOST_ENCODERS = 16
RAYS_DIGITS = 10_000  # parts of a resource in which Ray counts


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What every worker of a run has in common, decided before the first unit."""

    call_size: int  # rows of a network call
    threads: int  # of a CPU worker; another number gives other rounding
    tuned: Tuned = NOT_TUNED  # how the network runs
    encoders: int = ENCODERS  # threads that restore and encode


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

    workers: int  # at the start
    fewest: int  # that Ray keeps asking for, whether or not there is room
    most: int  # as room comes; equals `fewest` in a pool of fixed size
    gpus_per_worker: float
    cpus_per_worker: float
    threads: int
    encoders: int = ENCODERS

    def settings(self, fit: Fit, threads: int | None) -> WorkerSettings:
        """Of its workers. `threads`: what an earlier driver of the run has decided."""
        return WorkerSettings(
            call_size=fit.call_size, threads=threads or self.threads, tuned=fit.tuned, encoders=self.encoders
        )

    def line(self, *, tuning: Tuning = UNTUNED) -> str:
        """A line for the user: no GPU in use; how the network runs, and that compiling takes its time."""
        said = []
        if not self.gpus_per_worker:
            count = f"{self.workers}" if self.fewest == self.most else f"{self.fewest} to {self.most}"
            said.append(f"no GPU in use: {count} worker(s) on CPU in float32, {self.threads} thread(s) each")
        if tuning != UNTUNED:
            said.append(f"the network runs {tuning}")
        if tuning.execution != "eager":
            said.append("every kind of call is compiled first (model.compile), which takes a minute or more")
        return "; ".join(said)


def plan_pool(run: RunConfig, have: Resources) -> Pool:
    """How many workers on what.

    Raises:
        ClusterError: more GPUs are asked for than there are and can be; says the numbers.
    """
    auto = run.gpus_per_worker == "auto"
    per_worker = (1.0 if have.max_gpus > 0 else 0.0) if auto else float(run.gpus_per_worker)
    fewest, most = _wish(run.workers, max(1, int(have.max_gpus // per_worker)) if per_worker else 1)
    if per_worker == 0.0:
        return _cpu_pool(fewest, most, have)
    # A node that the autoscaler has not started yet may be larger than those that run.
    fits_a_node = have.max_gpus > have.gpus or per_worker <= have.node_gpus
    if fewest * per_worker > have.max_gpus or not fits_a_node:
        key = "run.workers.min" if fewest < most else "run.workers"
        raise ClusterError(
            f"{key} {fewest} x run.gpus_per_worker {per_worker:g} asks for {fewest * per_worker:g} GPU(s); "
            f"there are {have.gpus:g}, at most {have.node_gpus:g} on one node, and autoscaling can bring them to "
            f"{have.max_gpus:g}. Lower {key} or run.gpus_per_worker (0 works on CPUs), or add GPUs"
        )
    return Pool(
        workers=min(most, max(fewest, int(have.gpus // per_worker))),
        fewest=fewest,
        most=most,
        gpus_per_worker=per_worker,
        cpus_per_worker=0.0,
        threads=1,
        encoders=_encoders(have, per_worker),
    )


def _encoders(have: Resources, gpus_per_worker: float) -> int:
    """A worker's share of its node's CPUs, but for the one that feeds the GPU."""
    share = have.node_cpus * gpus_per_worker / max(have.node_gpus, gpus_per_worker)
    return min(MOST_ENCODERS, max(ENCODERS, int(share) - 1))


def _wish(workers: int | str | WorkerRange, auto: int) -> tuple[int, int]:
    if isinstance(workers, WorkerRange):
        return workers.min, workers.max
    return (workers, workers) if isinstance(workers, int) else (auto, auto)


# What a worker of a fixed pool reserves of a CPU, at most and whatever its threads use: the workers of an aborted run
# may live on for a while, and the next run in the same process needs room beside them.
LARGEST_SHARE = 0.5


def _cpu_pool(fewest: int, most: int, have: Resources) -> Pool:
    threads = cpu_threads(math.ceil(most * have.node_cpus / max(1.0, have.cpus)), have.node_cpus)
    if fewest == most:
        share = min(LARGEST_SHARE, 1 / math.ceil(most / max(have.cpus, 1.0)))
    else:  # what it computes with: the pool grows as room for that comes
        share = min(float(threads), have.node_cpus)
    return Pool(
        workers=min(most, max(fewest, int(have.cpus // share))),
        fewest=fewest,
        most=most,
        gpus_per_worker=0.0,
        cpus_per_worker=_share(share),
        threads=threads,
    )


def _share(cpus: float) -> float:
    """A little less than so many CPUs: workers never fill a node, as the last one may have to do for all else."""
    return max(IO_CPUS, math.floor((cpus - 2 * IO_CPUS) * RAYS_DIGITS) / RAYS_DIGITS)


def cpu_threads(workers: int, cores: float) -> int:
    """Threads of one of `workers` on a machine of so many cores. OMP_NUM_THREADS goes first, as everywhere."""
    if (wish := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(wish) > 0:
        return int(wish)
    return max(1, int(cores) // max(1, workers))
