"""`shardedit export`: results in the columns that trainers read, split by source, the same bytes after a kill."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import RecipeError, SinkError
from pipeline.pairs import export as exporting
from pipeline.pairs.export import ExportConfig, export
from pipeline.pairs.export_card import Said
from pipeline.pairs.hub import Push
from pipeline.pairs.presets import PRESETS
from pipeline.pairs.rle import rle_of
from pipeline.recipe import recipe_from
from pipeline.running import driver
from tests.pairs.conftest import found_in
from tests.runs import recipe_data, write_shards

datasets = pytest.importorskip("datasets")
SIMILARITIES = ["clip_sim_source", "clip_sim_target", "clip_sim_dir", "clip_sim_image", "dinov2_sim", "ssim"]
OF_ULTRAEDIT = [*SIMILARITIES, "source_caption", "target_caption", "idx", "edit_prompt"]
COLUMNS = {
    "instructpix2pix": ["input_image", "edit_prompt", "edited_image"],
    "ip2p_original": ["original_prompt", "original_image", "edit_prompt", "edited_prompt", "edited_image"],
    "ultraedit": [*OF_ULTRAEDIT, "source_image", "edited_image"],
    "ultraedit_region": [*OF_ULTRAEDIT, "edit_object", "source_image", "edited_image", "mask_image"],
    "magicbrush": ["img_id", "turn_index", "source_img", "mask_img", "instruction", "target_img"],
}
TYPES = {"idx": "int64", "turn_index": "int32"} | dict.fromkeys(SIMILARITIES, "float64")


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


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def made(run: Path, out: Path, preset: str, **settings: Any) -> exporting.Export:
    return export(
        ExportConfig(**{"runs": (str(run),), "out": str(out), "preset": preset, "validation": 0.3} | settings)
    )


def loaded(out: Path) -> Any:
    return datasets.load_dataset(str(out), cache_dir=str(out.parent / "cache"))


@pytest.mark.parametrize("preset", COLUMNS)
def test_a_preset_opens_in_datasets_with_its_columns_in_order(run, tmp_path, preset):
    result = made(run, tmp_path / "set", preset)
    splits = loaded(tmp_path / "set")
    assert tuple(splits) == PRESETS[preset].splits
    assert {split: len(splits[split]) for split in splits} == result.splits
    assert sum(result.splits.values()) == 30
    first = splits[PRESETS[preset].splits[0]]
    row = first[0]
    assert list(row) == COLUMNS[preset]
    for name, feature in first.features.items():
        if name.startswith("mask_im"):
            assert row[name].mode in ("1", "L")
        elif feature == datasets.Image():
            assert row[name].size == (56, 40)
            assert row[name].mode == "RGB"
        else:
            assert feature.dtype == TYPES.get(name, "string")
            assert row[name] not in ("", None) or name in SIMILARITIES


def test_the_inputs_are_the_runs_own_bytes_and_no_source_is_in_two_splits(run, tmp_path):
    made(run, tmp_path, "magicbrush")
    stored = {}
    for path in run.glob("data/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            stored[f"{row['id']}~{row['edit']}~{row['method']}"] = row
    sources: dict[str, set[bytes]] = {}
    for path in tmp_path.glob("data/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            own = stored.pop(row["img_id"])
            assert (row["source_img"], row["mask_img"]) == (own["input"], own["mask"])
            pictures = [np.asarray(opened(one["bytes"])) for one in (row["target_img"], own["image"])]
            assert np.array_equal(*pictures)
            sources.setdefault(path.name.split("-")[0], set()).add(hashlib.sha256(row["source_img"]["bytes"]).digest())
    assert stored == {}
    assert not sources["train"] & sources["dev"]
    assert (len(sources["train"]), len(sources["dev"])) == (11, 4)  # 0.3 of 15 is 4.5, rounded to even


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_every_edited_image_says_that_it_is_one_and_no_input_does(tmp_path, image_format):
    write_shards(tmp_path / "in", shards=1, rows=2, damaged=())
    edited(tmp_path / "in", tmp_path / "run", include_input=True, image_format=image_format)
    made(tmp_path / "run", tmp_path / "set", "webdataset", validation=0, mask_rle=True)
    (tar,) = tmp_path.glob("set/data/*.tar")
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
        xmp = opened(sample[f"edited.{image_format}"]).info["xmp"]
        assert b"digitalsourcetype/compositeWithTrainedAlgorithmicMedia" in xmp
        assert b'AISystemUsed="analytic"' in xmp
        assert "xmp" not in opened(sample["input.png"]).info


@pytest.mark.parametrize(("preset", "names"), [("x2edit", ("1.0", "2")), ("webdataset", ("input", "edited"))])
def test_tars_open_in_webdataset(run, tmp_path, preset, names):
    made(run, tmp_path, preset, validation=0)
    (tar,) = tmp_path.glob("data/*.tar")
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode("pil"))
    assert len({sample["__key__"] for sample in samples}) == len(samples) == 30
    for sample in samples:
        assert [sample[f"{name}.png"].size for name in names] == [(56, 40)] * 2
        assert sample["txt"].startswith("add concept")
        assert sample["json"]["instruction"] == sample["txt"]


def test_tables_of_imgedit_name_members_of_the_tars_beside_them(run, tmp_path, audited):
    result = made(run, tmp_path / "set", "imgedit", shard_bytes=60_000)
    assert len(result.files) > 4
    splits = loaded(tmp_path / "set")
    assert {split: len(splits[split]) for split in splits} == result.splits
    for table in (tmp_path / "set" / "data").glob("*.parquet"):
        samples = webdataset.WebDataset(str(table.with_suffix(".tar")), shardshuffle=False)
        members = {f"{one['__key__']}.{name}" for one in samples for name in one if not name.startswith("__")}
        rows = pq.read_table(table).to_pylist()
        assert members == {path for row in rows for path in (*row["input_images"], *row["output_images"])}
    seen = audited(tmp_path / "set")
    assert (seen.layout, seen.rows) == ("imgedit", 30)
    assert not {"missing", "orphan", "broken"} & set(seen.counts)


def test_masks_come_as_run_lengths_where_asked_for(run, tmp_path):
    made(run, tmp_path / "set", "magicbrush", mask_rle=True)
    row = loaded(tmp_path / "set")["train"][0]
    assert list(row) == [*COLUMNS["magicbrush"], "mask_rle"]
    mask = np.asarray(row["mask_img"].convert("L")) > 127
    assert mask.any()
    assert row["mask_rle"] == rle_of(mask)


@pytest.mark.parametrize("preset", ["instructpix2pix", "imgedit"])
def test_after_a_kill_the_same_command_ends_in_the_same_bytes(run, tmp_path, monkeypatch, preset):
    whole = made(run, tmp_path / "whole", preset, shard_bytes=40_000)
    assert len(whole.files) > 3
    put_made, calls = exporting.put_made, []

    def dies_at_the_third(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return put_made(*arguments)

    monkeypatch.setattr(exporting, "put_made", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        made(run, tmp_path / "cut", preset, shard_bytes=40_000)
    monkeypatch.setattr(exporting, "put_made", put_made)
    resumed = made(run, tmp_path / "cut", preset, shard_bytes=40_000)
    assert resumed.written == len(whole.files) - 2
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


def test_a_run_that_is_given_twice_is_exported_once(run, tmp_path):
    result = made(run, tmp_path, "instructpix2pix", runs=(str(run), str(run)))
    assert (sum(result.splits.values()), result.duplicates) == (30, 30)


@pytest.mark.parametrize("preset", ["instructpix2pix", "ultraedit_region", "webdataset"])
def test_an_export_is_audited_without_an_error(run, tmp_path, audited, preset):
    made(run, tmp_path / "set", preset)
    result = audited(tmp_path / "set")
    assert result.rows == 30
    kinds = set().union(*found_in(result).values())
    assert not kinds & {"missing", "broken", "split_leak", "prompt_empty", "duplicate_pair", "swapped"}


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(run, tmp_path):
    def refused(match: str, error: type[Exception] = RecipeError, **settings: Any) -> None:
        config = {"runs": (str(run),), "out": str(tmp_path / "set"), "preset": "instructpix2pix"} | settings
        with pytest.raises(error, match=match):
            export(ExportConfig(**config))
        assert not (tmp_path / "set").exists()

    refused("holds no run", SinkError, runs=(str(tmp_path),))
    write_shards(tmp_path / "in", shards=1, rows=1, damaged=())
    edited(tmp_path / "in", tmp_path / "thumbs")
    refused("sink.include_input", runs=(str(tmp_path / "thumbs"),))
    bare = recipe_from(recipe_data(tmp_path / "in", tmp_path / "bare", sink={"include_input": True}, engine="local"))
    driver.run(bare, progress="off")
    alone = (str(tmp_path / "bare"),)
    refused(r"source_prompt: is empty in 2 row\(s\): s0.tar/im00~a~ledits_pp", runs=alone, preset="ultraedit")
    refused(r"validation: 0.02 of 1 source image\(s\) leaves no row to train on", runs=alone)
    (tmp_path / "bare" / "summary.json").unlink()
    refused("is not done", SinkError, runs=alone)
    shutil.copytree(run, tmp_path / "damaged")
    file = next((tmp_path / "damaged").glob("data/*.parquet"))
    content = bytearray(file.read_bytes())
    at = content.index(b"\x89PNG") + 8  # of the first result: results stand before inputs
    content[at : at + 4] = b"\xff" * 4
    file.write_bytes(content)
    refused(r"row 0 .*cannot be marked as edited.*shardedit verify", SinkError, runs=(str(tmp_path / "damaged"),))
    refused("validation: 0.99 of 15", validation=0.99)
    refused("score: is for pairs of better and worse", score="background_psnr")
    refused("push_to: needs an --out on this machine", out="memory://set", push=Push(repository="a/b"))


def test_another_export_is_not_mixed_into_a_folder(run, tmp_path):
    made(run, tmp_path / "set", "instructpix2pix")
    before = bytes_of(tmp_path / "set")
    with pytest.raises(SinkError, match="holds another export"):
        made(run, tmp_path / "set", "magicbrush")
    assert bytes_of(tmp_path / "set") == before


def test_the_command_says_what_it_wrote_and_the_card_is_filled(run, tmp_path):
    asked = ["--validation", "0.3", "--license", "cc-by-4.0", "--title", "Faces"]
    done = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "set"), *asked])
    assert done.exit_code == 0, done.output
    assert "train " in done.output
    assert "2 files, 2 written now" in done.output
    _, head, text = (tmp_path / "set" / "README.md").read_text().split("---\n", 2)
    said = yaml.safe_load(head)
    assert (said["license"], said["pretty_name"], said["size_categories"]) == ("cc-by-4.0", "Faces", ["n<1K"])
    assert sum(split["num_examples"] for split in said["dataset_info"]["splits"]) == 30
    assert "More Information Needed" not in text
    for words in ("analytic", "ledits_pp after ddpm", "30 edit pairs", "15 source images", "| a | 15 |", "No gate was"):
        assert words in text, words
    assert "| background_psnr | 30 |" in text.replace("\\", "")


def test_a_card_without_a_licence_says_that_it_is_unknown(run, tmp_path):
    made(run, tmp_path / "set", "ultraedit", said=Said(source="drawn"))
    card = (tmp_path / "set" / "README.md").read_text()
    assert "license: unknown" in card
    assert "licence of the source images and of the results is unknown" in card
    assert "Source images: drawn." in card
    assert "clip_sim_source, clip_sim_target, clip_sim_dir, clip_sim_image, dinov2_sim, ssim are empty" in card
