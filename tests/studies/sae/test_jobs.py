"""Collecting, training, labelling, intervening: as commands, end to end, on a tiny random model."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save

from pipeline.common.partition import Partition
from pipeline.diffusion.sparse_autoencoder import SparseAutoencoder, initial
from pipeline.engine.blocks import blocks_of
from pipeline.errors import ModelError, RecipeError, SinkError
from pipeline.interventions import Intervention
from pipeline.models.sparse_autoencoders import Origin, as_file, of_file
from pipeline.reading.libraries import read_library
from pipeline.recipe import recipe_from
from pipeline.recordings import RecordingKey
from pipeline.running import driver
from pipeline.studies.sae import training
from pipeline.studies.sae.config import LabelConfig, LayoutConfig, Recordings, ScoreConfig, TrainConfig, config_from
from pipeline.studies.sae.labelling import label
from pipeline.studies.sae.layout import compare_layouts
from pipeline.studies.sae.recorded import RecordedRuns
from pipeline.studies.sae.scoring import score
from pipeline.studies.sae.stream import Cursor, VectorStream, is_held_out
from pipeline.studies.sae.training import STATE_FILE, run_training, train
from pipeline.writing.recorded_columns import attended_of, recorded_of
from tests.golden.replay import TINY_SD
from tests.looking.test_verify import shardedit
from tests.methods import tiny_sd
from tests.runs import contents, png

pytestmark = pytest.mark.timeout(240)
UP, DOWN = "up_blocks.1.attentions.0", "down_blocks.1.attentions.1"
RECORD = {"blocks": [UP, DOWN], "times": [1.0, 0.0], "positions": 3}
IMAGES = 6
LABELS = f"{__name__}:halves"


def halves(image: np.ndarray, prompt: str) -> dict[str, np.ndarray]:
    """What a labeller says: the left half, and where the image is bright."""
    left = np.zeros(image.shape[:2], dtype=bool)
    left[:, : image.shape[1] // 2] = True
    return {"left": left, "bright": image.mean(axis=-1) > image.mean()}


def write_prompts(folder: Path) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "p.tar", "w") as tar:
        for number in range(IMAGES):
            edit = {"edit": {"target_prompt": f"a cat number {number}"}}
            for name, data in (("png", png(0, 64, 64)), ("json", json.dumps(edit).encode())):
                member = tarfile.TarInfo(f"im{number}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def recipe_data(folder: Path, out: str, record: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return {
        "source": {"shards": str(folder / "in")},
        "edits": {"target_prompt": "a cat"},
        "model": {"name": str(TINY_SD), "size": 64},
        "inversion": {"method": "noise", "num_steps": 2},
        "editing": {"method": "concepts", "guidance_scale": 2.0, "record": record or RECORD},
        "sink": {"folder": str(folder / out), "round_trip": False},
        "run": {"unit_size": 2, "call_size": 8, "engine": "local"},
        **sections,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of six images, in part and whole."""
    folder = tmp_path_factory.mktemp("made")
    write_prompts(folder / "in")
    for out, record in (("some", RECORD), ("whole", {**RECORD, "positions": None})):
        driver.run(recipe_from(recipe_data(folder, out, record)), progress="off")
    return folder


def train_config(made: Path, out: Path, **settings: Any) -> TrainConfig:
    return config_from(
        TrainConfig,
        {
            "recordings": {"folders": str(made / "some")},
            "autoencoder": {"num_features": 24, "k": 3},
            "training": {
                "vectors": 48,
                "batch_size": 6,
                "shuffle_vectors": 12,
                "held_out": 0.3,
                "dead_after": 12,
                "aux_k": 4,
                "learning_rate": 1e-2,
                "checkpoint_every": 3,
                **settings,
            },
            "sink": {"folder": str(out)},
        },
    )


@pytest.fixture(scope="module")
def library(made: Path) -> Path:
    """Autoencoders of these recordings, labelled."""
    train(train_config(made, made / "library"))
    label(label_config(made, made / "library"))
    return made / "library"


def label_config(made: Path, folder: Path, **settings: Any) -> LabelConfig:
    data = {"recordings": {"folders": str(made / "whole")}, "library": {"folder": str(folder)}, "labels": LABELS}
    return config_from(LabelConfig, {**data, **settings})


def table_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "data").glob("*.parquet")
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


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


# Labelling, layout, intervening -------------------------------------------------------------------------------------


