"""Peak memory of a worker for runs of 32, 256 and 2,048 images: bounded by images in flight, not by a run's length.

Each run is a process of its own, in one piece: read, edit, encode, commit. The closed-form model stands in for a
network, with noise images of 128 x 128 pixels, so that what is measured is what travels, not weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COUNTS = (32, 256, 2048)

WORKER = """
import json, sys
from benchmarks.peak import peak_mib
from pipeline import run
from pipeline.recipe import recipe_from
summary = run(recipe_from(json.loads(sys.argv[1])), progress="off")
print(json.dumps({"peak_mib": round(peak_mib()), "done": summary.done, "failed": summary.failed}))
"""


def write_shards(folder: Path, count: int, per_shard: int = 256) -> None:
    """Tars of noise images, which no codec makes smaller."""
    import io

    import numpy as np
    import webdataset
    from PIL import Image

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for start in range(0, count, per_shard):
        with webdataset.TarWriter(str(folder / f"noise-{start:06d}.tar")) as tar:
            for number in range(start, min(start + per_shard, count)):
                buffer = io.BytesIO()
                Image.fromarray(generator.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(buffer, "JPEG")
                tar.write({"__key__": f"{number:06d}", "jpg": buffer.getvalue()})


def recipe(folder: Path) -> dict[str, Any]:
    """LEDITS++ with one concept, few steps."""
    return {
        "source": {"shards": str(folder / "in")},
        "edits": {"concepts": [{"prompt": "hat"}]},
        "model": {"name": "analytic", "size": 128},
        "inversion": {"method": "ddpm", "num_steps": 4},
        "sink": {"folder": str(folder / "out")},
        "run": {"engine": "local", "unit_size": 32},
    }


def measure(counts: tuple[int, ...] = COUNTS) -> list[dict[str, Any]]:
    """One row per length of run; `growth` is its peak over the shortest run's."""
    rows: list[dict[str, Any]] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder) / "in", count)
            command = [sys.executable, "-c", WORKER, json.dumps(recipe(Path(folder)))]
            finished = subprocess.run(command, capture_output=True, text=True, check=True)
            row = {"images": count, **json.loads(finished.stdout.strip().splitlines()[-1])}
        row["growth"] = round(row["peak_mib"] / (rows[0]["peak_mib"] if rows else row["peak_mib"]), 2)
        rows.append(row)
    return rows


if __name__ == "__main__":
    for line in measure():
        print(line)
