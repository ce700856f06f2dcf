"""A million units: time and memory to plan them, to find them committed, to fold their shards and to find them again.

    python benchmarks/many_units.py
    python benchmarks/many_units.py --folded 1000000     as many in fact, whose shards are folded already

Units are empty (a manifest without files), so that what is measured is the bookkeeping. Planned and resumed by the
functions of a run; manifests are put straight onto the local disk. Each size is a process of its own. Time and growth
of memory from one size to the next are linear, or nearly; a million is extrapolated from the two. Seconds are those of
the processor (of all threads), which other programs do not lengthen much.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

COUNTS = (20_000, 200_000)
TARGET = 1_000_000
PER_SHARD = 1_000  # units

WORKER = """
import json, sys, time
from pathlib import Path
from benchmarks.peak import peak_mib
from pipeline.reading.shards import Shard, shard_slug, unit_id
from pipeline.reading.units import plan_reads
from pipeline.recipe import SinkConfig
from pipeline.writing.baseline import Baseline, Counted
from pipeline.writing.commit import Committed, committed_units
from pipeline.writing.folding import fold_finished_shards, folded_bytes
from pipeline.writing.lock import DriverLock
from pipeline.writing.manifest import Counts, Manifest, Measured, manifest_path, shard_path
from pipeline.writing.summary import summarise

units, per_shard, folder, size = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], 32
is_folded = sys.argv[4] == "folded"
found = {"units": units, "start_mib": round(peak_mib())}

def timed(name, work):
    started = time.process_time()
    value = work()
    found[name] = round(time.process_time() - started, 2)
    return value

shards = [
    Shard(path=f"{n:06d}.parquet", url=f"s3://in/{n:06d}.parquet", format="parquet", size=1, etag="",
          rows=per_shard * size, row_groups=(size,) * per_shard)
    for n in range(units // per_shard)
]
tasks = timed("plan_s", lambda: plan_reads(shards, size, lambda unit: False, lambda path: False))
assert len(tasks) == units
del tasks

nothing = Counts(images=size, asked=size, ok=size, failed=0, failed_by_stage={}, failed_by_class={})

def manifest_of(shard, chunk):
    return Manifest(
        unit=unit_id(shard.path, chunk), generation=1, shard=shard.path, chunk=chunk,
        start=chunk * size, stop=(chunk + 1) * size,
        is_last=chunk == per_shard - 1, shard_size=1, shard_etag="", recipe_hash="0" * 16, code_version="0",
        model_digest="0" * 16, call_size=8, files=(), counts=nothing,
        measured=Measured(worker_seconds=1.0, workers=1, network_rows=1),
    )

if is_folded:  # every shard like the first, under its own name
    slug = shard_slug(shards[0].path)
    first = folded_bytes([manifest_of(shards[0], chunk) for chunk in range(per_shard)])
    (Path(folder) / "_shards").mkdir(parents=True)
for shard in shards:
    if is_folded:
        data = first.replace(slug.encode(), shard_slug(shard.path).encode())
        data = data.replace(shards[0].path.encode(), shard.path.encode())
        (Path(folder) / shard_path(shard_slug(shard.path), 1)).write_bytes(data)
        continue
    (Path(folder) / "_units" / shard_slug(shard.path)).mkdir(parents=True)
    for chunk in range(per_shard):
        manifest = manifest_of(shard, chunk)
        (Path(folder) / manifest_path(manifest.unit, 1)).write_bytes(manifest.to_bytes())

def resume():
    committed, counted = Committed(), Counted()
    for manifest in committed_units(SinkConfig(folder=folder)):
        committed.add(manifest)
        counted.add(manifest)
    found["baseline_bytes"] = len(Baseline.of(counted, 2).to_bytes())
    return plan_reads(shards, size, committed.has, lambda path: committed.has_whole_shard(shard_slug(path)))

sink = SinkConfig(folder=folder)
if not is_folded:
    assert timed("resume_s", resume) == []
    with DriverLock(sink, lambda reason: None) as driver:
        assert timed("fold_s", lambda: fold_finished_shards(sink, driver.claim)) == len(shards)
assert timed("resume_folded_s", resume) == []
budget = {"units_now": 0, "max_failed_fraction": 0.5}
assert timed("summary_s", lambda: summarise(committed_units(sink), shards, **budget)).units == units
found["peak_mib"] = round(peak_mib())
print(json.dumps(found))
"""


def measure_one(count: int, state: str) -> dict[str, Any]:
    """One row. `state`: "loose" or "folded", how the manifests stand at first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", WORKER, str(count), str(min(PER_SHARD, count)), folder, state]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return {"case": "measured", **json.loads(done.stdout)}


def measure(counts: tuple[int, ...] = COUNTS, target: int = TARGET) -> list[dict[str, Any]]:
    """One row per number of units, and the extrapolated one."""
    rows = [measure_one(count, "loose") for count in counts]
    small, large = rows[-2:]
    share = (target - large["units"]) / (large["units"] - small["units"])
    extrapolated = {
        name: round(large[name] + share * (large[name] - small[name]), 1) for name in large if name != "case"
    }
    return [*rows, {"case": "extrapolated", **extrapolated, "units": target}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folded", type=int)
    chosen = parser.parse_args()
    for line in measure() if chosen.folded is None else [measure_one(chosen.folded, "folded")]:
        print(line)