def test_a_labelled_library_has_a_dictionary_concepts_and_a_gallery(library: Path) -> None:
    dictionary = pq.read_table(library / "dictionary.parquet").to_pylist()
    assert len(dictionary) == 4 * 24
    assert {tag for row in dictionary for tag in row["tags"]} <= {"left", "bright"}
    concepts = pq.read_table(library / "concepts.parquet").to_pylist()
    assert {(row["block"], row["time"], row["concept"]) for row in concepts} == {
        (block, time, name) for block in (UP, DOWN) for time in (1.0, 0.0) for name in ("left", "bright")
    }
    for row in concepts:
        assert len(row["features"]) == len(row["weights"]) == len(row["amounts"])
        assert 0.0 <= row["iou"] <= 1.0
    assert "<h2>left</h2>" in (library / "gallery.html").read_text()
    read = read_library(str(library))
    assert read.names == {"left", "bright"}
    assert {entry.timestep for entry in read.entries} == {501.0, 1.0}


def test_labelling_refuses_maps_in_part_and_a_library_of_another_model(made: Path, library: Path) -> None:
    part = label_config(made, library, recordings={"folders": str(made / "some")})
    with pytest.raises(SinkError, match="needs whole maps"):
        label(part)
    with pytest.raises(RecipeError, match="nowhere:labels"):
        label(label_config(made, library, labels="nowhere:labels"))


def test_without_a_labeller_the_words_of_the_prompts_are_named_where_they_are_attended_to(
    made: Path, library: Path, tmp_path: Path
) -> None:
    with pytest.raises(SinkError, match=r"recordings has no attention"):
        label(label_config(made, library, labels="attended"))
    record = {**RECORD, "positions": None, "attention": True}
    driver.run(recipe_from(recipe_data(made, "attended", record)), progress="off")
    row = table_of(made / "attended")[0]
    maps = attended_of(row)
    assert list(maps) == ["cat", "number", row["target_prompt"].split()[-1]]
    assert maps["cat"].shape == (2, 2)
    shutil.copytree(library, tmp_path / "library")
    config = label_config(made, tmp_path / "library", recordings={"folders": str(made / "attended")}, labels="attended")
    assert label(config).tags == 2 + IMAGES
    assert {"cat", "number"} <= read_library(str(tmp_path / "library")).names


def test_a_layout_is_compared_at_every_time(made: Path, library: Path, tmp_path: Path) -> None:
    config = config_from(
        LayoutConfig,
        {
            "recordings": {"folders": str(made / "whole")},
            "library": {"folder": str(library)},
            "labels": LABELS,
            "sink": {"folder": str(tmp_path / "layout")},
        },
    )
    found = compare_layouts(config)
    assert [one["time"] for one in found.by_time] == [1.0, 0.0]
    assert all(0 <= one["constant_iou"] <= 1 for one in found.by_time)
    assert found.by_time[0]["constant_iou"] > 0.5, "the left half is always there"
    rows = pq.read_table(tmp_path / "layout" / "layout.parquet").to_pylist()
    assert {row["block"] for row in rows} == {UP, DOWN, "best"}
    assert (tmp_path / "layout" / "layout.png").read_bytes().startswith(b"\x89PNG")


def edit_recipe(made: Path, out: str, library: Path | str, **intervention: Any) -> dict[str, Any]:
    return recipe_data(
        made,
        out,
        edits={"target_prompt": "a cat", "interventions": [{"add": ["left"], "strength": 1.0, **intervention}]},
        source={"shards": str(made / "in"), "edit": "none"},
        editing={"method": "concepts", "guidance_scale": 2.0, "autoencoders": str(library), "reach": 0.3},
    )


def test_an_edit_reads_the_library_and_a_name_that_it_lacks_is_refused_before_the_run(
    made: Path, library: Path, tmp_path: Path
) -> None:
    plain = driver.run(recipe_from(edit_recipe(made, "unwritten", library, strength=0.0)), progress="off")
    assert plain.failed == 0
    driver.run(recipe_from(edit_recipe(made, "written", library)), progress="off")
    before, after = (table_of(made / name) for name in ("unwritten", "written"))
    assert all(one["image"]["bytes"] != other["image"]["bytes"] for one, other in zip(before, after, strict=True))
    assert after[0]["instruction"] == "add left"
    with pytest.raises(RecipeError, match=r"no concept 'lfet'\. The nearest are: left"):
        driver.run(recipe_from(edit_recipe(made, "no", library, add=["lfet"])), progress="off")
    with pytest.raises(RecipeError, match="no autoencoder of the block 'mid_block"):
        driver.run(recipe_from(edit_recipe(made, "no", library, blocks=["mid_block.attentions.0"])), progress="off")


def size_of(block: str) -> int:
    return blocks_of(tiny_sd().offers.openings)[block].channels


