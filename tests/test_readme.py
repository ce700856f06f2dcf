"""The README's own lines: its Python runs as printed, its YAML is a recipe."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.recipe import load_recipe
from pipeline.running.demo import draw_input

ROOT = Path(__file__).parents[1]


def block(language: str) -> str:
    """The README's only block of a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def test_the_python_puts_sunglasses_on_the_demonstrations_face_and_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_input(tmp_path / "demo-output", 1)
    monkeypatch.chdir(tmp_path)
    exec(compile(block("python"), "README.md", "exec"), {})
    before, edited, mask = (
        np.asarray(Image.open(tmp_path / "demo-output" / name)) for name in ("face.png", "edited.png", "mask.png")
    )
    change = np.abs(before.astype(float) - edited).mean(axis=2)
    assert 0.02 < mask.mean() < 0.4
    assert change[mask].mean() > 30  # of 255: dark glasses on a bright face
    assert change[~mask].mean() < 6  # the autoencoder's own error, and what it smears over the mask's edge


def test_the_yaml_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(block("yaml"), encoding="utf-8")
    recipe = load_recipe(path)
    assert [concept.direction for concept in recipe.edits["portrait"].concepts] == ["add", "remove"]
