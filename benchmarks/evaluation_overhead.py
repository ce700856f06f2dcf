"""What measuring adds to editing: `python -m benchmarks.evaluation_overhead [ITEMS [STEPS]]`.

One evaluation of drawn scenes by eight methods, edited first and measured then. The models that measure are untrained
and tiny: what a full CLIP and DINO cost on a GPU is not in it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.evaluation.config import evaluation_from
from pipeline.evaluation.job.run import evaluate
from pipeline.evaluation.set_files import source_of, write_set
from pipeline.running.driver import run
from pipeline.settings.yaml_file import read_yaml_file

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "tests" / "golden" / "pie_mini" / "models"


def measure(items: int = 64, steps: int = 20) -> dict[str, Any]:
    """Seconds of editing and of measuring, in one run of `items` by eight methods."""
    data = dict(read_yaml_file(ROOT / "configs" / "evaluate" / "drawn.yaml"))
    for method in data["methods"].values():
        inversion = method["inversion"]
        skipped = inversion.get("skip_steps", 0) * steps // 20
        inversion |= {"num_steps": steps - skipped} | ({"skip_steps": skipped} if skipped else {})
    with tempfile.TemporaryDirectory() as folder:
        config = evaluation_from(
            {
                **data,
                "set": {"kind": "drawn", "count": items},
                "metrics": {"clip": str(MODELS / "clip_tiny"), "dino": str(MODELS / "dino_tiny")},
                "sink": {"folder": folder},
                "run": {**data["run"], "engine": "local"},
            }
        )
        recipe = config.recipe(source_of(config, write_set(config)))
        began = time.perf_counter()
        summary = run(recipe, progress="off")
        edited = time.perf_counter()
        done = evaluate(config, progress="off")
        measured = time.perf_counter()
    assert done.units_now == done.units
    return {
        "results": summary.done,
        "edit_seconds": round(edited - began, 1),
        "measure_seconds": round(measured - edited, 1),
        "share": round((measured - edited) / (edited - began), 4),
    }


if __name__ == "__main__":
    import sys

    print(measure(*map(int, sys.argv[1:])))
