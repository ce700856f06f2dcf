"""Collecting and training, as commands, end to end, on a tiny random model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline.common.partition import Partition
from pipeline.engine.blocks import blocks_of
from pipeline.errors import RecipeError, SinkError
from pipeline.models.sparse_autoencoders import of_file
from pipeline.recipe import recipe_from
from pipeline.recordings import RecordingKey
from pipeline.running import driver
from pipeline.studies.sae import training
from pipeline.studies.sae.config import Recordings
from pipeline.studies.sae.recorded import RecordedRuns
from pipeline.studies.sae.stream import Cursor, VectorStream, is_held_out
from pipeline.studies.sae.training import STATE_FILE, run_training, train
from pipeline.writing.recorded_columns import recorded_of
from tests.golden.replay import TINY_SD
from tests.looking.test_verify import shardedit
from tests.methods import tiny_sd
from tests.runs import contents
from tests.studies.sae.jobs import DOWN, IMAGES, UP, recipe_data, table_of, train_config

pytestmark = pytest.mark.timeout(240)


# Collecting ---------------------------------------------------------------------------------------------------------


def test_every_row_has_what_each_block_wrote_in_a_column_of_its_own(made: Path) -> None:
    whole = {row["id"]: row for row in table_of(made / "whole")}
    rows = table_of(made / "some")
    assert len(rows) == IMAGES
    channels = {name: blocks_of(tiny_sd().offers.openings)[name].channels for name in (UP, DOWN)}
    for row in rows:
        for block in (UP, DOWN):
            for time, step in ((1.0, 0), (0.0, 1)):
                key = RecordingKey(block, time, "cond")
                said, vectors = recorded_of(row, key.column)
                assert (said["block"], said["time"], said["step"]) == (block, time, step)
                assert vectors.shape == (3, channels[block])
                said_whole, every = recorded_of(whole[row["id"]], key.column)
                assert len(every) == said_whole["shape"][1] * said_whole["shape"][2]
                np.testing.assert_array_equal(every[said["positions"]], vectors)
        assert row["image"]["bytes"] == whole[row["id"]]["image"]["bytes"], "recording changes no image"


def test_a_collection_is_whole_goes_on_and_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "in", tmp_path / "in")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_data(tmp_path, "some")))
    assert not driver.run(
        recipe_from(recipe_data(tmp_path, "some")), progress="off", partition=Partition(1, 2)
    ).complete
    said = shardedit("sae", "collect", recipe)
    assert said.exit_code == 0, said.stdout
    again = {row["id"]: row for row in table_of(tmp_path / "some")}
    for row in table_of(made / "some"):
        assert {**again[row["id"]], "recipe_hash": 0} == {**row, "recipe_hash": 0}
    before = contents(tmp_path / "some")
    assert shardedit("sae", "collect", recipe).exit_code == 0
    assert contents(tmp_path / "some") == before
    assert shardedit("verify", tmp_path / "some").exit_code == 0
    assert shardedit("regenerate", tmp_path / "some", "im3").exit_code == 0


def test_a_recipe_that_records_nothing_or_writes_tars_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    data = recipe_data(tmp_path, "out")
    del data["editing"]["record"]
    recipe.write_text(yaml.safe_dump(data))
    said = shardedit("sae", "collect", recipe)
    assert said.exit_code == 2
    assert "records nothing" in said.output
    with pytest.raises(RecipeError, match="written as Parquet"):
        recipe_from(recipe_data(tmp_path, "out", sink={"folder": "x", "format": "webdataset"}))


# Training -----------------------------------------------------------------------------------------------------------


def stream_of(made: Path, **settings: Any) -> VectorStream:
    config = train_config(made, made / "unused", **settings)
    runs = RecordedRuns(config.recordings)
    return VectorStream(runs, runs.keys, config.training)


def test_an_epoch_has_every_learnt_vector_once_and_no_held_out_one(made: Path) -> None:
    stream = stream_of(made, batch_size=1, shuffle_vectors=4)
    rows = {row["id"]: row for row in table_of(made / "some")}
    key = stream.keys[0]
    learnt, kept = (
        {
            vector.tobytes()
            for name, row in rows.items()
            if is_held_out(name, 0.3) == held
            for vector in recorded_of(row, key.column)[1]
        }
        for held in (False, True)
    )
    assert learnt
    assert kept
    seen: list[bytes] = []
    for cursor, vectors in stream.batches(Cursor()):
        if cursor.epoch:
            break
        seen.append(vectors[key][0].numpy().tobytes())
    assert sorted(seen) == sorted(learnt)
    held = {vector.numpy().tobytes() for vector in stream.held_out(100)[key]}
    assert held == kept


def taken(batches: Iterator[tuple[Cursor, Any]], count: int) -> list[tuple[Cursor, Any]]:
    return [next(batches) for _ in range(count)]


def test_a_stream_goes_on_from_any_cursor_to_the_same_batches(made: Path) -> None:
    stream = stream_of(made)
    whole = taken(stream.batches(Cursor()), 7)
    assert whole[-1][0].epoch >= 1
    for at in (1, 3, 5):
        for (cursor, vectors), (expected, same) in zip(
            taken(stream.batches(whole[at - 1][0]), 7 - at), whole[at:], strict=True
        ):
            assert cursor == expected
            assert all(torch.equal(vectors[key], same[key]) for key in same)
    other = taken(stream_of(made, seed=1).batches(Cursor()), 1)
    assert not torch.equal(other[0][1][stream.keys[0]], whole[0][1][stream.keys[0]])


def test_a_training_that_was_ended_goes_on_to_the_same_bytes(
    made: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = iter(range(100))

    def end() -> None:
        if next(checks) == 5:
            raise KeyboardInterrupt

    config = train_config(made, tmp_path / "library")
    with monkeypatch.context() as ended:
        ended.setattr(training.stopping, "check", end)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not list((tmp_path / "library").glob("*.safetensors"))
    done = train(config)
    assert (done.batches, done.batches_now) == (8, 5), "from the state after three batches"
    files = sorted(path.name for path in library.glob("*.safetensors"))
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "library" / name).read_bytes() == (library / name).read_bytes()
    assert train(config).batches_now == 0
    for one in done.figures.values():
        assert -1.0 < one.explained_variance < 1.0  # after eight batches, of vectors that it has not seen
        assert 0 < one.l0 <= 3
        assert set(one.dead) == {"1e+05", "1e+06", "1e+07"}


@pytest.mark.slow
def test_two_workers_of_ray_train_learn_what_one_process_learns(made: Path, library: Path, tmp_path: Path) -> None:
    config = train_config(made, tmp_path / "library")
    shared = config.model_copy(update={"run": config.run.model_copy(update={"engine": "ray", "workers": 2})})
    done = run_training(shared)
    assert done.batches == done.batches_now == 8
    for path in library.glob("*.safetensors"):
        one, origin = of_file(path.read_bytes(), path.name)
        other, same = of_file((tmp_path / "library" / path.name).read_bytes(), path.name)
        assert origin == same
        for ours, theirs in zip(one.parameters, other.parameters, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_a_folder_of_another_training_and_recordings_that_do_not_do_are_refused(
    made: Path, library: Path, tmp_path: Path
) -> None:
    with pytest.raises(SinkError, match="holds another training"):
        train(train_config(made, library, seed=5))
    with pytest.raises(SinkError, match=r"hold \d+ vectors to learn from, and a batch has 500"):
        train(train_config(made, tmp_path / "a", batch_size=500, shuffle_vectors=1000))
    none = Recordings(folders=(str(made / "some"),), times=(0.5,))
    with pytest.raises(SinkError, match="has none of what is wanted"):
        _ = RecordedRuns(none).keys
    data = recipe_data(made, "plain", editing={"method": "cfg", "guidance_scale": 2.0})
    driver.run(recipe_from(data), progress="off")
    with pytest.raises(SinkError, match="recorded nothing"):
        _ = RecordedRuns(Recordings(folders=(str(made / "plain"),))).keys


def test_recordings_of_two_models_or_step_counts_are_not_learnt_from_together(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = RecordedRuns(Recordings(folders=(str(made / "some"), str(made / "whole"))))
    assert runs.model.digest == tiny_sd().record.digest
    data = recipe_data(made, "three", inversion={"method": "noise", "num_steps": 3})
    driver.run(recipe_from(data), progress="off")
    mixed = RecordedRuns(Recordings(folders=(str(made / "some"), str(made / "three"))))
    with pytest.raises(SinkError, match="are not of one kind"):
        mixed.timestep(RecordingKey(UP, 1.0, "cond"))
    weights = tmp_path / "model"
    shutil.copytree(TINY_SD, weights)
    scheduler = weights / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "beta_end": 0.0125}))
    other = recipe_data(made, "other", model={"name": str(weights), "size": 64})
    driver.run(recipe_from(other), progress="off")
    with pytest.raises(SinkError, match="recordings of different models"):
        _ = RecordedRuns(Recordings(folders=(str(made / "some"), str(made / "other")))).model


def test_a_state_file_is_of_its_training(library: Path) -> None:
    data = (library / STATE_FILE).read_bytes()
    assert data[8:9] == b"{"
    assert (library / "training.json").exists()
