"""A PIE-Bench of drawn scenes by ten pairs of methods: one command, on one worker, on two, and killed on its way."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.benchmarks import drawn
from pipeline.evaluation.benchmarks.pie_bench import SIDE, dump_mapping
from pipeline.evaluation.config import evaluation_from
from pipeline.evaluation.job import run as job
from pipeline.evaluation.job.counted import counts_of
from pipeline.evaluation.job.run import evaluate
from tests.evaluation.test_evaluate import written

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
STEPS = 4
EDITORS: dict[str, dict[str, Any]] = {
    "cfg": {"guidance_scale": 3.0},
    "prompt_to_prompt": {"guidance_scale": 3.0},
    "masactrl": {"guidance_scale": 3.0, "start_step": 1},
    "plug_and_play": {"guidance_scale": 3.0},
}
METHODS = {
    f"{inversion}+{editor}": {
        "inversion": {"method": inversion, "num_steps": STEPS},
        "editing": {"method": editor, **settings},
    }
    for inversion in ("ddim", "direct", "ddpm")
    for editor, settings in EDITORS.items()
    if (inversion, editor) not in {("ddpm", "plug_and_play"), ("direct", "cfg")}
}


def write_pie_bench(folder: Path, count: int) -> None:
    """Drawn scenes in the benchmark's own layout, with its marks, masks and types."""
    mapping = {}
    for item in drawn.items_of(count, size=SIDE):
        assert item.image is not None
        assert item.region is not None
        path = f"{item.edit_type}_{drawn.KINDS[item.edit_type].instruction[:4].strip()}/{item.key}.jpg"
        whole = folder / "annotation_images" / path
        whole.parent.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(item.image)).save(whole, quality=95)
        inside = np.flatnonzero(np.asarray(Image.open(io.BytesIO(item.region)).convert("L")) > 127)
        starts = np.flatnonzero(np.diff(inside, prepend=-2) != 1)
        lengths = np.diff(np.append(starts, len(inside)))
        words = item.request.blend_words
        assert words is not None
        mapping[item.key] = {
            "image_path": path,
            "original_prompt": item.request.source_prompt.replace("face", "[face]", 1),
            "editing_prompt": item.request.target_prompt.replace("face", "[face]", 1),
            "editing_instruction": item.request.instruction,
            "editing_type_id": item.edit_type,
            "blended_word": " ".join([*words.source[:1], *words.target[:1]]),
            "mask": [int(one) for pair in zip(inside[starts], lengths, strict=True) for one in pair],
        }
    (folder / "mapping_file.json").write_bytes(dump_mapping(mapping))


def settings(pie: Path, out: Path, **run: Any) -> dict[str, Any]:
    return {
        "set": {"kind": "pie_bench", "folder": str(pie)},
        "methods": METHODS,
        "statistics": {"resamples": 499},
        "sink": {"folder": str(out)},
        "run": {"engine": "local", "unit_size": 4, "call_size": 16, **run},
    }


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The benchmark, and what an undisturbed run in one process writes."""
    folder = tmp_path_factory.mktemp("large")
    write_pie_bench(folder / "pie", 10)
    done = evaluate(evaluation_from(settings(folder / "pie", folder / "here")), progress="off")
    assert done.exit_code == 0
    assert done.tables.asked == dict.fromkeys(METHODS, 10)
    return folder / "pie", written(folder / "here")


def test_methods_share_three_inversions_and_every_type_has_a_mean(calm, tmp_path):
    pie, here = calm
    counted = counts_of(evaluation_from(settings(pie, tmp_path)))
    assert len(METHODS) >= 10
    assert counted.results == 10 * len(METHODS)
    assert counted.network_rows is not None
    assert counted.network_rows_alone is not None
    # Three inversions are run instead of one per method.
    assert counted.network_rows_alone - counted.network_rows >= 10 * STEPS * (len(METHODS) - 3 - 2)
    summary = json.loads(here["summary.json"])
    assert set(summary["measures"]["psnr_unedit_part"]["ddim+cfg"]["own"]["types"]) == set("0123456789")


def test_the_table_is_the_same_bit_for_bit_on_two_workers(calm, tmp_path, monkeypatch):
    pie, here = calm
    monkeypatch.setattr(job, "_is_spread", lambda config: config.run.engine == "ray")
    done = evaluate(evaluation_from(settings(pie, tmp_path, engine="ray", workers=2)), progress="off")
    assert done.exit_code == 0
    assert written(tmp_path) == here


KILLED = """
import json, sys
from pipeline.evaluation.config import evaluation_from
from pipeline.evaluation.job.run import evaluate
evaluate(evaluation_from(json.load(sys.stdin)), progress="off")
"""


@pytest.mark.parametrize("where", ["data", "evaluate/rows"])
def test_the_table_is_the_same_bit_for_bit_after_a_kill(calm, tmp_path, where):
    """Killed once a first unit is edited, or once a first unit is measured."""
    pie, here = calm
    data = settings(pie, tmp_path)
    child = subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, env=os.environ.copy())
    assert child.stdin is not None
    child.stdin.write(json.dumps(data).encode())
    child.stdin.close()
    while child.poll() is None and not list((tmp_path / where).glob("*.parquet")):
        time.sleep(0.01)
    assert child.poll() is None, "it was to be killed on its way"
    child.kill()
    child.wait()
    done = evaluate(evaluation_from(data), progress="off")
    assert done.units_now > 0
    assert written(tmp_path) == here
