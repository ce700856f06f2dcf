"""run.json: a rerun that would write something else is refused, with the difference and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import SinkError
from pipeline.reading.shards import Shard
from pipeline.recipe import Recipe, recipe_from
from pipeline.writing.run_record import RunRecord, check_same_run, read_run_record, run_record, write_run_record
from tests.writing.making import MODEL

RecipeFor = Callable[..., Recipe]
SHARDS = [
    Shard(path=f"{name}.tar", url=f"/in/{name}.tar", format="webdataset", size=size, etag="1")
    for name, size in (("a", 10), ("b", 20))
]


def record_of(recipe: Recipe, shards: list[Shard] = SHARDS, digest: str = MODEL.digest) -> RunRecord:
    return run_record(recipe, shards, replace(MODEL, digest=digest), call_size=16, threads=1)


def changed(recipe: Recipe, section: str, **values: object) -> Recipe:
    data = json.loads(recipe.canonical_json())
    data[section] = {**data[section], **values}
    return recipe_from(data)


def test_a_record_is_read_back_as_it_was_written(recipe_for: RecipeFor) -> None:
    recipe = recipe_for()
    assert read_run_record(recipe.sink) is None
    write_run_record(record_of(recipe), recipe.sink)
    assert read_run_record(recipe.sink) == record_of(recipe)


@pytest.mark.parametrize(
    ("section", "key", "value", "shown"),
    [
        ("run", "seed", 7, "run.seed: was 0, is 7"),
        ("run", "unit_size", 4, "run.unit_size: was 32, is 4"),
        ("inversion", "num_steps", 7, "inversion.num_steps: was"),
        ("sink", "image_format", "jpg", 'sink.image_format: was "png", is "jpg"'),
        ("edits", "b", {"concepts": [{"prompt": "crown"}]}, "edits.b.concepts: was"),
    ],
)
def test_a_changed_recipe_is_refused_with_what_changed(
    recipe_for: RecipeFor, section: str, key: str, value: object, shown: str
) -> None:
    recipe = recipe_for()
    with pytest.raises(SinkError) as caught:
        check_same_run(record_of(recipe), record_of(changed(recipe, section, **{key: value})), recipe.sink)
    assert shown in str(caught.value)
    assert "Set another sink.folder" in str(caught.value)
    assert str(caught.value).count(": was ") == 1


def test_changed_weights_and_a_changed_input_are_refused_by_name(recipe_for: RecipeFor) -> None:
    recipe = recipe_for()
    shards = [replace(SHARDS[0], size=11), Shard(path="c.tar", url="c", format="webdataset", size=1, etag="")]
    with pytest.raises(SinkError) as caught:
        check_same_run(record_of(recipe), record_of(recipe, shards, digest="other"), recipe.sink)
    for line in ("digest: was", "b.tar is gone", "c.tar is new", "a.tar has changed (was 10 bytes, is 11)"):
        assert line in str(caught.value)


def test_what_decides_no_result_may_change(recipe_for: RecipeFor) -> None:
    recipe = recipe_for()
    other = changed(recipe, "run", workers=4, engine="local", max_failed_fraction=0.1, images_in_flight=3)
    before, now = record_of(recipe), record_of(other)
    assert before.recipe != now.recipe
    check_same_run(before, now, recipe.sink)  # raises where anything is refused


def test_a_folder_with_results_of_nobody_is_refused(recipe_for: RecipeFor, tmp_path: Path) -> None:
    (tmp_path / "out" / "data").mkdir(parents=True)
    with pytest.raises(SinkError, match="no run of ours"):
        read_run_record(recipe_for().sink)


def test_no_secret_of_the_storage_goes_into_the_record(recipe_for: RecipeFor) -> None:
    data = json.loads(recipe_for(storage_options={}).canonical_json())
    data["source"] |= {"shards": "s3://KEY:PLANTED@bucket/x", "storage_options": {"secret": "PLANTED"}}
    data["sink"]["storage_options"] = {"auto_mkdir": True, "secret": "PLANTED"}
    text = record_of(recipe_from(data)).to_bytes().decode()
    assert "PLANTED" not in text
    assert "s3://bucket/x" in text
