"""The scores of the demo model: what they count, and that the job writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs import demo_score
from pipeline.models.demo.oracle import VALUES
from pipeline.models.demo.score import SINGLE_EDITS, TARGETS, mask_iou, table
from pipeline.models.demo.world import Scene, changed_region, edited
from pipeline.models.loading import DEMO_FOLDER

KINDS = ("drawn", "round_trip")  # images that the oracle is tried on
RECIPES = Path(__file__).parents[2] / "configs" / "demo_edits"


def cells(*filled: tuple[int, int]) -> np.ndarray:
    grid = np.zeros((4, 4), dtype=bool)
    for place in filled:
        grid[place] = True
    return grid


@pytest.mark.parametrize(
    ("mask", "iou"),
    [
        (cells((0, 0)), 1.0),
        (cells((0, 0), (1, 1)), 1.0),  # next to the truth: allowed
        (cells((0, 0), (3, 3)), 0.5),
        (cells((1, 0)), 0.0),  # beside the truth, which is missed
        (cells(), 0.0),
    ],
)
def test_a_mask_is_compared_cell_by_cell_and_one_cell_of_margin_is_free(mask: np.ndarray, iou: float) -> None:
    truth = np.zeros((16, 16), dtype=bool)
    truth[1, 2] = True  # one pixel makes its cell true
    assert mask_iou(mask, truth) == iou


def test_every_kind_of_edit_changes_what_it_says_and_nothing_else() -> None:
    for kind in SINGLE_EDITS.values():
        before = edited(Scene(), **kind.before)
        after = edited(before, **kind.after)
        differing = {name for name, value in after.attributes().items() if before.attributes()[name] != value}
        assert differing == set(kind.after)
        assert 0 < changed_region(before, after, 128).mean() < 0.3


def test_the_job_writes_every_figure_and_names_what_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "score.json"
    demo_score.main(model=DEMO_FOLDER, recipes=RECIPES, scenes=1, seed=5, workers=2, out=out)
    scores = json.loads(out.read_text())
    assert scores["scenes"] == 1
    assert set(TARGETS) <= scores.keys()
    assert scores["reconstruction_psnr"] >= TARGETS["reconstruction_psnr"].at_least
    assert scores["vae_psnr"] >= TARGETS["vae_psnr"].at_least
    assert scores["oracle_accuracy"] == min(scores[f"oracle.{kind}.{name}"] for kind in KINDS for name in VALUES)
    printed = capsys.readouterr().out
    assert table({name: scores[name] for name in TARGETS}).splitlines()[2] in printed
    for name, target in TARGETS.items():
        assert (name in printed.rpartition("below its target:")[2]) == (scores[name] < target.at_least)
