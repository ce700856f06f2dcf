"""Peak memory of a run on large input: a tar of 2 GB, a Parquet file of 5 GB, images of 64 megapixels.

Each run is a process of its own, in one piece, with the closed-form model, so that no weights are measured. The same
run on three small images goes first: its peak is what the libraries take. Beside the run's own peak stands that of the
processes which read what strangers wrote (`pipeline/reading/guarded.py`): the sum is what a worker needs beside its
model, since both may be at their peaks together.

    python -m benchmarks.peaks tar parquet pixels
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MB = 10**6
TAR_ROWS, TAR_MEMBER = 20, 100 * MB  # 2 GB
PARQUET_ROWS, PARQUET_VALUE, PARQUET_GROUP = 1000, 5 * MB, 100  # 5 GB, in row groups of one page of 500 MB
PIXEL_ROWS, PIXEL_SIDE = 4, 8000
SMALL_ROWS = 3

WORKER = """
import json, sys
from benchmarks.peak import peak_mib
from benchmarks.peaks import children_peaks
from pipeline import run
from pipeline.recipe import recipe_from
small, large = (recipe_from(data) for data in json.loads(sys.argv[1]))
run(small, progress="off")
before = peak_mib()
summary = run(large, progress="off")
print(json.dumps({"peak_mib": round(peak_mib()), "libraries_mib": round(before), "guarded_mib": children_peaks(),
                  "done": summary.done, "failed": summary.failed}))
"""


def children_peaks() -> list[int]:
    """Peaks of the guarded processes that wait for another job, MiB."""
    from pipeline.reading.guarded import _idle

    peaks = []
    for future in (one for futures in _idle.by_limits.values() for one in futures):
        status = Path(f"/proc/{future.result().process.pid}/status").read_text(encoding="ascii")
        peaks += [int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
    return sorted(peaks)


def _jpeg(side: int, seed: int = 0) -> bytes:
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (max(2, side // 16), max(2, side // 16), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "a" if path.exists() else "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_tar(folder: Path) -> None:
    """Samples with a large member beside a small image."""
    for row in range(TAR_ROWS):
        _write_tar(folder / "large.tar", [(f"{row:04d}.jpg", _jpeg(64, row)), (f"{row:04d}.bin", bytes(TAR_MEMBER))])


def write_parquet(folder: Path) -> None:
    """Images as heavy as photographs: what follows a JPEG's end is ignored."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    image, rest = _jpeg(64), np.random.default_rng(0).bytes(PARQUET_VALUE)
    column = pa.array([image + rest[len(image) :]] * PARQUET_GROUP, pa.large_binary())
    with pq.ParquetWriter(
        folder / "large.parquet", pa.schema([("image", pa.large_binary())]), use_dictionary=False
    ) as out:
        for _ in range(PARQUET_ROWS // PARQUET_GROUP):
            out.write_table(pa.table({"image": column}))


def write_pixels(folder: Path) -> None:
    """Images at the limit of `source.max_pixels`."""
    _write_tar(folder / "pixels.tar", [(f"{row:04d}.jpg", _jpeg(PIXEL_SIDE, row)) for row in range(PIXEL_ROWS)])


KINDS: dict[str, Callable[[Path], None]] = {"tar": write_tar, "parquet": write_parquet, "pixels": write_pixels}


def recipe(folder: Path, source: str) -> dict[str, Any]:
    """The shortest edit: what is measured is what travels."""
    return {
        "source": {"shards": str(folder / source)},
        "edits": {"concepts": [{"prompt": "hat"}]},
        "model": {"name": "analytic", "size": 64},
        "inversion": {"method": "ddpm", "num_steps": 2},
        "sink": {"folder": str(folder / f"{source}-out")},
        "run": {"engine": "local"},
    }


def measure(kind: str) -> dict[str, Any]:
    """One run on input of that kind."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source in ("small", "large"):
            (folder / source).mkdir()
        _write_tar(folder / "small" / "small.tar", [(f"{row:04d}.jpg", _jpeg(64, row)) for row in range(SMALL_ROWS)])
        KINDS[kind](folder / "large")
        size = sum(path.stat().st_size for path in (folder / "large").iterdir())
        command = [sys.executable, "-c", WORKER, json.dumps([recipe(folder, "small"), recipe(folder, "large")])]
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
        figures: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
        return {"kind": kind, "input_mb": size // MB, **figures}


if __name__ == "__main__":
    for chosen in sys.argv[1:] or KINDS:
        print(json.dumps(measure(chosen)), flush=True)
