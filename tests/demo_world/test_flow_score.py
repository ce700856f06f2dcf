"""The editors of flow matching on the drawn world's flow model: what is compared, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo_world.flow_score import MARK, main, methods
from demo_world.methods import END
from pipeline.editing import EDITORS


def test_every_editor_that_was_made_for_flow_matching_has_a_line() -> None:
    compared = {one.editing.method for one in methods()}
    assert compared == {"flow_edit", "uniedit_flow", "direct_edit"} <= set(EDITORS)


@pytest.mark.slow
def test_the_lines_are_measured_and_written(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "methods" / "table.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"Before.\n\n{MARK}\n\n{END}\n\nAfter.\n")
    main(scenes=3, model="demo_flow", seed=11, out=tmp_path / "build", docs=tmp_path / "docs")
    lines = json.loads((tmp_path / "build" / "flow_methods.json").read_text())
    assert [line["editor"] for line in lines] == [one.editing.method for one in methods()]
    assert all(line["success"] >= 2 / 3 for line in lines), "at these settings a scene in ten may fail"
    text = page.read_text()
    assert text.startswith("Before.")
    assert text.rstrip().endswith("After.")
    assert all(f"`{line['editor']}`" in text for line in lines)
    pictures = sorted(path.stem for path in (tmp_path / "docs" / "images" / "flow").glob("*.png"))
    assert pictures == ["direct_edit", "flow_edit", "uniedit_flow"]
