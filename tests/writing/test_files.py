"""Parquet, WebDataset and quarantine: other people's readers open them, and equal rows give equal bytes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.recipe import Recipe, SinkConfig
from pipeline.writing.parquet import render_parquet
from pipeline.writing.quarantine import SCHEMA, render_quarantine
from pipeline.writing.rows import OutputRow, encode_outcome, encode_png, schema
from pipeline.writing.webdataset import render_tar
from tests.writing.making import MODEL, make_edited, make_rejected, make_sample

RecipeFor = Callable[..., Recipe]

SINK = SinkConfig(folder="out")


def rows_of(recipe: Recipe, count: int = 3, **fields: object) -> list[OutputRow]:
    rows = [encode_outcome(make_edited(index, **fields), recipe, MODEL, 8) for index in range(count)]  # type: ignore[arg-type]
    assert all(isinstance(row, dict) for row in rows)
    return rows  # type: ignore[return-value]


def test_datasets_opens_the_parquet_file_with_images_as_images(
    recipe_for: RecipeFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    recipe = recipe_for(include_input=True)
    (tmp_path / "part.parquet").write_bytes(
        render_parquet(rows_of(recipe), schema(recipe.sink), shared=["input.bytes"])
    )
    data = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "part.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    edited = make_edited(1)
    row = data[1]
    assert isinstance(row["image"], Image.Image)
    assert (np.asarray(row["image"]) == edited.image).all()
    assert (np.asarray(row["input"]) == edited.original).all()
    assert (np.asarray(row["mask"]) == edited.mask).all()
    assert [(np.asarray(mask) == truth).all() for mask, truth in zip(row["masks"], edited.masks, strict=True)] == [
        True
    ] * 2
    assert row["concepts"] == ["concept 0", "concept 1"]
    assert (row["seed"], row["mask_share"], row["background_psnr"]) == (2**62 + 1, 0.75, None)


def test_webdataset_reads_the_tar_under_the_names_of_its_own_rules(recipe_for: RecipeFor, tmp_path: Path) -> None:
    import webdataset

    recipe = recipe_for(format="webdataset", include_input=True)
    sample = make_sample(0, image=encode_png(make_edited().original), members={"seg.dat": b"1", "/../seg.dat": b"2"})
    (tmp_path / "part.tar").write_bytes(
        render_tar(rows_of(recipe, sample=sample)[:1] + rows_of(recipe)[1:], recipe.sink)
    )
    first, second, third = webdataset.WebDataset(str(tmp_path / "part.tar"), shardshuffle=False).decode("pil")
    assert (np.asarray(second["edited.png"]) == make_edited(1).image).all()
    assert (np.asarray(third["mask.png"].convert("1")) == make_edited(2).mask).all()
    assert {"edited.png", "input.png", "mask.png", "mask.0.png", "mask.1.png", "json"} <= set(first)
    assert {name for name in first if name.startswith("source.")} == {"source.seg.dat", "source._.._seg.dat"}
    assert second["json"]["id"] == "faces/0001.tar/im.1"
    assert second["json"]["background_psnr"] is None


def test_datasets_reads_the_tar_with_images_as_images(recipe_for: RecipeFor, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    recipe = recipe_for(format="webdataset")
    (tmp_path / "part.tar").write_bytes(render_tar(rows_of(recipe), recipe.sink))
    data = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "part.tar"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert (np.asarray(data[2]["edited.png"]) == make_edited(2).image).all()
    assert data[2]["json"]["method"] == "ledits_pp"


def test_a_tar_holds_no_time_and_no_owner(recipe_for: RecipeFor) -> None:
    recipe = recipe_for(format="webdataset")
    tar = render_tar(rows_of(recipe), recipe.sink)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        facts = {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in archive}
    assert facts == {(0, 0, 0, "", "")}


def test_equal_rows_give_equal_files(recipe_for: RecipeFor) -> None:
    recipe = recipe_for(include_input=True)
    parquet = [render_parquet(rows_of(recipe), schema(recipe.sink), shared=["input.bytes"]) for _ in range(2)]
    tars = [render_tar(rows_of(recipe), recipe.sink) for _ in range(2)]
    quarantines = [render_quarantine([make_rejected(0), make_rejected(1)], "u", SINK) for _ in range(2)]
    assert parquet[0] == parquet[1]
    assert tars[0] == tars[1]
    assert quarantines[0] == quarantines[1]


def test_an_input_that_many_edits_share_is_stored_once(recipe_for: RecipeFor) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    flat = np.zeros_like(noise)
    masks = {"masks": (), "mask": None}
    recipe = recipe_for(include_input=True)
    rows = [
        encode_outcome(make_edited(0, edit, concepts=0, image=flat, original=noise, **masks), recipe, MODEL, 8)
        for edit in ("a", "b", "c", "d")
    ]
    file = render_parquet(rows, schema(recipe.sink), shared=["input.bytes"])  # type: ignore[arg-type]
    assert noise.nbytes < len(file) < 2 * noise.nbytes
    inputs = {row["bytes"] for row in pq.read_table(io.BytesIO(file)).column("input").to_pylist()}
    assert inputs == {rows[0]["input"]["bytes"]}  # type: ignore[index]


def test_many_rows_are_cut_into_groups_and_none_is_lost() -> None:
    rows = [make_rejected(index) for index in range(250)]
    file = pq.ParquetFile(io.BytesIO(render_quarantine(rows, "u", SINK)))
    assert file.metadata.num_row_groups == 3
    assert file.read().column("index").to_pylist() == list(range(250))


def test_quarantine_keeps_stage_reason_and_the_bytes_as_read() -> None:
    (row,) = pq.read_table(io.BytesIO(render_quarantine([make_rejected(4, attempt=2)], "unit-7", SINK))).to_pylist()
    assert row == {
        "id": "faces/0001.tar/im.4",
        "shard": "faces/0001.tar",
        "key": "im.4",
        "index": 4,
        "edit": "edit",
        "method": "ledits_pp",
        "unit": "unit-7",
        "stage": "decode",
        "error_class": "DecodeError",
        "message": "the bytes are no image",
        "attempt": 2,
        "image": b"as stored",
        "columns": json.dumps({"score": 0.5, "tags": ["a", "b"]}, separators=(",", ":")),
    }
    assert set(row) == set(SCHEMA.names)
