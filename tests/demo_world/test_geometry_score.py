"""The score of the latent basis on drawn scenes: how it judges, and that it writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from demo_world import geometry_score
from demo_world.geometry_score import MovedScene, edit_recipe


def test_only_a_result_with_exactly_one_changed_attribute_counts() -> None:
    scene = MovedScene(changed={"d-v0+8": (), "d-v0-8": ("hat",), "d-v1+8": ("hat", "mouth"), "d-v1-8": ("mouth",)})
    assert scene.single == ["d-v0-8", "d-v1-8"]


def test_every_vector_is_tried_both_ways_at_every_strength_and_beside_the_unmoved_image() -> None:
    names = set(edit_recipe(0.9).edits)
    assert len(names) == geometry_score.VECTORS * (1 + 2 * len(geometry_score.STRENGTHS))
    assert {"d-v0+0", "d-v3+4", "d-v3-8"} <= names


@pytest.mark.slow
def test_the_score_is_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 3, "VECTORS": 2, "STRENGTHS": (1, 2), "LEVELS": (0.9, 0.5)}.items():
        monkeypatch.setattr(geometry_score, name, value)
    monkeypatch.setattr(geometry_score, "TIMES", (0.9,))
    geometry_score.main(scenes=2, model="demo", seed=1, out=tmp_path / "build", docs=tmp_path / "docs")
    found = json.loads((tmp_path / "build" / "geometry.json").read_text())
    assert len(found["edits"]["0.9"]["scenes"]) == 2
    assert [row["pairs"] for row in found["geometry"]["samples"]] == [3, 3]
    assert (tmp_path / "build" / "distance_by_timestep.png").is_file()
    with Image.open(tmp_path / "docs" / "images" / "methods" / "riemannian.png") as picture:
        assert picture.width > 4 * geometry_score.CELL
    with (
        Image.open(tmp_path / "build" / "distance_by_gap.png") as plot,
        Image.open(tmp_path / "docs" / "images" / "methods" / "geometry.png") as picture,
    ):
        assert picture.size == (2 * plot.width, 2 * plot.height)
