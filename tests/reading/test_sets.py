"""Files of sets: what becomes a row, how a set may be cut, and what is quarantined with its reason."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import RunAborted, SourceError
from pipeline.looking.planning import plan
from pipeline.reading.listing import list_shards
from pipeline.reading.units import plan_reads, read_units
from pipeline.recipe import SourceConfig, recipe_from
from pipeline.running import driver
from pipeline.samples import ReadRow, Sample, Unreadable
from tests.runs import png

DOG: dict[str, Any] = {
    "set_id": "rex",
    "subject": "a dog",
    "concept_tokens": ["dog"],
    "anchor_prompts": ["a dog", "a photo of a dog"],
    "prompts": ["a dog on a beach", "a dog in the snow", "a dog on a beach"],
}


def write(folder: Path, *lines: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "sets.jsonl").write_bytes(b"\n".join(texts) + b"\n")
    return folder


def rows_of(folder: Path, **source: Any) -> list[ReadRow]:
    config = SourceConfig(shards=(str(folder),), format="sets", **source)
    tasks = plan_reads(list_shards(config), 2, lambda _: False, lambda _: False)
    return [row for task in tasks for unit in read_units(task, config, 2, lambda _: False) for row in unit.rows]


def test_a_row_holds_some_scenes_and_the_first_the_anchors(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path, DOG, {**DOG, "set_id": "max", "seed": 3}), scenes_per_row=2)
    assert all(isinstance(row, Sample) for row in rows)
    samples = [row for row in rows if isinstance(row, Sample)]
    assert [(row.id, row.index, list(row.edits)) for row in samples] == [
        ("sets.jsonl/rex", 0, ["anchor_0", "anchor_1", "scene_0", "scene_1"]),
        ("sets.jsonl/rex/2", 1, ["scene_2"]),
        ("sets.jsonl/max", 2, ["anchor_0", "anchor_1", "scene_0", "scene_1"]),
        ("sets.jsonl/max/2", 3, ["scene_2"]),
    ]
    assert [row.noise_id for row in samples] == ["sets.jsonl/rex"] * 2 + ["seed 3"] * 2
    assert all(row.blank for row in samples)
    # The same prompt twice is two pictures, however the set is cut.
    assert [row.edits["scene_2"]["subject"]["picture"] for row in (samples[1], samples[3])] == [1, 1]
    assert samples[0].edits["anchor_1"]["subject"]["anchor"] == 1


def test_an_anchors_image_is_read_beside_the_file_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rex.png").write_bytes(png(1))
    (tmp_path / "outside.png").write_bytes(png(2))
    image = {**DOG, "anchor_image_prompt": "a dog"}
    lines = [
        {**image, "anchor_image": path} for path in ("rex.png", "../outside.png", f"{tmp_path}/outside.png", "no.png")
    ]
    inside, *others = rows_of(write(tmp_path / "a", *lines))
    assert isinstance(inside, Sample)
    assert (inside.image, inside.blank) == (png(1), False)
    assert inside.edits["anchor_0"]["subject"]["anchor"] == 1  # behind the image
    messages = [row.message for row in others if isinstance(row, Unreadable)]
    assert ["no path below" in text for text in messages] == [True, True, False]
    assert "cannot be read (FileNotFoundError)" in messages[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "line 2 is not JSON"),
        (b'["a list"]', "line 2 is no set"),
        ({**DOG, "anchor_prompts": []}, "the set 'rex', which has no anchors. Give anchor_prompts"),
        ({**DOG, "prompts": [], "anchor_prompts": [], "anchor_image": "a.png"}, "asks for nothing"),
        ({**DOG, "promts": []}, "promts"),
        ({**DOG, "concept_tokens": []}, "concept_tokens"),
        (b'{"set_id": "\xff"}', "line 2 is not JSON"),
    ],
)
def test_a_line_that_is_no_set_is_one_row_that_says_why(tmp_path: Path, line: Any, message: str) -> None:
    first, bad, last = rows_of(write(tmp_path, {**DOG, "set_id": "a"}, line, {**DOG, "set_id": "b"}))
    assert isinstance(bad, Unreadable)
    assert message in bad.message
    assert isinstance(first, Sample)
    assert isinstance(last, Sample)
    assert last.index == 2


def test_json_lines_are_no_shards_unless_sets_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path, DOG)
    with pytest.raises(SourceError, match="is a shard"):
        list_shards(SourceConfig(shards=(str(tmp_path),)))


# Through the job ------------------------------------------------------------------------------------------------------


def recipe_for(
    source: Path, out: Path, *, scenes_per_row: int = 2, unit_size: int = 1, inversion: str = "noise"
) -> Any:
    return recipe_from(
        {
            "source": {"shards": str(source), "format": "sets", "scenes_per_row": scenes_per_row},
            "model": {"name": "analytic", "size": 32},
            "inversion": {"method": inversion, "num_steps": 3},
            "editing": {"method": "consistory", "free_u": None},
            "sink": {"folder": str(out), "include_input": True},
            "run": {"engine": "local", "unit_size": 1, "call_size": 16},
        }
    )


def stored(out: Path, kind: str = "data") -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob(f"{kind}/*.parquet")) for row in pq.read_table(path).to_pylist()]


def scenes_in(out: Path) -> dict[tuple[str, str], bytes]:
    """Images by set and scene."""
    return {(json.loads(row["columns"])["set_id"], row["edit"]): row["image"]["bytes"] for row in stored(out)}


def test_sets_go_in_scenes_come_out_and_how_a_set_is_cut_changes_no_bit(tmp_path: Path) -> None:
    bad = {**DOG, "set_id": "bad", "prompts": ["a cat on a beach", "a dog on a sofa"]}
    source = write(tmp_path / "in", DOG, bad, {**DOG, "set_id": "none", "anchor_prompts": []})
    for name, cut in (("whole", {"scenes_per_row": 8}), ("single", {"scenes_per_row": 1})):
        summary = driver.run(recipe_for(source, tmp_path / name, **cut), progress="off")
        assert (summary.done, summary.failed) == (8, 2)
    whole, single = scenes_in(tmp_path / "whole"), scenes_in(tmp_path / "single")
    assert whole == single
    assert Counter(name for name, _ in whole) == {"rex": 5, "bad": 3}
    assert whole["rex", "scene_0"] != whole["rex", "scene_2"]
    messages = [row["message"] for row in stored(tmp_path / "whole", "quarantine")]
    assert any("'dog' is not a word of the prompt 'a cat on a beach'" in text for text in messages)
    assert any("has no anchors" in text for text in messages)
    row = stored(tmp_path / "whole")[0]
    assert row["image_psnr"] is None
    grey = np.asarray(Image.open(io.BytesIO(row["input"]["bytes"])))
    assert (grey == grey[0, 0]).all()


def test_a_run_that_ended_early_goes_on_where_it_was_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in", DOG)
    driver.run(recipe_for(source, tmp_path / "once", scenes_per_row=1), progress="off")
    recipe = recipe_for(source, tmp_path / "twice", scenes_per_row=1)
    from pipeline.running import worker

    finish, left = worker.Worker.finish, [2]

    def ends_early(self: Any, *given: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return finish(self, *given, **named)

    monkeypatch.setattr(worker.Worker, "finish", ends_early)
    with pytest.raises(KeyboardInterrupt):
        driver.run(recipe, progress="off")
    monkeypatch.setattr(worker.Worker, "finish", finish)
    began = len(list((tmp_path / "twice" / "_units").rglob("*.json")))
    assert 0 < began < 3
    driver.run(recipe, progress="off")
    assert scenes_in(tmp_path / "twice") == scenes_in(tmp_path / "once")
    assert len(stored(tmp_path / "twice")) == 5


def test_a_set_without_an_image_is_not_inverted_and_planning_counts_scenes(tmp_path: Path) -> None:
    source = write(tmp_path / "in", DOG)
    with pytest.raises(RunAborted, match="5 of 5 results failed"):
        driver.run(recipe_for(source, tmp_path / "out", inversion="ddim"), progress="off")
    assert all("brings no image" in row["message"] for row in stored(tmp_path / "out", "quarantine"))
    found = plan(recipe_for(source, tmp_path / "planned"), probe=False)
    # Two rows of two scenes and one, of 4 images in 2 halves, in 3 steps and 2 passes.
    assert (found.results, found.network_rows) == (5, 2 * 2 * 3 * 8)
