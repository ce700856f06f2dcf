"""A run in Ray's own metrics, for an operator's dashboard: docs/metrics.md lists them. Needs the extra `cluster`.

What is committed is counted once, by the tally; how busy a worker is, by the worker. Ray exports both on every node's
metrics port, with a prefix `ray_` and tags of its own. Where no agent collects them nothing happens.
"""

from __future__ import annotations

import threading

from ray.util.metrics import Counter, Gauge, Histogram
from typing_extensions import override

from pipeline.common.showing import public_url
from pipeline.recipe import RunConfig, SinkConfig
from pipeline.running.tally import Tally
from pipeline.writing.manifest import Manifest

UNIT_SECONDS = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]  # bounds of the histogram's buckets
TAGS = ("run",)


def run_name(sink: SinkConfig) -> str:
    """What a dashboard calls a run: its folder's own name, since addresses may hold secrets."""
    return public_url(sink.folder).rstrip("/").rpartition("/")[2]


class MeteredTally(Tally):
    """A tally that tells Ray's metrics what it adds up.

    Args:
        run: settings, with the error budgets.
        name: of the run, in the tag `run`.
    """

    def __init__(self, run: RunConfig, name: str) -> None:
        super().__init__(run)
        tags = {"run": name}
        self._counters = {
            counted: Counter(f"shardedit_{counted}", text, TAGS)
            for counted, text in {
                "units": "Units committed.",
                "images": "Images of committed units.",
                "results": "Results of committed units that were made.",
                "network_rows": "Network rows of committed units.",
                "output_bytes": "Bytes of the files of committed units.",
            }.items()
        }
        self._failures = Counter("shardedit_failures", "Results of committed units that failed.", (*TAGS, "stage"))
        self._seconds = Histogram("shardedit_unit_seconds", "Worker seconds of a unit.", UNIT_SECONDS, TAGS)
        self._workers = Gauge("shardedit_workers", "Workers that live.", TAGS)
        self._left = Gauge("shardedit_images_left", "Images that are not committed yet, about.", TAGS)
        for metric in (*self._counters.values(), self._failures, self._seconds, self._workers, self._left):
            metric.set_default_tags(tags)

    @override
    def _count(self, manifest: Manifest) -> None:
        super()._count(manifest)
        counts = manifest.counts
        for counted, value in {
            "units": 1,
            "images": counts.images,
            "results": counts.ok,
            "network_rows": manifest.measured.network_rows,
            "output_bytes": sum(file.size for file in manifest.files),
        }.items():
            if value:  # a counter refuses 0
                self._counters[counted].inc(value)
        for stage, failed in counts.failed_by_stage.items():
            self._failures.inc(failed, {"stage": stage})
        self._seconds.observe(manifest.measured.worker_seconds)
        left = self._images_left()
        if left is not None:
            self._left.set(left)

    @override
    def resize(self, workers: int) -> None:
        super().resize(workers)
        self._workers.set(workers)


class WorkerMeter:
    """Seconds in which a worker's model computed: their rate is the share of time that its device is busy.

    Args:
        run: the run's name.
        worker: the worker's.
    """

    def __init__(self, run: str, worker: str) -> None:
        self._counter = Counter("shardedit_busy_seconds", "Seconds in which the model computed.", (*TAGS, "worker"))
        self._counter.set_default_tags({"run": run, "worker": worker})
        self._lock = threading.Lock()
        self._told = 0.0

    def tell(self, busy_seconds: float) -> None:
        """Say how much it is by now. From any thread."""
        with self._lock:
            if busy_seconds > self._told:
                self._counter.inc(busy_seconds - self._told)
                self._told = busy_seconds
