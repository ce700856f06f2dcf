"""One model and the units it edits: load once, then unit in, finished unit out. Knows nothing of Ray.

Units may come from several threads at once: on the engine, one unit's tail and the next one's head share network calls.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from pipeline.answering import refuse_without_key, servers_of
from pipeline.engine.backbone import Backbone, ModelRecord
from pipeline.engine.engine import Engine
from pipeline.engine.faults import is_out_of_memory
from pipeline.engine.sizing import probe_call_size, trial_call
from pipeline.engine.tuning import Fit, Tell, Tuned, tell_nobody, tune
from pipeline.evaluation.looks import gates_of
from pipeline.flow import all_at_once, edit_unit
from pipeline.models.loading import load_backbone
from pipeline.reading.decoder import Decoder
from pipeline.reading.directions import refuse_other_directions
from pipeline.reading.libraries import refuse_other_autoencoders
from pipeline.recipe import Recipe
from pipeline.records import Asked, Decoded, Refusal, Rejected
from pipeline.running.pool import WorkerSettings
from pipeline.running.tally import InFlight
from pipeline.samples import Sample, UnitInput, Unreadable
from pipeline.writing.attempts import ALONE_FROM, Attempt
from pipeline.writing.commit import FinishedUnit
from pipeline.writing.encoding import Encoders
from pipeline.writing.manifest import NOT_MEASURED, Measured
from pipeline.writing.run_record import RunRecord

log = logging.getLogger(__name__)

# Measured on narrow and wide models: a row of a smaller call takes up to two fifths longer, larger ones gain little.
CPU_CALL_SIZE = 16
KILLED = Refusal(
    stage="edit",
    error_class="ProcessKilled",
    message=f"the process that edited this row died, {ALONE_FROM} times, at last with no other row in it. Look for "
    "memory that runs out, and for faults in the logs of the machine",
    attempt=ALONE_FROM,
)


def fit(recipe: Recipe, backbone: Backbone, before: RunRecord | None = None, tell: Tell = tell_nobody) -> Fit:
    """Let a model run as an earlier driver has decided, or else as is fastest on its device."""
    if before is not None:
        backbone.tune(before.tuned.tuning)
        return Fit(call_size=before.call_size, tuned=before.tuned)
    size, rates = call_size_for(recipe, backbone, tell)
    as_loaded = Tuned(tuning=backbone.tuning, by_call_size=rates)
    if recipe.model.compile is False or recipe.model.offload != "none" or not backbone.ways:
        return Fit(call_size=size, tuned=as_loaded)
    try:
        tuned = tune(backbone, trial_call(backbone, side_of(recipe, backbone), size), backbone.ways, tell)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()  # the engine makes its calls smaller
        log.warning("calls of %d rows do not fit into memory, so the network runs as it is loaded", size)
        tuned = as_loaded
    return Fit(call_size=size, tuned=replace(tuned, by_call_size=rates))


def call_size_for(recipe: Recipe, backbone: Backbone, tell: Tell) -> tuple[int, Mapping[int, float]]:
    """Rows of a network call, where no earlier run has decided; and the rates that decided it, if any were measured."""
    if isinstance(recipe.run.call_size, int):
        return recipe.run.call_size, {}
    if backbone.device.type != "cuda":
        return CPU_CALL_SIZE, {}
    return probe_call_size(backbone, side_of(recipe, backbone), tell)


def side_of(recipe: Recipe, backbone: Backbone) -> int:
    """Of a run's images, in pixels."""
    return recipe.model.size or backbone.image_size


def describe_model(recipe: Recipe, before: RunRecord | None, tell: Tell = tell_nobody) -> tuple[ModelRecord, Fit]:
    """Load a model to say what it is, and how it runs on its device."""
    backbone = load_backbone(recipe.model)
    recipe.refuse_what_lacks(backbone.offers, backbone.record.name)
    refuse_other_directions(recipe, backbone)
    refuse_other_autoencoders(recipe, backbone)
    gates_of(recipe)  # told now, not by every worker
    refuse_without_key(recipe)
    return backbone.record, fit(recipe, backbone, before, tell)


