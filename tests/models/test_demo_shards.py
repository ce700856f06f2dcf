"""The demo shards: what is in them, and that they are the same every time."""

from __future__ import annotations

import io
import json
from pathlib import Path

import webdataset
from PIL import Image

from pipeline.models.demo.shards import demo_scene, write_demo_shards
from pipeline.records import EditRequest


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    first = write_demo_shards(tmp_path / "a", count=20, seed=3, shard_size=8)
    second = write_demo_shards(tmp_path / "b", count=20, seed=3, shard_size=8)
    assert [path.name for path in first] == ["faces-00000.tar", "faces-00001.tar", "faces-00002.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_sample_does_not_depend_on_the_number_of_its_neighbours(tmp_path: Path) -> None:
    assert (
        list(samples(write_demo_shards(tmp_path / "a", 4))) == list(samples(write_demo_shards(tmp_path / "b", 9)))[:4]
    )


def test_webdataset_reads_images_captions_and_edit_requests(tmp_path: Path) -> None:
    rows = list(samples(write_demo_shards(tmp_path, count=12, shard_size=5)))
    assert len(rows) == 12
    for index, row in enumerate(rows):
        picture = Image.open(io.BytesIO(row["png"] if "png" in row else row["jpg"]))
        assert (picture.size, picture.mode) == ((128, 128), "RGB")
        assert row["txt"]
        columns = json.loads(row["json"])
        assert columns["scene"] == demo_scene(index).attributes()
        assert not columns["scene"]["sunglasses"]
        assert columns["scene"]["hat"] is None
        assert ("edit" in columns) == (index % 4 == 3)
        if "edit" in columns:
            assert EditRequest(**columns["edit"]).concepts
    assert {"png", "jpg"} <= {ending for row in rows for ending in row}


def samples(paths: list[Path]) -> list[dict[str, bytes]]:
    dataset = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False)
    return [{key: value for key, value in row.items() if not key.startswith("__")} for row in dataset]
