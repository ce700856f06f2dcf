"""`shardedit export`: results in the columns that trainers read, split by source, the same bytes after a kill."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import RecipeError, SinkError
from pipeline.pairs import export as exporting
from pipeline.pairs.export import ExportConfig, export
from pipeline.pairs.presets import PRESETS
from pipeline.recipe import recipe_from
from pipeline.running import driver
from tests.pairs.conftest import found_in
from tests.runs import recipe_data, write_shards

datasets = pytest.importorskip("datasets")
COLUMNS = {
    "instructpix2pix": ["input_image", "edit_prompt", "edited_image"],
    "ip2p_original": ["original_prompt", "original_image", "edit_prompt", "edited_prompt", "edited_image"],
    "magicbrush": ["img_id", "turn_index", "source_img", "mask_img", "instruction", "target_img"],
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images, two edits each, with prompts; one image cannot be decoded."""
    folder = tmp_path_factory.mktemp("export")
    write_shards(folder / "in", shards=2, rows=8)
    edited(folder / "in", folder / "out", include_input=True)
    return folder / "out"


def edited(source: Path, out: Path, **sink: Any) -> None:
    data = recipe_data(source, out, sink=sink, engine="local")
    for name, edit in data["edits"].items():
        edit |= {"source_prompt": "a face", "target_prompt": f"a face with {name}"}
    assert driver.run(recipe_from(data), progress="off").complete


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("preset", COLUMNS)
def test_a_preset_opens_in_datasets_with_its_columns_in_order(run, tmp_path, preset):
    made = export(ExportConfig(runs=(str(run),), out=str(tmp_path / "set"), preset=preset, validation=0.3))
    loaded = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert tuple(loaded) == PRESETS[preset].splits
    assert {split: len(loaded[split]) for split in loaded} == made.splits
    assert sum(made.splits.values()) == 30
    row = loaded["train"][0]
    assert list(row) == COLUMNS[preset]
    for name, feature in loaded["train"].features.items():
        if name == "mask_img":
            assert row[name].mode in ("1", "L")
        elif feature == datasets.Image():
            assert row[name].size == (56, 40)
            assert row[name].mode == "RGB"
        elif name != "turn_index":
            assert row[name]


def test_the_pictures_are_the_runs_own_bytes_and_no_source_is_in_two_splits(run, tmp_path):
    export(ExportConfig(runs=(str(run),), out=str(tmp_path), preset="magicbrush", validation=0.3))
    stored = {}
    for path in run.glob("data/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            stored[f"{row['id']}~{row['edit']}~{row['method']}"] = row
    sources: dict[str, set[bytes]] = {}
    for path in tmp_path.glob("data/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            own = stored.pop(row["img_id"])
            assert (row["source_img"], row["target_img"]) == (own["input"], own["image"])
            assert row["mask_img"] == own["mask"]
            sources.setdefault(path.name.split("-")[0], set()).add(hashlib.sha256(row["source_img"]["bytes"]).digest())
    assert stored == {}
    assert sources["train"]
    assert sources["dev"]
    assert not sources["train"] & sources["dev"]


def test_tars_open_in_webdataset(run, tmp_path):
    export(ExportConfig(runs=(str(run),), out=str(tmp_path), preset="x2edit", validation=0))
    (tar,) = tmp_path.glob("data/*.tar")
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert len(samples) == 30
    for sample in samples:
        source, result = (next(sample[name] for name in sample if name.startswith(start)) for start in ("1.0.", "2."))
        assert Image.open(io.BytesIO(source)).size == Image.open(io.BytesIO(result)).size == (56, 40)
        assert sample["txt"].startswith(b"add concept")


def test_after_a_kill_the_same_command_ends_in_the_same_bytes(run, tmp_path, monkeypatch):
    config = {"runs": (str(run),), "preset": "instructpix2pix", "shard_bytes": 40_000, "validation": 0.3}
    whole = export(ExportConfig(out=str(tmp_path / "whole"), **config))
    assert len(whole.files) > 3
    put_made, calls = exporting.put_made, []

    def dies_at_the_third(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return put_made(*arguments)

    monkeypatch.setattr(exporting, "put_made", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        export(ExportConfig(out=str(tmp_path / "cut"), **config))
    monkeypatch.setattr(exporting, "put_made", put_made)
    resumed = export(ExportConfig(out=str(tmp_path / "cut"), **config))
    assert resumed.written == len(whole.files) - 2
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


def test_a_run_that_is_given_twice_is_exported_once(run, tmp_path):
    made = export(ExportConfig(runs=(str(run), str(run)), out=str(tmp_path), preset="instructpix2pix"))
    assert (sum(made.splits.values()), made.duplicates) == (30, 30)


def test_an_export_is_audited_without_an_error(run, tmp_path, audited):
    export(ExportConfig(runs=(str(run),), out=str(tmp_path / "set"), preset="instructpix2pix", validation=0.3))
    kinds = set().union(*found_in(audited(tmp_path / "set")).values())
    assert not kinds & {"missing", "broken", "split_leak", "prompt_empty", "duplicate_pair", "swapped"}


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(run, tmp_path):
    def refused(match: str, error: type[Exception] = RecipeError, **settings: Any) -> None:
        config = {"runs": (str(run),), "out": str(tmp_path / "set"), "preset": "instructpix2pix"} | settings
        with pytest.raises(error, match=match):
            export(ExportConfig(**config))
        assert not (tmp_path / "set").exists()

    refused("holds no run", SinkError, runs=(str(tmp_path),))
    write_shards(tmp_path / "in", shards=1, rows=2, damaged=())
    edited(tmp_path / "in", tmp_path / "thumbs")
    refused("sink.include_input", runs=(str(tmp_path / "thumbs"),))
    bare = recipe_from(recipe_data(tmp_path / "in", tmp_path / "bare", sink={"include_input": True}, engine="local"))
    driver.run(bare, progress="off")
    refused(
        r"source_prompt: is empty in 4 row\(s\): s0.tar/im00~a~ledits_pp",
        runs=(str(tmp_path / "bare"),),
        preset="ip2p_original",
    )
    (tmp_path / "bare" / "summary.json").unlink()
    refused("is not done", SinkError, runs=(str(tmp_path / "bare"),))
    refused("validation: 0.999999 leaves no row", validation=0.999999)


def test_another_export_is_not_mixed_into_a_folder(run, tmp_path):
    config = ExportConfig(runs=(str(run),), out=str(tmp_path / "set"), preset="instructpix2pix")
    export(config)
    before = bytes_of(tmp_path / "set")
    with pytest.raises(SinkError, match="holds another export"):
        export(ExportConfig(runs=(str(run),), out=str(tmp_path / "set"), preset="magicbrush"))
    assert bytes_of(tmp_path / "set") == before


def test_the_command_says_what_it_wrote(run, tmp_path):
    done = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "set"), "--validation", "0.3"])
    assert done.exit_code == 0, done.output
    assert "train " in done.output
    assert "2 files, 2 written now" in done.output
    card = (tmp_path / "set" / "README.md").read_text()
    assert "More Information Needed" not in card
    assert "analytic" in card
