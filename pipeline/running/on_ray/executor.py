"""Units edited on Ray Data: what stands here needs the extra `cluster`.

    read task > pool of workers, one model each > datasink

Ray carries units (blocks.py) and restarts what dies. Where workers are lost for good, a second pass does their units.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import chain
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink, Datasource
from ray.data.datasource import ReadTask as RayReadTask
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from typing_extensions import override

from pipeline.common import stopping
from pipeline.common.showing import describe
from pipeline.common.stderr_filter import without_lines
from pipeline.engine.backbone import ModelRecord
from pipeline.engine.tuning import Fit, Tell
from pipeline.errors import ClusterError, DeviceError, ModelError, RunAborted, ServerError, ShardeditError, SinkError
from pipeline.reading.shards import ReadTask, shard_slug
from pipeline.reading.units import read_units
from pipeline.recipe import Recipe, SinkConfig, SourceConfig
from pipeline.running.in_process import Executor
from pipeline.running.on_ray.blocks import pack_finished, pack_input, unpack_finished, unpack_input
from pipeline.running.on_ray.data_context import data_context
from pipeline.running.on_ray.metering import MeteredTally, WorkerMeter, run_name
from pipeline.running.on_ray.pool_watch import stranded
from pipeline.running.pool import IO_CPUS, UNITS_AT_ONCE, Pool, Resources, WorkerSettings, plan_pool
from pipeline.running.tally import InFlight, Seen
from pipeline.running.todo import Todo
from pipeline.writing.attempts import note_stop
from pipeline.writing.commit import Committed, commit
from pipeline.writing.lock import Claim
from pipeline.writing.merged import Contents
from pipeline.writing.merging import Job, build
from pipeline.writing.run_record import RunRecord

# Read and write tasks import this module and need neither model nor engine: those are imported in the functions that
# use them, which halves the start of a process.

log = logging.getLogger(__name__)

# What Ray adds to the text of an error.
RAYS_ADVICE = re.compile(r"\nFailed to [^\n]+ attempts \(total backoff .*", re.DOTALL)

UNITS_PER_WORKER = 3  # at work or fetched; with those in the sink, what a kill may cost
# Of a worker or task; Ray's default is without end. A row that kills its process costs three (writing/attempts.py), so
# a worker outlives half a dozen of them; after that the job fails, and the same command goes on.
RESTARTS = 20
MERGE_CPUS = 0.5  # of a task that merges the files of units: it copies more than it computes
# Ray's core says this, as an error, of every pool of Ray Data's that may restart its workers (ray-project/ray#57733).
# What it warns of cannot happen here: the arguments stand on the driver's node, with which the run ends.
RAYS_WARNING = "has constructor arguments in the object store and max_restarts > 0"
# Its core says this, again and again, where a signal reached the processes of a local Ray as well.
RAYS_COMPLAINT = "Failed to push error to driver for task"
DEVICE_FAILED = 70  # exit code of a worker whose device has failed
SECONDS_TO_ANSWER = 5.0  # of a tally; one whose cluster has died never does
SECONDS_BETWEEN_CHECKS = 0.2  # for a signal, while a task is waited for
SECONDS_BETWEEN_REPORTS = 0.5  # of a worker, about what it has finished


def resources_of_cluster() -> Resources:
    """Of the Ray cluster that this process is connected to."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = ray.cluster_resources()
    gpus = have.get("GPU", 0.0)
    # Internal to Ray, and what its own libraries ask for this; without an autoscaler it is None.
    limits = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return Resources(
        cpus=have.get("CPU", 0.0),
        gpus=gpus,
        max_gpus=max(gpus, float(limits.get("GPU", 0))),
        node_cpus=max((node.get("CPU", 0.0) for node in nodes), default=0.0),
        node_gpus=max((node.get("GPU", 0.0) for node in nodes), default=0.0),
    )


