"""What measuring adds to editing: `python -m benchmarks.evaluation_overhead [ITEMS [STEPS]]`.

One evaluation of drawn scenes by eight methods, edited first and measured then. The models that measure are untrained
and tiny: what a full CLIP and DINO cost on a GPU is not in it. And how much faster a slow judge is asked by 16 requests
at once instead of one.
"""

from __future__ import annotations

import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from pipeline.evaluation.config import evaluation_from
from pipeline.evaluation.items import Item, Result
from pipeline.evaluation.job.run import evaluate
from pipeline.evaluation.judging.judged import Judging
from pipeline.evaluation.set_files import source_of, write_set
from pipeline.records import EditRequest
from pipeline.running.driver import run
from pipeline.settings.judge import JudgeConfig
from pipeline.settings.yaml_file import read_yaml_file
from pipeline.writing.rows import encode_png
from tests.evaluation.fake_judge import Reply, fake_judge

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "tests" / "golden" / "pie_mini" / "models"


def measure(items: int = 64, steps: int = 20) -> dict[str, Any]:
    """Seconds of editing and of measuring, in one run of `items` by eight methods: by the clock, and of the processor,
    which others on the machine cannot slow down. `share`s are what measuring adds to editing."""
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
        marks = [_seconds()]
        summary = run(recipe, progress="off")
        marks.append(_seconds())
        done = evaluate(config, progress="off")
        marks.append(_seconds())
    assert done.units_now == done.units
    edits, measures = ([after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(marks))
    return {
        "results": summary.done,
        "edit_seconds": round(edits[0], 1),
        "measure_seconds": round(measures[0], 1),
        "share": round(measures[0] / edits[0], 4),
        "edit_processor_seconds": round(edits[1], 1),
        "measure_processor_seconds": round(measures[1], 1),
        "processor_share": round(measures[1] / edits[1], 4),
    }


def _seconds() -> tuple[float, float]:
    """By the clock; of the processor, with those of the processes that have ended."""
    used = os.times()
    return time.perf_counter(), used.user + used.system + used.children_user + used.children_system


def judging(results: int = 32, seconds: float = 0.2) -> dict[int, float]:
    """Questions per second to a judge that answers after `seconds`, by requests in flight."""
    found = {}
    pictures = [encode_png(np.full((64, 64, 3), number, dtype=np.uint8)) for number in range(results + 1)]
    rows = [
        Result(
            item=Item(key=str(at), image=pictures[0], request=EditRequest(instruction="Add a hat.")),
            edit="",
            method="m",
            image=pictures[at + 1],
        )
        for at in range(results)
    ]
    for concurrency in (1, 16):
        with tempfile.TemporaryDirectory() as folder, fake_judge(lambda *_: Reply(seconds=seconds)) as judge:
            config = JudgeConfig(base_url=judge.url, model="fake", concurrency=concurrency)
            asking = Judging(config, fsspec.filesystem("file"), f"{folder}/journal")
            began = time.perf_counter()
            asking.columns(rows, [""] * results)
            found[concurrency] = round(asking.requests / (time.perf_counter() - began), 1)
    return found


if __name__ == "__main__":
    import sys

    print("questions per second:", judging())
    print(measure(*map(int, sys.argv[1:])))
