"""One model and the units it edits: load once, then unit in, finished unit out. Knows nothing of Ray.

Units may come from several threads at once: on the engine, one unit's tail and the next one's head share UNet calls.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from pipeline.engine.engine import Engine
from pipeline.engine.sizing import probe_call_size
from pipeline.flow import edit_rows, outcome_of
from pipeline.models.backbone import Backbone, ModelRecord
from pipeline.models.loading import load_backbone
from pipeline.pool import WorkerSettings
from pipeline.recipe import Recipe
from pipeline.records import Decoded, Rejected, UnitInput
from pipeline.writing.commit import FinishedUnit
from pipeline.writing.finish import finish_unit
from pipeline.writing.manifest import Measured
from pipeline.writing.rows import Row, encode_outcome

ENCODERS = 2  # threads that restore, compare and write images while the model works
CPU_CALL_SIZE = 8


def call_size_for(recipe: Recipe, backbone: Backbone) -> int:
    """Rows of a UNet call, where no earlier run has decided."""
    if isinstance(recipe.run.call_size, int):
        return recipe.run.call_size
    if backbone.device.type != "cuda":
        return CPU_CALL_SIZE  # larger calls leave its caches and gain nothing, and waste more rows at a run's end
    return probe_call_size(backbone, recipe.model.size or backbone.image_size)


class Worker:
    """A loaded model and its engine."""

    def __init__(self, recipe: Recipe, settings: WorkerSettings, backbone: Backbone | None = None) -> None:
        self.recipe = recipe
        self.settings = settings
        if not torch.cuda.is_available():
            torch.set_num_threads(settings.threads)
        self.backbone = backbone or load_backbone(recipe.model)
        in_flight = recipe.run.images_in_flight
        self.engine = Engine(
            self.backbone,
            call_size=settings.call_size,
            images_in_flight=in_flight if isinstance(in_flight, int) else None,
        )
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self._meter = _Meter(self.engine)

    @property
    def model(self) -> ModelRecord:
        """The loaded model."""
        return self.backbone.record

    def finish(self, unit_input: UnitInput) -> FinishedUnit:
        """Edit a unit's rows and render its files. May run in several threads at once."""
        self._meter.enter()
        try:
            encoded = self._edit_and_encode(unit_input)
        except BaseException:
            self._meter.leave()
            raise
        seconds, unet_rows = self._meter.leave()
        return finish_unit(
            unit_input,
            encoded,
            self.recipe,
            model_digest=self.model.digest,
            call_size=self.settings.call_size,
            measured=Measured(worker_seconds=round(seconds, 6), workers=self.settings.workers, unet_rows=unet_rows),
        )

    def _edit_and_encode(self, unit_input: UnitInput) -> list[Row | Rejected]:
        encoded: list[Row | Rejected] = []
        pending: deque[Future[Row | Rejected]] = deque()
        for result in edit_rows(unit_input.rows, self.recipe, self.engine):
            pending.append(self._encoders.submit(self._encode, result))
            # A result waits as pixels until it is encoded: only so many may.
            if len(pending) > 2 * ENCODERS:
                encoded.append(pending.popleft().result())
        return encoded + [future.result() for future in pending]

    def _encode(self, result: Decoded | Rejected) -> Row | Rejected:
        return encode_outcome(outcome_of(result), self.recipe, self.model, self.engine.call_size)

    def close(self) -> None:
        """Let the encoder threads go."""
        self._encoders.shutdown()


class _Meter:
    """Shares a worker's time and UNet rows out among units that overlap: every second and row is counted once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._inside = 0
        self._since = 0.0
        self._rows = 0

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._since = time.perf_counter()
            self._inside += 1

    def leave(self) -> tuple[float, int]:
        """Seconds and UNet rows since anybody last left."""
        with self._lock:
            now, rows = time.perf_counter(), self._engine.stats.unet_rows
            seconds, done = now - self._since, rows - self._rows
            self._since, self._rows = now, rows
            self._inside -= 1
            return seconds, done