class RayExecutor(Executor):
    """Ray Data, on a cluster of its own on this machine or on the one that RAY_ADDRESS names."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._ours = False
        self._last_seen = Seen()
        self._tally: Any = None
        self._until_closed = ExitStack()

    @override
    def open(self, before: RunRecord | None, tell: Tell) -> str:
        recipe = self._recipe
        self._ours = connect()
        self._until_closed.enter_context(without_lines(RAYS_WARNING, RAYS_COMPLAINT))
        self.pool = pool = plan_pool(recipe.run, resources_of_cluster())
        self.model, fitted = self._describe_model(before, tell)
        self.settings = pool.settings(fitted, before.threads if before else None)
        # On the driver's own node, with which it lives and dies.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        tally = ray.remote(num_cpus=0, scheduling_strategy=here)(MeteredTally)
        self._tally = tally.remote(recipe.run, run_name(recipe.sink))
        return pool.line(tuning=fitted.tuned.tuning)

    def _describe_model(self, before: RunRecord | None, tell: Tell) -> tuple[ModelRecord, Fit]:
        """What workers will load, from where they will load it."""
        from pipeline.running.worker import describe_model

        if self._ours and not self.pool.gpus_per_worker:
            return describe_model(self._recipe, before, tell)  # the same machine: saves the start of a process
        options = {"num_gpus": self.pool.gpus_per_worker, "num_cpus": self.pool.cpus_per_worker}
        try:
            described: tuple[ModelRecord, Fit] = waited_for(
                ray.remote(**options)(describe_model).remote(self._recipe, before, tell)
            )
        except ray.exceptions.RayError as error:
            raise named(error) from error
        return described

    @override
    def edit(self, todo: Todo, claim: Claim) -> None:
        waited_for(self._tally.begin.remote(todo.extent))
        pool, tasks, committed = self.pool, todo.tasks, todo.committed
        while tasks:
            try:
                # A pool grows as soon as each of its workers has all the units that it may have.
                with data_context(self._tally, growing_at=UNITS_PER_WORKER / UNITS_AT_ONCE):
                    self._pass(tasks, committed, pool, claim)
                return
            except Exception as error:
                left = stranded(error)
                if left is None or self.seen().stop_reason:
                    reason = self._reason_of(error)
                    if not isinstance(reason, ClusterError):  # no worker's death: those that live end with the job
                        with suppress(SinkError):
                            note_stop(self._recipe.sink, claim.generation)
                    raise reason from error
            committed = waited_for(self._tally.committed.remote())
            tasks = todo.left_after(committed, self._recipe.run.unit_size)
            pool = replace(pool, workers=left.workers, fewest=left.workers)  # more where a node comes after all
            log.warning("units waited for workers that are lost for good: going on with %d worker(s)", pool.workers)

    def _reason_of(self, error: Exception) -> ShardeditError:
        seen, ours = self.seen(), named(error)
        if seen.stop_reason:
            return RunAborted(seen.stop_reason)
        if seen.load_error and isinstance(ours, ClusterError):
            return ModelError(f"a worker cannot load its model: {seen.load_error}")
        return ours

    def _pass(self, tasks: Sequence[ReadTask], committed: Committed, pool: Pool, claim: Claim) -> None:
        """Edit and commit what some tasks read. Ends early where what is left waits for lost workers."""
        recipe = self._recipe
        units = ray.data.read_datasource(
            UnitSource(tasks, recipe.source, recipe.run.unit_size, committed),
            num_cpus=IO_CPUS,
            concurrency=pool.most,
            override_num_blocks=len(tasks),
        )
        finished = units.map_batches(
            EditWorker,
            fn_constructor_args=(recipe, self.settings, self._tally, claim.generation),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.fewest,
                max_size=pool.most,
                initial_size=pool.workers,
                max_tasks_in_flight_per_actor=UNITS_PER_WORKER,
                max_concurrent_calls_per_actor=UNITS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_gpus=pool.gpus_per_worker or None,
            num_cpus=pool.cpus_per_worker,  # said also where it is 0: Ray gives workers on GPUs a CPU each otherwise
            max_restarts=RESTARTS,
            max_task_retries=-1,  # a node that does not answer uses them up within seconds; restarts are the limit
        )
        with stopping.interruptible():  # Ray Data takes its job down when it is left
            finished.write_datasink(
                UnitSink(claim, self._tally),
                ray_remote_args={"num_cpus": IO_CPUS},
                concurrency=pool.most,
            )

    @override
    def merge(self, sink: SinkConfig, jobs: Iterable[Job]) -> Iterator[Contents]:
        """A task per file; only so many are begun as the cluster has CPUs for."""
        jobs = iter(jobs)
        first = next(jobs, None)
        if first is None:
            return
        self._ours = connect() or self._ours
        task = ray.remote(num_cpus=MERGE_CPUS, max_retries=RESTARTS)(build)
        most = max(1, int(ray.cluster_resources().get("CPU", 1.0) / MERGE_CPUS))
        pending: deque[ray.ObjectRef[Contents]] = deque()
        try:
            for job in chain([first], jobs):
                pending.append(task.remote(sink, job))
                if len(pending) > most:
                    yield waited_for(pending.popleft())
            while pending:
                yield waited_for(pending.popleft())
        except ray.exceptions.RayError as error:
            raise named(error) from error

    @override
    def seen(self) -> Seen:
        if self._tally is not None and ray.is_initialized():
            try:
                self._last_seen = ray.get(self._tally.seen.remote(), timeout=SECONDS_TO_ANSWER)
            except ray.exceptions.RayError as error:
                log.debug("progress is not known: %s", describe(error))  # the job itself will say what is wrong
        return self._last_seen

    @override
    def stop(self, reason: str) -> None:
        if self._tally is not None:
            self._tally.stop.remote(reason)

    @override
    def close(self) -> None:
        with self._until_closed:
            if self._ours:
                ray.shutdown()


def connect() -> bool:
    """Join the cluster of RAY_ADDRESS (set inside a Ray job), or start one on this machine; whether that was needed.

    A cluster that happens to run on this machine is not joined unasked: it may be somebody's private one. On a head
    node, `RAY_ADDRESS=auto` asks for it.

    Raises:
        ClusterError: no cluster can be reached or started.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # "Token authentication is enabled", on every start: news to operators of a cluster, not to users of a private one.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # Ray's core would take SIGTERM for a crash, print a C++ stack and abort. Of its variable Ray takes note on import.
    ray._private.ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    try:
        with stopping.unchanged():  # Ray would let SIGTERM raise SystemExit wherever the main thread is
            if os.environ.get("RAY_ADDRESS"):
                ray.init(logging_level=logging.WARNING)
            else:
                ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    except Exception as error:  # a node that is too slow to start raises `Exception` itself
        raise ClusterError(
            f"Ray cannot be {'reached' if os.environ.get('RAY_ADDRESS') else 'started'} ({describe(error)}). Check "
            "RAY_ADDRESS and the token (RAY_AUTH_TOKEN), or set run.engine=local to work in one process"
        ) from error
    return True


