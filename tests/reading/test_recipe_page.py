"""docs/recipe.md: its tables are what the code says, its examples are what the readers understand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.recipe_reference import page
from pipeline.compat import SETTINGS
from pipeline.editing import EDITORS
from pipeline.inversion import INVERSIONS
from pipeline.reading.requests import requests_of
from pipeline.recipe import Recipe, recipe_from
from pipeline.records import Concept, EditRequest
from pipeline.samples import Sample
from pipeline.settings.reference import compat_settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
SUNGLASSES, BEARD = Concept(prompt="sunglasses", guidance_scale=7.0), Concept(prompt="beard", direction="remove")
OF_THE_JOB = EditRequest(concepts=(Concept(prompt="of the job"),))


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def requests(read_all: Callable[..., Any]) -> Callable[[Path], list[dict[str, EditRequest]]]:
    """What a recipe with an edit of its own asks of every row of a source."""

    def read(shards: Path) -> list[dict[str, EditRequest]]:
        sections = {"source": {"shards": str(shards)}, "edits": {"job": OF_THE_JOB}, "sink": {"folder": "out"}}
        recipe = recipe_from(sections)
        rows = [row for unit in read_all(recipe.source) for row in unit.rows]
        assert all(isinstance(row, Sample) for row in rows)
        return [requests_of(row, recipe) for row in rows]

    return read


def test_the_tables_are_those_of_the_code():
    assert page(PAGE) == PAGE, "run make recipe-reference"


def test_every_key_has_a_row_in_the_table_of_its_section():
    tables = dict(re.findall(r"^#{2,3} ([^\n]+)\n(.*?)(?=^#|\Z)", PAGE, re.DOTALL | re.MULTILINE))
    sections: dict[str, type[Any]] = {"A recipe": Recipe, "edits": EditRequest, "concepts": Concept}
    sections |= {name: Recipe.model_fields[name].annotation for name in ("source", "model", "sink", "run")}  # type: ignore[misc]
    sections |= {f"inversion: {name}": method for name, method in INVERSIONS.items()}
    sections |= {f"editing: {name}": method for name, method in EDITORS.items()}
    for title, section in sections.items():
        listed = re.findall(r"^\| `(\w+)` \|", tables[title], re.MULTILINE)
        left_out = ("method", *compat_settings(section))
        assert listed == [key for key in section.model_fields if key not in left_out], title
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", tables["Parity with reference implementations"], re.MULTILINE)
    assert rows == [(method, key) for method, keys in SETTINGS.items() for key in keys]


def test_its_links_lead_to_its_headings():
    headings = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert links
    assert links <= anchors
    assert all((ROOT / "docs" / path).exists() for path in re.findall(r"\]\((methods/[^)]+)\)", PAGE))


def test_a_webdataset_row_brings_its_edits_in_its_json(png, tar_bytes, requests, tmp_path):
    one, two, _ = examples("json")
    members = [("16.jpg", png(0)), ("16.json", two.encode()), ("17.jpg", png(1)), ("17.json", one.encode())]
    (tmp_path / "faces.tar").write_bytes(tar_bytes([*members, ("18.jpg", png(2))]))
    named, single, none = requests(tmp_path / "faces.tar")
    assert named["glasses"].concepts == (Concept(prompt="sunglasses"),)
    assert named["shaved"].concepts == (BEARD,)
    assert single == {"edit": EditRequest(concepts=(SUNGLASSES, BEARD))}
    assert none == {"job": OF_THE_JOB}
    assert "photographer" in json.loads(one)


@pytest.mark.parametrize("file", ["text.parquet", "struct.parquet"])
def test_a_parquet_row_brings_its_edits_in_a_column(file, png, requests, tmp_path, monkeypatch):
    (tmp_path / "face.png").write_bytes(png(0))
    monkeypatch.chdir(tmp_path)
    (program,) = examples("python")
    exec(compile(program, "recipe.md", "exec"), {})
    assert requests(tmp_path / file) == [{"edit": EditRequest(concepts=(SUNGLASSES,))}, {"job": OF_THE_JOB}]


def test_an_image_of_a_folder_brings_its_edits_in_the_json_beside_it(png, requests, tmp_path):
    folder = tmp_path / "animals"
    (folder / "cats").mkdir(parents=True)
    (folder / "cats" / "tim.jpg").write_bytes(png(0))
    (folder / "cats" / "tom.jpg").write_bytes(png(1))
    (folder / "cats" / "tom.json").write_text(examples("json")[2])
    other, own = requests(folder)
    assert other == {"job": OF_THE_JOB}
    assert own == {"edit": EditRequest(source_prompt="a cat", target_prompt="a dog")}
