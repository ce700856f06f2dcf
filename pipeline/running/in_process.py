"""Executors, which edit units: what each offers, and the plain one, a loop in this process."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

import torch
from typing_extensions import override

from pipeline.common import stopping
from pipeline.engine.backbone import ModelRecord
from pipeline.errors import RunAborted
from pipeline.reading.units import read_units
from pipeline.recipe import Recipe, SinkConfig
from pipeline.running.pool import UNITS_AT_ONCE, Resources, WorkerSettings, plan_pool
from pipeline.running.tally import Seen, Tally
from pipeline.running.todo import Todo
from pipeline.samples import UnitInput
from pipeline.writing.commit import FinishedUnit, commit
from pipeline.writing.lock import Claim
from pipeline.writing.merged import Contents
from pipeline.writing.merging import Job, merge_here
from pipeline.writing.run_record import RunRecord

if TYPE_CHECKING:
    # The model's libraries are imported by whoever loads one: see on_ray/executor.py.
    from pipeline.running.worker import Worker


SECONDS_BETWEEN_CHECKS = 0.1  # for a signal, while units are at work
HELD_BYTES = 64 << 20  # of rows at work, beyond which the next unit is not read yet


class Executor(Protocol):
    """Edits units, in this process or elsewhere."""

    model: ModelRecord
    settings: WorkerSettings

    def open(self, before: RunRecord | None) -> str:
        """Get ready; fixes `model` and `settings`. Returns a line for the user, or ""."""

    def edit(self, todo: Todo, claim: Claim) -> None:
        """Edit and commit every unit of the plan, for the driver that holds the run's folder."""

    def merge(self, sink: SinkConfig, jobs: Iterable[Job]) -> Iterator[Contents]:
        """Write merged files; returns what they hold, in the order of the jobs. May come without `open`."""

    def seen(self) -> Seen:
        """What has been committed so far."""

    def stop(self, reason: str) -> None:
        """Let `edit` raise `RunAborted` with the next commit. Called from another thread."""

    def close(self) -> None:
        """End the workers; free the model."""


class LocalExecutor(Executor):
    """One process, one unit after the other; the tail of one shares network calls with the head of the next."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._tally = Tally(recipe.run)
        self._worker: Worker | None = None
        self._threads_before = torch.get_num_threads()

    @override
    def open(self, before: RunRecord | None) -> str:
        from pipeline.models.loading import load_backbone
        from pipeline.running.worker import Worker, fit

        recipe = self._recipe
        pool = plan_pool(recipe.run.model_copy(update={"workers": 1}), resources_here())
        backbone = load_backbone(recipe.model, device=None if pool.gpus_per_worker else "cpu")
        self.model, fitted = backbone.record, fit(recipe, backbone, before)
        self.settings = pool.settings(fitted, before.threads if before else None)
        self._worker = Worker(recipe, self.settings, backbone, report=self._tally.advance)
        return pool.line(tuning=fitted.tuned.tuning)

    @override
    def edit(self, todo: Todo, claim: Claim) -> None:
        source, size = self._recipe.source, self._recipe.run.unit_size
        self._tally.begin(todo.extent)
        units = (unit for task in todo.tasks for unit in read_units(task, source, size, todo.committed.has))
        with closing(self._finished(units, claim.generation)) as finished:
            for unit in finished:
                manifest = commit(unit, self._recipe.sink, claim.check)
                if reason := self._tally.add(manifest):
                    raise RunAborted(reason)

    def _finished(self, units: Iterator[UnitInput], generation: int) -> Generator[FinishedUnit]:
        """Units edited, in their order. While one is at work the next one is read, unless that one is large."""
        assert self._worker is not None, "open() comes first"
        at_work: deque[tuple[Future[FinishedUnit], int]] = deque()  # with the bytes of its rows
        with ThreadPoolExecutor(UNITS_AT_ONCE, thread_name_prefix="unit") as pool:
            try:
                while True:
                    while len(at_work) == UNITS_AT_ONCE or sum(size for _, size in at_work) > HELD_BYTES:
                        yield waited_for(at_work.popleft()[0])
                    if (unit_input := next(units, None)) is None:
                        break
                    stopping.check()
                    size = unit_input.nbytes
                    at_work.append((pool.submit(self._worker.finish, unit_input, generation), size))
                    del unit_input
                while at_work:
                    yield waited_for(at_work.popleft()[0])
            except BaseException as error:
                self._worker.give_up(RunAborted(f"the run has ended ({type(error).__name__})"))
                raise

    @override
    def merge(self, sink: SinkConfig, jobs: Iterable[Job]) -> Iterator[Contents]:
        return merge_here(sink, jobs)

    @override
    def seen(self) -> Seen:
        return self._tally.seen()

    @override
    def stop(self, reason: str) -> None:
        self._tally.stop(reason)

    @override
    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            torch.set_num_threads(self._threads_before)  # the process is the caller's


def waited_for(unit: Future[FinishedUnit]) -> FinishedUnit:
    """A unit that another thread is at work on; a signal ends the wait."""
    while not wait([unit], SECONDS_BETWEEN_CHECKS).done:
        stopping.check()
    return unit.result()


def resources_here() -> Resources:
    """Of this process, without Ray."""
    cores, gpus = float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count())
    return Resources(cpus=cores, gpus=gpus, max_gpus=gpus, node_cpus=cores, node_gpus=gpus)
