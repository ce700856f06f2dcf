"""What a result's columns are called and hold: instructions, presets, and what the source declared, kept as it is."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.looking.regenerate import regenerate
from pipeline.looking.results import RunFolder
from pipeline.looking.runs import find_run
from pipeline.looking.verify import verify
from pipeline.reading.shards import shard_slug
from pipeline.reading.units import list_shards, plan_reads, read_units
from pipeline.recipe import Recipe, recipe_from
from pipeline.records import EditRequest
from pipeline.running import driver
from pipeline.running.on_ray.blocks import pack_input, unpack_input
from pipeline.writing.instructions import instruction_of
from pipeline.writing.merging import unified
from pipeline.writing.rows import schema
from pipeline.writing.spans import tar_samples
from tests.runs import recipe_data

datasets = pytest.importorskip("datasets")
CLASSES = ["cat", "dog"]
HAT = {"concepts": [{"prompt": "a hat"}]}


def jpeg(seed: int, orientation: int = 1) -> bytes:
    """A photograph's bytes, 56 x 40, perhaps with a camera's note that it lies on its side."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((56, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, exif=exif)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Parquet files as `datasets` writes them: images with a path, a class, a time, lists of lists."""
    folder = tmp_path_factory.mktemp("source")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=CLASSES),
            "index": datasets.ClassLabel(names=["taken", "by", "a", "column", "of", "ours"]),
            "when": datasets.Value("timestamp[s]"),
            "boxes": [[datasets.Value("int64")]],
        }
    )
    for shard in range(2):
        rows = {
            "image": [
                {"bytes": jpeg(2 * shard + at, 6 if at else 1), "path": f"im{2 * shard + at}.jpeg"} for at in (0, 1)
            ],
            "label": [0, 1],
            "index": [3, 5],
            "when": [1_700_000_000, None],
            "boxes": [[[1, 2], [3]], []],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"s{shard}.parquet"))
    return folder


def run(source: Path, out: Path, **sink: Any) -> Recipe:
    data = recipe_data(source, out, sink=sink, engine="local")
    data["edits"] = {"hat": HAT, "own": {"instruction": "make it winter", **HAT}}
    data["methods"] = {
        "ledits": {"inversion": data.pop("inversion"), "editing": {"method": "ledits_pp"}},
    }
    recipe = recipe_from(data)
    assert driver.run(recipe, progress="off").complete
    found = find_run(str(out))
    inspection = verify(found.sink, found.record)
    assert inspection.clean, inspection.findings
    return recipe


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((out / "data").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"instruction": "make it winter", "concepts": [{"prompt": "snow"}]}, "make it winter"),
        ({"concepts": [{"prompt": "sunglasses"}]}, "add sunglasses"),
        (
            {"concepts": [{"prompt": "sunglasses"}, {"prompt": "the hat", "direction": "remove"}]},
            "add sunglasses and remove the hat",
        ),
        (
            {"concepts": [{"prompt": "a", "guidance_scale": -5}, {"prompt": "b"}, {"prompt": "c"}]},
            "remove a, add b and add c",
        ),
        ({"concepts": [{"prompt": "a", "guidance_scale": -5, "direction": "remove"}]}, "add a"),
        ({"concepts": [{"prompt": "a", "guidance_scale": 0}]}, ""),
        ({"source_prompt": "a cat", "target_prompt": "a dog"}, 'change "a cat" to "a dog"'),
        ({"target_prompt": "a dog"}, 'change the image to "a dog"'),
        ({"source_prompt": "a cat", "target_prompt": "a cat"}, ""),
        ({}, ""),
    ],
)
def test_an_instruction_is_given_or_says_what_the_request_asks(request_: dict[str, Any], text: str) -> None:
    assert instruction_of(EditRequest.model_validate(request_)) == text