class Worker:
    """A loaded model and its engine.

    Args:
        recipe: the run.
        settings: what all workers of the run have in common.
        backbone: the model, where it is loaded already.
        report: told of every finished result how far its unit is, from the thread that edits the unit.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: WorkerSettings,
        backbone: Backbone | None = None,
        *,
        report: Callable[[InFlight], None] = lambda _: None,
    ) -> None:
        self.recipe = recipe
        self.settings = settings
        if not torch.cuda.is_available():
            torch.set_num_threads(settings.threads)
        self._decoder = Decoder(recipe.source)  # starts beside the loading of the model
        self.backbone = backbone or load_backbone(recipe.model)
        if settings.tuned.tuning != self.backbone.tuning:  # an own process: what is compiled is, before the first unit
            self.backbone.tune(settings.tuned.tuning)
            self.backbone.denoise(trial_call(self.backbone, side_of(recipe, self.backbone), settings.call_size))
        recipe.refuse_what_lacks(self.backbone.offers, self.backbone.record.name)
        refuse_other_directions(recipe, self.backbone)
        refuse_other_autoencoders(recipe, self.backbone)
        in_flight = recipe.run.images_in_flight
        self._servers = servers_of(recipe)
        self.engine = Engine(
            self.backbone,
            call_size=settings.call_size,
            images_in_flight=in_flight if isinstance(in_flight, int) else None,
            asker=self._servers,
        )
        self._gates = gates_of(recipe)
        self._encoders = Encoders(settings.encoders)
        self._meter = _Meter(self.engine)
        self._gate = _Gate()
        self._report = report
        self._attempts: set[Attempt] = set()
        self._is_ending = False
        self._units = itertools.count()  # in the order in which they come: the first goes first

    @property
    def model(self) -> ModelRecord:
        """The loaded model."""
        return self.backbone.record

    def finish(self, unit_input: UnitInput, generation: int, workers: int = 1) -> FinishedUnit:
        """Edit a unit's rows and render its files. May run in several threads at once.

        Args:
            unit_input: the unit.
            generation: of the driver.
            workers: that share the run at the moment.
        """
        rank = next(self._units)
        with self._attempt(unit_input.unit.id, generation) as attempt:
            alone = attempt.number >= ALONE_FROM
            with self._gate.alone() if alone else self._gate.shared(), self._meter.measuring() as measured:
                finished = edit_unit(
                    unit_input,
                    self.recipe,
                    self.engine,
                    decoder=self._decoder,
                    encoders=self._encoders,
                    generation=generation,
                    rank=rank,
                    turns=partial(one_by_one, attempt) if alone else all_at_once,
                    gates=self._gates,
                    on_result=_UnitProgress(unit_input, self._report).note,
                )
        return finished.with_measured(measured(workers))

    @contextmanager
    def _attempt(self, unit_id: str, generation: int) -> Iterator[Attempt]:
        with Attempt(unit_id, self.recipe.sink, generation) as attempt:
            self._attempts.add(attempt)
            if self._is_ending:
                attempt.take_back()
            try:
                yield attempt
            finally:
                self._attempts.discard(attempt)

    def take_back(self) -> None:
        """The process is about to end, by no row's fault: no unit counts it as a death. From any thread."""
        self._is_ending = True
        for attempt in list(self._attempts):
            attempt.take_back()

    def give_up(self, reason: Exception) -> None:
        """Let units that are at work raise, soon. From any thread."""
        self.engine.give_up(reason)
        self._ask_no_more()

    def close(self) -> None:
        """End the encoder threads, and ask servers nothing any more."""
        self._encoders.close()
        self._ask_no_more()

    def _ask_no_more(self) -> None:
        if self._servers is not None:
            self._servers.end()


def one_by_one(attempt: Attempt, rows: Sequence[Asked]) -> Iterator[Sequence[Asked]]:
    """Turns of one row each, noted before they begin. Rows that have killed a process before are refused.

    The same results as together: what shares a call of the network changes no bits.
    """
    for asked in rows:
        if asked.sample.index in attempt.killers:
            yield [replace(asked, refusal=KILLED)]
        else:
            attempt.begin_row(asked.sample.index)
            yield [asked]
    attempt.begin_row(None)


class _UnitProgress:
    """How far one unit is, told with every result."""

    def __init__(self, unit_input: UnitInput, report: Callable[[InFlight], None]) -> None:
        rows = [row.sample if isinstance(row, Unreadable) else row for row in unit_input.rows]
        self._so_far = InFlight(unit=unit_input.unit.id, rows=len(rows), bytes=sum(map(size_in_shard, rows)))
        self._seen: set[int] = set()  # images, by their index
        self._report = report

    def note(self, result: Decoded | Rejected) -> None:
        """Count a result. Those of an image come together: the first tells of all."""
        sample = result.sample if isinstance(result, Rejected) else result.prepared.sample
        new = sample.index not in self._seen
        self._seen.add(sample.index)
        self._so_far = replace(
            self._so_far,
            images=self._so_far.images + new,
            failed=self._so_far.failed + isinstance(result, Rejected),
        )
        self._report(self._so_far)


def size_in_shard(sample: Sample) -> int:
    """Bytes that a sample takes of a tar, about: its members, each with a header and filled up to whole blocks."""
    members = [len(sample.image), *map(len, sample.members.values())]
    members += [len(text) for text in (sample.mask, sample.caption) if text]
    return sum(512 + -(-size // 512) * 512 for size in members)


class _Gate:
    """Units share a process, except with one that may kill it: they would be blamed for the death."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._one = threading.Lock()
        self._alone = 0  # inside or waiting: they go first, or an endless stream of others would keep them out

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._alone += 1
            self._changed.wait_for(lambda: not self._sharing)
        try:
            with self._one:
                yield
        finally:
            with self._changed:
                self._alone -= 1
                self._changed.notify_all()


class _Meter:
    """Shares a worker's time and network rows out among units that overlap: every second and row is counted once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._inside = 0
        self._since = 0.0
        self._busy = 0.0
        self._rows = 0

    @contextmanager
    def measuring(self) -> Iterator[Callable[[int], Measured]]:
        """What a unit took, as a function of the number of workers, to be called once the block is left."""
        with self._lock:
            if self._inside == 0:
                self._since = time.perf_counter()
            self._inside += 1
        took = NOT_MEASURED
        try:
            yield lambda workers: took.model_copy(update={"workers": workers})
        finally:
            took = self._leave()

    def _leave(self) -> Measured:
        """What was done since anybody last left."""
        with self._lock:
            now, stats = time.perf_counter(), self._engine.stats
            seconds = now - self._since
            took = Measured(
                worker_seconds=round(seconds, 6),
                workers=1,
                network_rows=stats.network_rows - self._rows,
                busy_seconds=round(min(stats.busy_seconds - self._busy, seconds), 6),
            )
            self._since, self._busy, self._rows = now, stats.busy_seconds, stats.network_rows
            self._inside -= 1
            return took
