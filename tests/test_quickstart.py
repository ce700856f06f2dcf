"""docs/quickstart.ipynb: its cells run as they stand, and what they show is what they speak of."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DecodeError
from pipeline.result import Result

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does: the value of its last expression is what it shows."""
    tree = ast.parse(source)
    shown = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    exec(compile(tree, NOTEBOOK.name, "exec"), names)
    return None if shown is None else eval(compile(shown, NOTEBOOK.name, "eval"), names)


def test_the_cells_load_edit_compare_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    shown = [run("".join(cell["source"]), names) for cell in CELLS]
    _, one, figures, compared, failed, many, _ = shown
    assert isinstance(one, Result)
    assert "data:image" in one._repr_html_()
    change = np.abs(np.asarray(one.input).astype(float) - np.asarray(one.image)).mean(axis=2)
    inside = np.asarray(one.mask)
    assert change[inside].mean() > 5 * change[~inside].mean()
    assert figures["background_psnr"] > 25
    assert isinstance(failed, DecodeError)
    assert capsys.readouterr().out == "1 of 3\n2 of 3\n3 of 3\n"
    for picture, rows in ((compared, 3), (many, 2)):
        assert isinstance(picture, Image.Image)
        assert picture.height > rows * 192


def test_a_reader_who_does_not_run_it_sees_the_pictures() -> None:
    assert NOTEBOOK.stat().st_size < 300_000
    kinds = [{kind for output in cell["outputs"] for kind in output.get("data", {})} for cell in CELLS]
    assert sum("image/jpeg" in kind for kind in kinds) == 2
    assert sum("text/html" in kind for kind in kinds) == 1
    assert "/" not in "".join(line for cell in CELLS for output in cell["outputs"] for line in output.get("text", []))
    assert not [output for cell in CELLS for output in cell["outputs"] if output["output_type"] == "error"]