@pytest.fixture(scope="module")
def full(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("full") / "out"
    run(source, out, include_input=True)
    return out


def test_the_input_is_kept_in_its_own_bytes_under_its_own_name(source: Path, full: Path) -> None:
    rows = rows_of(full)
    assert len(rows) == 8
    stored = [row for file in sorted(source.iterdir()) for row in pq.read_table(file).to_pylist()]
    by_path = {row["image"]["path"]: row["image"]["bytes"] for row in stored}
    assert {row["input_path"] for row in rows} == set(by_path)
    for row in rows:
        assert row["input"] == {"bytes": by_path[row["input_path"]], "path": row["input_path"]}
        turned = row["input_path"] in ("im1.jpeg", "im3.jpeg")
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == ((40, 56) if turned else (56, 40))


def test_an_input_that_lies_on_its_side_is_shown_upright(full: Path) -> None:
    folder = RunFolder(str(full))
    from pipeline.looking.report.thumbnails import small_rgb

    results = folder.load(folder.figures(folder.spans("data")))
    assert [small_rgb(result.input).size for result in results] == [small_rgb(result.image).size for result in results]


def test_classes_of_the_source_stay_classes_and_other_columns_keep_their_values(full: Path, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(
        "parquet", data_files=str(full / "data" / "*.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert loaded.features["label"] == datasets.ClassLabel(names=CLASSES)
    assert loaded.features["source_index"].names[3] == "column", "a name of ours is not taken"
    assert loaded.features["label"].int2str(loaded["label"]) == ["cat", "cat", "dog", "dog"] * 2
    assert loaded["index"] == [0, 0, 1, 1] * 2
    columns = json.loads(loaded[0]["columns"])
    assert columns["boxes"] == [[1, 2], [3]]
    assert columns["when"].startswith("2023-11-14T22:13:20")
    assert loaded[0]["input"].size == (56, 40)


def test_files_whose_classes_differ_have_columns_for_all_of_them(tmp_path: Path) -> None:
    sink = recipe_from(recipe_data(tmp_path, tmp_path / "out")).sink
    one, other, none = schema(sink, {"label": ("a",)}), schema(sink, {"label": ("b",), "kind": ("k",)}), schema(sink)
    features = json.loads(unified([none, one, other]).metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"dtype": "int64", "_type": "Value"}
    assert features["kind"] == {"names": ["k"], "_type": "ClassLabel"}
    assert unified([one, one]) == one


def test_classes_and_names_survive_the_way_through_a_cluster(source: Path, tmp_path: Path) -> None:
    recipe = recipe_from(recipe_data(source, tmp_path / "out"))
    for task in plan_reads(list_shards(recipe.source), 2, lambda _: False, lambda _: False):
        for unit in read_units(task, recipe.source, 2, lambda _: False):
            assert unpack_input(pack_input(unit)) == unit
            assert shard_slug(unit.unit.shard) in unit.unit.id
            assert all(row.labels["label"] == tuple(CLASSES) for row in unit.rows)  # type: ignore[union-attr]


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_a_preset_names_columns_as_trainers_read_them_and_every_reader_of_ours_knows(
    source: Path, tmp_path: Path, format: str
) -> None:
    out = tmp_path / "out"
    run(source, out, columns="instructpix2pix", format=format)
    if format == "parquet":
        loaded = datasets.load_dataset(
            "parquet", data_files=str(out / "data" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
        )
        names = loaded.column_names
        assert {"input_image", "edit_prompt", "edited_image", "mask", "id", "seed"} <= set(names)
        assert not {"input", "input_thumbnail", "instruction", "image"} & set(names)
        assert loaded["edit_prompt"][:2] == ["add a hat", "make it winter"]
        assert loaded[0]["input_image"].size == loaded[0]["edited_image"].size
    else:
        (tar,) = (out / "data").iterdir()
        samples = list(tar_samples(io.BytesIO(tar.read_bytes())))
        assert {"input_image.jpg", "edited_image.png", "json"} <= samples[0].keys()
        about = json.loads(samples[0]["json"])
        assert about["edit_prompt"] == "add a hat"
    folder = RunFolder(str(out))
    results = folder.load(folder.figures(folder.spans("data")))
    assert len(results) == 8
    assert all(Image.open(io.BytesIO(result.input)).format == "JPEG" for result in results)
    made = regenerate(find_run(str(out)), results[0].ref.id, edit="hat")
    assert made.equal, made.differences


def test_a_tars_json_holds_objects_and_no_text_of_them(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", format="webdataset")
    (tar,) = (tmp_path / "out" / "data").iterdir()
    about = json.loads(next(tar_samples(io.BytesIO(tar.read_bytes())))["json"])
    assert about["request"]["concepts"][0]["prompt"] == "a hat"
    assert about["columns"]["boxes"] == [[1, 2], [3]]
    assert about["labels"] == {"index": 3, "label": 0}


def test_what_datasets_would_not_write_as_features_is_no_reason_to_fail(tmp_path: Path) -> None:
    from pipeline.reading.parquet_rows import _labels_of

    table = pa.schema([("label", pa.int64()), ("text", pa.string())])
    for metadata in (
        "{",
        "[]",
        '{"info": null}',
        '{"info": {"features": {"label": 5, "text": {"_type": "ClassLabel"}}}}',
    ):
        assert _labels_of(table.with_metadata({"huggingface": metadata})) == {}
