"""Results without a region, on disk and back: written, reported, verified and made again without a mask."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline.looking.report.page import render_report
from pipeline.looking.results import RunFolder
from pipeline.looking.runs import find_run
from pipeline.looking.verify import verify
from pipeline.recipe import recipe_from
from pipeline.running import driver
from pipeline.writing.parquet import render_parquet
from pipeline.writing.rows import encode_outcome, schema
from pipeline.writing.webdataset import render_tar
from tests.runs import recipe_data, write_shards
from tests.writing.making import MODEL, make_edited

WHOLE_IMAGE = {"reconstruction_psnr", "image_psnr", "edit_change", "rest_change"}


@pytest.fixture(scope="module", params=["parquet", "webdataset"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images by a method that finds regions, and by one that changes nothing."""
    folder = tmp_path_factory.mktemp(request.param)
    source = write_shards(folder / "in", shards=1, rows=2, damaged=())
    data = recipe_data(source, folder / "out", sink={"format": request.param}, engine="local")
    inversion = data.pop("inversion")
    data["methods"] = {
        name: {"inversion": inversion, "editing": {"method": name}} for name in ("ledits_pp", "reconstruct")
    }
    driver.run(recipe_from(data), progress="off")
    return folder / "out"


def test_a_result_without_a_region_has_no_mask_and_no_figure_of_a_background(run: Path) -> None:
    folder = RunFolder(str(run))
    refs = folder.figures(folder.spans("data"))
    assert len(refs) == 2 * 2 * 2
    for result in folder.load(refs):
        known = {name for name, value in result.ref.figures.items() if value is not None}
        assert (result.mask is None) == (result.ref.method == "reconstruct")
        assert known == WHOLE_IMAGE if result.mask is None else known > WHOLE_IMAGE


def test_the_report_shows_it_and_keeps_it_out_of_the_means_of_backgrounds(run: Path) -> None:
    text = dict(render_report(RunFolder(str(run))))["report.html"]
    assert text.count('class="tile"') == 8
    assert text.count('class="mask" src=') == 4
    assert text.count("no mask") == 4
    assert text.count("<dt>background</dt>") == 4
    lines = [line for line in text.split("<tr>") if 'data-label="Background"' in line]
    means = {("reconstruct" in line): line.partition('data-label="Background" class="num">')[2] for line in lines}
    assert means[True].startswith('<span class="none">–')
    assert means[False][0].isdigit()


def test_it_is_whole_and_comes_out_again(run: Path) -> None:
    found = find_run(str(run))
    assert verify(found.sink, found.record).clean
    arguments = ["regenerate", str(run), "im01", "--edit", "a", "--method", "reconstruct"]
    made = CliRunner().invoke(cli.app, arguments)
    assert "equal in every byte" in made.stdout


def test_a_concept_without_a_place_leaves_its_place_among_the_masks_empty() -> None:
    recipe = recipe_from({"source": {"shards": "-"}, "sink": {"folder": "-"}})
    first, _, third = make_edited(concepts=3).masks
    edited = make_edited(concepts=3, masks=(first, None, third), mask=first | third)
    row = encode_outcome(edited, recipe, MODEL, 8)
    assert isinstance(row, dict)
    (stored,) = pq.read_table(io.BytesIO(render_parquet([row], schema(recipe.sink)))).to_pylist()
    assert [mask is None for mask in stored["masks"]] == [False, True, False]
    with tarfile.open(fileobj=io.BytesIO(render_tar([row], recipe.sink))) as tar:
        members = {name.partition(".")[2] for name in tar.getnames()}
    assert {name for name in members if name.startswith("mask")} == {"mask.png", "mask.0.png", "mask.2.png"}


def test_datasets_reads_a_mask_that_is_not_there_as_none(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    recipe = recipe_from({"source": {"shards": "-"}, "sink": {"folder": "-"}})
    first = make_edited(0)
    results = [first, make_edited(1, concepts=0), make_edited(2, masks=(None, first.masks[1]), mask=first.masks[1])]
    rows = [encode_outcome(result, recipe, MODEL, 8) for result in results]
    (tmp_path / "part.parquet").write_bytes(render_parquet(rows, schema(recipe.sink)))  # type: ignore[arg-type]
    data = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "part.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [row["mask"] is None for row in data] == [False, True, False]
    assert data[1]["masks"] == []
    assert data[2]["masks"][0] is None
    assert (np.asarray(data[2]["masks"][1]) == first.masks[1]).all()


def test_a_folder_of_another_schema_is_refused_with_the_version_that_wrote_it(run: Path, tmp_path: Path) -> None:
    record = json.loads((run / "run.json").read_text()) | {"schema_version": 1}
    (tmp_path / "run.json").write_text(json.dumps(record))
    for command in ("verify", "report"):
        said = CliRunner().invoke(cli.app, [command, str(tmp_path)])
        assert said.exit_code == 1
        assert "its schema is 1, this one's is 5" in said.stderr