def write_library(folder: Path, **changes: Any) -> Path:
    """One autoencoder, of the tiny model unless changes say otherwise."""
    folder.mkdir()
    size = changes.pop("size", size_of(UP))
    made = initial(torch.randn((8, size)), 2 * size, 2, torch.Generator().manual_seed(0))
    origin = Origin(block=UP, branch="cond", timestep=1.0, time=0.0, model="tiny", model_digest=tiny_sd().record.digest)
    (folder / "a.safetensors").write_bytes(
        as_file(made, torch.zeros(2 * size, dtype=torch.int64), replace(origin, **changes))
    )
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_digest": "0" * 16}, "is of the model 'tiny'"),
        ({"block": "up_blocks.7.attentions.0"}, "which the model lacks"),
        ({"size": 6}, "is for 6 channels"),
    ],
)
def test_autoencoders_of_another_model_block_or_width_are_refused_before_the_run(
    made: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    folder = write_library(tmp_path / "library", **changes)
    with pytest.raises(RecipeError, match=says):
        driver.run(recipe_from(edit_recipe(made, "no", folder)), progress="off")


def test_published_autoencoders_are_read_by_their_folder_and_configuration(tmp_path: Path) -> None:
    folder = tmp_path / f"unet.{UP}_k2_hidden12_auxk4_bs8_lr0.0001" / "final"
    folder.mkdir(parents=True)
    made = initial(torch.randn((9, 6)), 12, 2, torch.Generator().manual_seed(0))
    tensors = {
        "encoder.weight": made.encoder,
        "decoder.weight": made.directions.mT.contiguous(),
        "pre_bias": made.bias,
        "latent_bias": made.latent_bias,
        "stats_last_nonzero": torch.zeros(12, dtype=torch.int64),
    }
    (folder / "state_dict.safetensors").write_bytes(save(tensors))
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_library(str(tmp_path))
    sizes = {"n_dirs_local": 12, "d_model": 6, "k": 2, "auxk": 4, "dead_steps_threshold": 3}
    (folder / "config.json").write_text(json.dumps(sizes))
    (entry,) = read_library(str(tmp_path)).entries
    some = torch.randn((5, 6))
    assert torch.equal(entry.autoencoder.decode(entry.autoencoder.encode(some)), made.decode(made.encode(some)))
    assert (entry.block, entry.timestep, entry.autoencoder.k) == (UP, None, 2)
    with pytest.raises(ValueError, match="has no dictionary"):
        read_library(str(tmp_path)).targets(Intervention(add=("hat",)), 1.0, 1.0)
    for data, says in ((b"no such file", "no safetensors"), (save({"a": some}), "no sparse autoencoder")):
        with pytest.raises(ModelError, match=says):
            of_file(data, "x.safetensors")
    with pytest.raises(ModelError, match=r"its config\.json says"):
        of_file(save(tensors), str(folder / "x"), json.dumps({**sizes, "k": 2, "d_model": 7}).encode())


def test_the_loss_recovered_is_1_for_codes_that_hold_all_and_0_for_such_that_hold_nothing(
    made: Path, tmp_path: Path
) -> None:
    size = size_of(UP)
    eye, zero = torch.eye(size), torch.zeros(size)
    both = torch.cat([eye, -eye])
    whole = SparseAutoencoder(
        both, both, zero, torch.zeros(2 * size), size
    )  # positive and negative part of each number
    nothing = SparseAutoencoder(both, torch.zeros_like(both), zero, torch.zeros(2 * size), size)
    for name, one, expected in (("whole", whole, 1.0), ("nothing", nothing, 0.0)):
        folder = tmp_path / name
        folder.mkdir()
        digest = tiny_sd().record.digest
        origin = Origin(block=UP, branch="cond", timestep=501.0, time=1.0, model="tiny", model_digest=digest)
        (folder / "a.safetensors").write_bytes(as_file(one, torch.zeros(2 * size, dtype=torch.int64), origin))
        config = config_from(
            ScoreConfig,
            {
                "recordings": {"folders": str(made / "some")},
                "library": {"folder": str(folder)},
                "model": {"name": str(TINY_SD), "size": 64},
                "images": 2,
            },
        )
        found = score(config)
        assert found.images == 2
        (losses,) = found.losses.values()
        assert losses.removed != losses.untouched
        assert (losses.removed - losses.coded) / (losses.removed - losses.untouched) == pytest.approx(
            expected, abs=1e-4
        )
        assert json.loads((folder / "scores.json").read_text())["images"] == 2


def test_a_state_file_is_of_its_training(library: Path) -> None:
    data = (library / STATE_FILE).read_bytes()
    assert data[8:9] == b"{"
    assert (library / "training.json").exists()
