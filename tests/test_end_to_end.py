"""The whole way on real inputs: photographs through S3, mixed sizes and modes, per-row edits, shared inversions."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.engine.pictures import decode_picture, encode_picture
from pipeline.models.loading import load_backbone
from pipeline.reading.placement import restore
from pipeline.reading.prepare import prepare
from pipeline.reading.requests import asked_of
from pipeline.recipe import ModelConfig, recipe_from
from pipeline.running.driver import run
from pipeline.samples import Sample


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def encoded(pixels: np.ndarray, form: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, form)
    return buffer.getvalue()


def results(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]


def pixels_of(row: dict[str, Any], column: str = "image") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row[column]["bytes"])))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    squared = ((one.astype(float) - other.astype(float)) ** 2).mean()
    return float("inf") if squared == 0 else 10 * float(np.log10(255**2 / squared))


def test_photographs_through_s3_come_back_as_their_vae_round_trip(
    s3_server: Any, photographs: dict[str, Path], tmp_path: Path
) -> None:
    members = {f"{number:03d}{path.suffix}": path.read_bytes() for number, path in enumerate(photographs.values())}
    write_tar(s3_server.bucket("photos") / "in" / "photographs.tar", members)
    data = {
        "source": {"shards": "s3://photos/in/*.tar", "storage_options": s3_server.storage_options},
        "edits": {"identity": {}},
        "model": {"name": "demo"},
        "inversion": {"method": "ddpm", "num_steps": 4},
        "editing": {"method": "reconstruct"},
        "sink": {"folder": "s3://photos/out", "storage_options": s3_server.storage_options},
        "run": {"engine": "local"},
    }
    summary = run(recipe_from(data), progress="off")
    assert (summary.done, summary.failed, summary.exit_code) == (len(members), 0, 0)

    backbone = load_backbone(ModelConfig(name="demo"), device="cpu")
    rows = results(s3_server.bucket("photos") / "out")
    assert sorted(row["key"] for row in rows) == sorted(name.split(".")[0] for name in members)
    modes = set()
    for row in rows:
        path = list(photographs.values())[int(row["key"])]
        with Image.open(path) as image:
            size, mode = image.size, image.mode
        modes.add(mode)
        sample = Sample(id=row["id"], shard="", key=row["key"], index=0, image=path.read_bytes())
        recipe = recipe_from(data)
        prepared = prepare(asked_of(sample, recipe), recipe, size=backbone.image_size, multiple=backbone.multiple)
        round_trip = decode_picture(backbone, encode_picture(backbone, prepared.pixels))
        expected = restore(round_trip, prepared.placement, prepared.original)
        edited = pixels_of(row)
        assert edited.shape == (size[1], size[0], 3)
        assert psnr(edited, expected) >= 50, path.name
    assert {"RGB", "L"} <= modes


SIZES = [(64, 64), (40, 96), (96, 40), (33, 57), (130, 128)]
FORMS = [("PNG", "RGB"), ("PNG", "L"), ("JPEG", "RGB"), ("PNG", "RGBA"), ("PNG", "P")]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """One tar: five sizes and modes, a row with an edit of its own, a row with two, one broken, one hopeless."""
    generator = np.random.default_rng(0)
    members = {}
    for number, ((height, width), (form, mode)) in enumerate(zip(SIZES, FORMS, strict=True)):
        picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        members[f"{number}.{form.lower()}"] = encoded(picture, form, mode)
    own = {"edit": {"concepts": [{"prompt": "beard", "guidance_scale": 3.0}]}}
    two = {"edits": {"hat": {"concepts": [{"prompt": "hat"}]}, "plain": {}}}
    empty = {"edit": {"concepts": [{"prompt": ""}]}}
    members |= {
        "5.png": encoded(np.zeros((64, 64, 3), dtype=np.uint8)), "5.json": json.dumps(own).encode(),
        "6.png": encoded(np.zeros((64, 64, 3), dtype=np.uint8)), "6.json": json.dumps(two).encode(),
        "7.png": b"\x89PNG broken",
        "8.png": encoded(np.zeros((64, 64, 3), dtype=np.uint8)), "8.json": json.dumps(empty).encode(),
    }  # fmt: skip
    write_tar(tmp_path / "in" / "mixed.tar", members)
    return tmp_path


def mixed_recipe(folder: Path, **changes: Any) -> Any:
    data = {
        "source": {"shards": str(folder / "in")},
        "edits": {"job": {"concepts": [{"prompt": "sunglasses"}, {"prompt": "smile", "direction": "remove"}]}},
        "model": {"name": "analytic"},
        "sink": {"folder": str(folder / "out")},
        "run": {"engine": "local", "unit_size": 3},
    }
    if "methods" not in changes:
        data["inversion"] = {"method": "ddpm", "num_steps": 4}
    return recipe_from(data | changes)


def test_sizes_modes_and_per_row_edits_in_one_job_come_out_once_each(mixed: Path) -> None:
    summary = run(mixed_recipe(mixed), progress="off")
    rows = results(mixed / "out")
    done = {(row["key"], row["edit"]) for row in rows}
    assert done == {(str(n), "job") for n in range(5)} | {("5", "edit"), ("6", "hat"), ("6", "plain")}
    assert len(rows) == len(done)
    for row in rows:
        if int(row["key"]) < 5:
            height, width = SIZES[int(row["key"])]
            assert pixels_of(row).shape == (height, width, 3)
            assert len(row["masks"]) == 2
            found = [mask for mask in row["masks"] if mask is not None]  # null where a concept found no place
            assert (row["mask"] is None) == (not found)
            for mask in [row["mask"], *found] if found else ():
                assert np.asarray(Image.open(io.BytesIO(mask["bytes"]))).shape == (height, width)
            assert row["concepts"] == ["sunglasses", "smile"]
    quarantined = [
        row for path in (mixed / "out").glob("quarantine/*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    assert {(row["key"], row["stage"]) for row in quarantined} == {("7", "decode"), ("8", "prepare")}
    assert (summary.done, summary.failed, summary.exit_code) == (8, 2, 0)
    assert summary.failed_by_stage == {"decode": 1, "prepare": 1}


def test_several_methods_and_edits_give_a_row_each_from_one_inversion(mixed: Path) -> None:
    recipe = mixed_recipe(
        mixed,
        edits={
            "hat": {"concepts": [{"prompt": "hat"}], "target_prompt": "a hat"},
            "dog": {"concepts": [{"prompt": "dog"}], "target_prompt": "a dog"},
        },
        methods={
            "ledits": {"inversion": {"method": "ddpm", "num_steps": 4}, "editing": {"method": "ledits_pp"}},
            "guided": {"inversion": {"method": "ddpm", "num_steps": 4}, "editing": {"method": "cfg"}},
        },
    )
    run(recipe, progress="off")
    rows = [row for row in results(mixed / "out") if row["key"] == "0"]
    assert {(row["edit"], row["method"]) for row in rows} == {
        (e, m) for e in ("hat", "dog") for m in ("ledits", "guided")
    }
    assert len({row["seed"] for row in rows}) == 1
    manifests = [json.loads(path.read_text()) for path in (mixed / "out").glob("_units/*/*.json")]
    # Rows 5 and 6 bring two and one edits for ledits_pp alone: cfg refuses them for want of a target_prompt.
    per_image = 4 + 2 * (4 * 2) + 2 * (4 * 2)
    own = (4 + 4 * 2) + (4 + 4 * 2)
    assert sum(manifest["measured"]["network_rows"] for manifest in manifests) == 5 * per_image + own


def test_a_parquet_result_opens_as_images_in_datasets(mixed: Path) -> None:
    from datasets import load_dataset

    run(mixed_recipe(mixed, sink={"folder": str(mixed / "out"), "include_input": True}), progress="off")
    loaded = load_dataset(
        "parquet", data_files=str(mixed / "out" / "data" / "*.parquet"), split="train", cache_dir=str(mixed / "cache")
    )
    row = next(row for row in loaded if row["key"] == "1")
    assert row["image"].size == row["input"].size == row["mask"].size == (96, 40)
    assert {mask.size for mask in row["masks"] if mask is not None} == {(96, 40)}
