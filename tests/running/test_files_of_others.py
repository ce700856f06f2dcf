"""A run writes over nothing and removes nothing that it did not write, whatever its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import SinkError
from pipeline.looking.report.page import write_report
from pipeline.recipe import Recipe, recipe_from
from pipeline.running import driver
from pipeline.writing.card import BESIDE, CARD
from pipeline.writing.run_record import OURS
from tests.runs import contents, recipe_data, write_shards

MINE = b"written by hand"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    source = write_shards(tmp_path / "in", shards=1, rows=2, damaged=())
    return recipe_from(recipe_data(source, tmp_path / "out", engine="local"))


def edit(recipe: Recipe) -> None:
    assert driver.run(recipe, progress="off").complete


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(MINE)
    return path


def test_the_list_of_our_names_is_that_of_what_a_run_writes(recipe: Recipe, tmp_path: Path) -> None:
    edit(recipe)
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there <= {*OURS, CARD, "run.json", "_lock", "_baseline"}


@pytest.mark.parametrize("name", [*OURS, "data/mine.parquet", "quarantine/train-00000-of-00001.parquet"])
def test_a_folder_that_holds_a_file_of_that_name_is_refused_before_anything_is_written(
    recipe: Recipe, tmp_path: Path, name: str
) -> None:
    mine = put(tmp_path / "out" / name)
    with pytest.raises(SinkError, match=r"no run\.json.*no run of ours\. Nothing is written over"):
        edit(recipe)
    assert mine.read_bytes() == MINE
    files = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    written = {path for path in files if path.parent.name not in ("_lock", "_baseline")}
    assert written == {mine}


@pytest.mark.parametrize("name", ["notes.txt", "images/a.png", ".hidden"])
def test_files_of_other_names_stay(recipe: Recipe, tmp_path: Path, name: str) -> None:
    mine = put(tmp_path / "out" / name)
    edit(recipe)
    edit(recipe)
    assert mine.read_bytes() == MINE


def test_a_page_that_took_the_place_of_the_report_is_not_written_over(recipe: Recipe, tmp_path: Path) -> None:
    edit(recipe)
    mine = put(tmp_path / "out" / "report.html")
    told = r"report\.html was not written by shardedit, and is not written over"
    with pytest.raises(SinkError, match=told):
        edit(recipe)
    with pytest.raises(SinkError, match=told):
        write_report(recipe.sink)
    assert mine.read_bytes() == MINE
    mine.unlink()
    edit(recipe)
    assert b"shardedit report</title>" in mine.read_bytes()


def test_files_beside_the_reports_pages_stay_and_pages_of_a_longer_report_go(recipe: Recipe, tmp_path: Path) -> None:
    edit(recipe)
    report = tmp_path / "out" / "report"
    mine = [put(report / name) for name in ("notes.html", "page-2.html", "index.js.bak")]
    put(report / "page-0007.html")
    write_report(recipe.sink)
    assert sorted(report.iterdir()) == sorted(mine)


def test_a_card_of_somebodys_stays_and_ours_stands_beside_it(recipe: Recipe, tmp_path: Path) -> None:
    mine = put(tmp_path / "out" / CARD)
    edit(recipe)
    assert mine.read_bytes() == MINE
    assert (tmp_path / "out" / BESIDE).exists()


def test_edits_and_methods_in_another_order_are_the_same_run_to_the_byte(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", shards=1, rows=3, damaged=(1,))
    found = []
    for turn, out in ((1, "one"), (-1, "other")):
        data = recipe_data(source, tmp_path / out, engine="local")
        inversion = data.pop("inversion")
        methods = {"x": {"method": "ledits_pp"}, "w": {"method": "reconstruct"}}
        named = list(data["edits"].items())[::turn]
        data["edits"] = dict(named)
        data["methods"] = {
            name: {"inversion": inversion, "editing": editing} for name, editing in list(methods.items())[::turn]
        }
        recipe = recipe_from(data)
        edit(recipe)
        found.append((recipe.hash, contents(tmp_path / out)))
    assert found[0] == found[1]
