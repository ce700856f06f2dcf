"""The scores of the demo model: what they count, and that the job writes them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from demo_world import score, scoring
from demo_world.oracle import VALUES, read
from demo_world.scoring import SINGLE_EDITS, TARGETS, edit_score, load_recipes, mask_iou, round_trips, table
from pipeline.editor import Editor
from pipeline.models.demo.world import Scene, changed_region, draw, edited
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


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.load(str(DEMO_FOLDER))


def test_likeness_to_the_drawn_edit_is_judged_where_something_should_change_and_only_there(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = SINGLE_EDITS["change_mouth"]
    before = edited(Scene(), **kind.before)
    after = edited(before, **kind.after)
    untouched, perfect = round_trips(editor, [draw(before), draw(after)])
    truth = changed_region(before, after)
    spoilt_outside = np.where(truth[..., None], perfect, 255 - perfect)
    found = {}
    for name, image in {"perfect": perfect, "outside": spoilt_outside, "unedited": untouched}.items():
        result = SimpleNamespace(image=image, mask=truth)
        monkeypatch.setattr(scoring, "run_edits", lambda *_, result=result: [result])
        found[name] = edit_score(editor, kind, load_recipes(RECIPES)["change_mouth"], [Scene()]).truth_psnr
    assert found["perfect"] == found["outside"] == 100
    assert found["unedited"] < 15


# With the wrong mouth these faces settle a pixel beside their place, where the right one fits no better.
SETTLED_WRONG = (
    Scene(
        face_shape="square",
        face_color="green",
        background="lavender",
        center_x=0.4626869259524564,
        center_y=0.5450499628235828,
        radius=0.3368429895629978,
    ),
    Scene(
        face_shape="square",
        face_color="orange",
        background="navy",
        hat="red",
        beard=True,
        center_x=0.5348828943568784,
        center_y=0.5536000829736043,
        radius=0.3010431454443491,
    ),
)


def test_a_mouth_is_read_even_where_the_wrong_one_displaces_the_face(editor: Editor) -> None:
    for scene, image in zip(SETTLED_WRONG, round_trips(editor, [draw(scene) for scene in SETTLED_WRONG]), strict=True):
        assert read(image) == scene.attributes()


def test_the_job_writes_every_figure_and_names_what_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "score.json"
    score.main(model=DEMO_FOLDER, recipes=RECIPES, scenes=1, seed=5, workers=2, out=out)
    scores = json.loads(out.read_text())
    assert scores["scenes"] == 1
    assert set(TARGETS) <= scores.keys()
    assert scores["reconstruction_psnr"] >= TARGETS["reconstruction_psnr"].at_least
    assert scores["vae_psnr"] >= TARGETS["vae_psnr"].at_least
    assert scores["oracle_accuracy"] == min(scores[f"oracle.{kind}.{name}"] for kind in KINDS for name in VALUES)
    printed = capsys.readouterr().out
    assert table({name: scores[name] for name in TARGETS}).splitlines()[2] in printed
    missed = [name for name, target in TARGETS.items() if scores[name] < target.at_least]
    last = f"below its target: {', '.join(missed)}" if missed else "every target is reached"
    assert printed.splitlines()[-1] == last
