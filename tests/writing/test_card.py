"""The dataset card: a run's folder opens with `load_dataset(FOLDER)`, results and quarantine apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.recipe import recipe_from
from pipeline.running import driver
from pipeline.writing.card import MARK
from tests.runs import asked, recipe_data, write_shards

datasets = pytest.importorskip("datasets")
ROWS = {"shards": 2, "rows": 4}  # im03 is no image


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("card") / "in", **ROWS)


def run(source: Path, out: Path, **sink: Any) -> Path:
    recipe = recipe_from(recipe_data(source, out, sink=sink, engine="local"))
    assert driver.run(recipe, progress="off").complete
    return out


def load(out: Path, *name: str) -> Any:
    return datasets.load_dataset(str(out), *name, cache_dir=str(out.parent / "cache"))


def head_of(out: Path, name: str = "README.md") -> dict[str, Any]:
    _, head, text = (out / name).read_text(encoding="utf-8").split("---\n", 2)
    assert text.startswith(MARK)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


@pytest.mark.parametrize("shard_size", [500_000_000, 60_000, 0])
def test_a_runs_folder_opens_by_itself_with_what_failed_apart(source: Path, tmp_path: Path, shard_size: int) -> None:
    out = run(source, tmp_path / "out", shard_size=shard_size, include_input=True)
    done = load(out)
    assert list(done) == ["train"]
    rows, failed = done["train"], load(out, "quarantine")["train"]
    keys = [tuple(row) for part in (rows, failed) for row in zip(part["id"], part["edit"], part["method"], strict=True)]
    assert sorted(keys) == sorted(asked(**ROWS))
    assert rows[0]["image"].size == rows[0]["input"].size == (56, 40)
    assert rows.features["image"] == rows.features["mask"] == datasets.Image()
    assert rows.features["masks"] == datasets.List(datasets.Image())
    assert set(failed["stage"]) == {"decode"}
    assert failed[0]["image"] == b"no image"


def test_the_card_declares_the_features_that_the_files_have(source: Path, tmp_path: Path) -> None:
    out = run(source, tmp_path / "out")
    for info, folder in zip(head_of(out)["dataset_info"], ("data", "quarantine"), strict=True):
        declared = datasets.Features._from_yaml_list(info["features"])
        (file,) = (out / folder).iterdir()
        found = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "plain"))
        assert declared == found.features
        assert info["splits"] == [{"name": "train", "num_bytes": file.stat().st_size, "num_examples": len(found)}]


def test_tars_open_by_themselves_and_so_does_their_quarantine(source: Path, tmp_path: Path) -> None:
    out = run(source, tmp_path / "out", format="webdataset")
    rows = load(out)["train"]
    assert len(rows) == 14
    assert rows[0]["edited.png"].size == (56, 40)
    assert rows[0]["json"]["request"]["concepts"][0]["prompt"].startswith("concept")
    failed = load(out, "quarantine")["train"]
    assert [row["json"]["stage"] for row in failed] == ["decode", "decode"]
    assert {row["json"]["key"] for row in failed} == {"im03"}
    assert all(isinstance(row["input.bin"], bytes) for row in failed)


def test_a_run_without_failures_has_one_configuration(tmp_path: Path) -> None:
    out = run(write_shards(tmp_path / "in", shards=1, rows=2, damaged=()), tmp_path / "out")
    assert [one["config_name"] for one in head_of(out)["configs"]] == ["default"]
    assert len(load(out)["train"]) == 4


def test_a_card_of_the_users_is_left_alone_and_ours_is_renewed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(source, tmp_path / "out")
    first = (out / "README.md").read_text()
    assert "14 results from 8 images; 2 failed (DecodeError 2)" in first
    assert "add concept b" in first
    (out / "README.md").write_text(first + "\nA remark.\n")
    run(source, out)
    assert (out / "README.md").read_text() == first
    (out / "README.md").write_text("# Mine\n")
    driver.run(recipe_from(recipe_data(source, out, engine="local")), progress="lines")
    assert (out / "README.md").read_text() == "# Mine\n"
    assert head_of(out, "README.shardedit.md") == head_of_text(first)
    assert "README.md is not ours and stays" in capsys.readouterr().err


def head_of_text(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n", 2)[1])
    return found


def test_what_others_wrote_is_text_in_the_card(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", shards=1, rows=1, damaged=())
    data = recipe_data(tmp_path / "in", tmp_path / "out", engine="local")
    data["edits"] = {"x": {"concepts": [{"prompt": "a | b\n<script>`--- *"}]}}
    driver.run(recipe_from(data), progress="off")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "add a \\| b \\<script\\>\\`--- \\*" in text
    assert len(load(tmp_path / "out")["train"]) == 1