def waited_for(ref: Any) -> Any:
    """What a task returns; a signal ends the wait.

    Raises:
        RayError: it failed.
        Stopped: see `stopping.check`.
    """
    while not ray.wait([ref], timeout=SECONDS_BETWEEN_CHECKS)[0]:
        stopping.check()
    return ray.get(ref)


class EditWorker:
    """One per GPU: the model is loaded in __init__, once, and used for every unit."""

    def __init__(self, recipe: Recipe, settings: WorkerSettings, tally: Any, generation: int) -> None:
        from pipeline.models.allocator import keep_freed_memory
        from pipeline.running.worker import Worker

        keep_freed_memory()  # the process is ours
        self._tally, self._told, self._generation = tally, 0.0, generation
        self._meter = WorkerMeter(run_name(recipe.sink), ray.get_runtime_context().get_actor_id()[:8])
        try:
            self._worker = Worker(recipe, settings, report=self._tell)
        except Exception as error:  # it loaded elsewhere: the driver has had it described
            where = f"on the node {ray.util.get_node_ip_address()}"
            ray.get(tally.cannot_load.remote(f"{describe(error)} ({where})"))
            raise
        stopping.overhear(signal.SIGTERM, self._worker.take_back)  # its node goes; Ray's own handler does the rest

    def _tell(self, report: InFlight) -> None:
        """Pass a report on, once in a while and without waiting: it may get lost, the commit counts."""
        if (now := time.monotonic()) - self._told >= SECONDS_BETWEEN_REPORTS:
            self._told = now
            self._tally.advance.remote(report)
            self._meter.tell(self._worker.engine.stats.busy_seconds)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One unit in, one out; called from `UNITS_AT_ONCE` threads."""
        workers = ray.get(self._tally.workers.remote())
        try:
            finished = self._worker.finish(unpack_input(batch), self._generation, workers)
        except DeviceError as error:  # this process is of no more use: Ray starts another, which gets its units
            log.error("%s", error)
            self._worker.take_back()
            os._exit(DEVICE_FAILED)
        except ServerError as error:  # Ray passes on another error and its own advice: the driver asks the tally why
            ray.get(self._tally.stop.remote(str(error)))
            raise
        self._meter.tell(self._worker.engine.stats.busy_seconds)
        return pack_finished(finished)


class UnitSource(Datasource):
    """Ray Data's side of reading: one task per shard or part of one, one block per unit as soon as it is read.

    Ray's own readers are no choice: a damaged tar header ends a shard without an error, and keys with dots merge.
    """

    def __init__(self, tasks: Sequence[ReadTask], source: SourceConfig, unit_size: int, committed: Committed) -> None:
        super().__init__()
        self._tasks, self._source, self._unit_size, self._committed = tasks, source, unit_size, committed

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[RayReadTask]:
        """The plan's tasks; Ray's wish for parallelism changes nothing."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            RayReadTask(
                functools.partial(
                    _blocks, task, self._source, self._unit_size, self._committed.of_shard(shard_slug(task.shard.path))
                ),
                unknown,
            )
            for task in self._tasks
        ]

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: an estimate would make Ray split tasks."""
        return None


def _blocks(task: ReadTask, source: SourceConfig, unit_size: int, committed: Committed) -> Iterator[pa.Table]:
    for unit_input in read_units(task, source, unit_size, committed.has):
        yield pack_input(unit_input)


class UnitSink(Datasink[None]):
    """Ray Data's side of writing. A unit may come twice, after a lost node: committing again leaves the same files.

    Args:
        claim: the driver's, on the folder where units go.
        tally: the actor that counts.
    """

    def __init__(self, claim: Claim, tally: Any) -> None:
        self._claim, self._tally = claim, tally

    def write(self, blocks: Any, ctx: Any) -> None:
        """Commit the units of some blocks.

        Raises:
            RunAborted: an error budget is spent, or another driver has taken over.
        """
        for block in blocks:
            for finished in unpack_finished(block):
                manifest = commit(finished, self._claim.sink, self._claim.check)
                if reason := ray.get(self._tally.add.remote(manifest)):
                    raise RunAborted(reason)


def named(error: BaseException) -> ShardeditError:
    """The error of ours that Ray wrapped in its own, or a short one of the cluster."""
    at: BaseException | None = error
    while at is not None:
        cause = getattr(at, "cause", at)  # a RayTaskError poses as its cause, and carries it
        if isinstance(cause, ShardeditError):
            cause.args = tuple(RAYS_ADVICE.sub("", one) if isinstance(one, str) else one for one in cause.args)
            return cause
        at = at.__cause__
    last = (str(error).strip().splitlines() or [""])[-1][:300]
    node = ray._private.worker.global_worker.node
    logs = f" Ray's logs: {node.get_session_dir_path()}/logs" if node is not None else ""
    return ClusterError(
        f"the job failed on Ray ({type(error).__name__}: {last}). What is committed stays: the same command goes on "
        f"from there.{logs}"
    )
