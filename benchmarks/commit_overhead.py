"""What exactly once costs per unit, for noting its attempt, putting its files and its manifest: time, disk, memory.

    python benchmarks/commit_overhead.py

A unit of 32 noise images of 512 x 512 as WebDataset PNG, about 25 MB, is rendered once and committed again and again
under other names: plain (files written, no manifest, no attempt) and as a run does it. `share of a minute` is the extra
time of the second in a unit of one minute of GPU work, for which units are meant to be sized. `extra_disk` is what
stays on disk beside the data, as a share of it, `extra_memory` what Python allocates at most during one more commit
(tracemalloc, not timed). Local disk, with fsync.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import tracemalloc
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.recipe import SinkConfig
from pipeline.writing.attempts import Attempt
from pipeline.writing.commit import FinishedUnit, commit, file_record
from pipeline.writing.lock import DriverLock
from pipeline.writing.manifest import Counts, Manifest, Measured, data_path

UNITS = 20
BYTES = 25_000_000


def unit(number: int, data: bytes, sink: SinkConfig) -> FinishedUnit:
    """A unit with one file of these bytes."""
    name = f"noise-0123456789-{number:05d}"
    path = data_path(name, 1, sink)
    manifest = Manifest(
        unit=name,
        generation=1,
        shard="noise.tar",
        chunk=number,
        start=32 * number,
        stop=32 * number + 32,
        is_last=False,
        shard_size=1,
        shard_etag="",
        recipe_hash="0" * 16,
        code_version="0",
        model_digest="0" * 16,
        call_size=8,
        files=(file_record(path, data, 32),),
        counts=Counts(images=32, asked=32, ok=32, failed=0, failed_by_stage={}, failed_by_class={}),
        measured=Measured(worker_seconds=1.0, workers=1, network_rows=1),
    )
    return FinishedUnit(manifest, ((path, data),))


def measure(units: int = UNITS) -> dict[str, Any]:
    """Medians over units, the two in turns."""
    data = np.random.default_rng(0).bytes(BYTES)
    plain: list[float] = []
    whole: list[float] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as until_left:
        sink = SinkConfig(folder=str(Path(folder) / "out"), format="webdataset")
        (Path(folder) / "plain").mkdir()
        claim = until_left.enter_context(DriverLock(sink, lambda _: None)).claim
        for number in range(units):
            finished = unit(number, data, sink)
            started = time.perf_counter()
            (Path(folder) / "plain" / f"{number}.tar").write_bytes(data)
            written = time.perf_counter()
            with Attempt(finished.manifest.unit, sink, generation=1):
                pass
            commit(finished, sink, claim.check)
            whole.append(time.perf_counter() - written)
            plain.append(written - started)
        on_disk = sum(path.stat().st_size for path in (Path(folder) / "out").rglob("*") if path.is_file())
        finished = unit(units, data, sink)
        tracemalloc.start()
        with Attempt(finished.manifest.unit, sink, generation=1):
            pass
        commit(finished, sink, claim.check)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    extra = statistics.median(whole) - statistics.median(plain)
    return {
        "plain_write_s": round(statistics.median(plain), 4),
        "attempt_and_commit_s": round(statistics.median(whole), 4),
        "extra_s": round(extra, 4),
        "share_of_a_minute": round(extra / 60, 5),
        "extra_disk": round(on_disk / (units * len(data)) - 1, 6),
        "extra_memory_kib": round(peak / 1024),
    }


if __name__ == "__main__":
    print(measure())
