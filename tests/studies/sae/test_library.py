"""Labelling, layouts, interventions and published files, as commands, end to end, on a tiny random model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from pipeline.diffusion.sparse_autoencoder import SparseAutoencoder, initial
from pipeline.engine.blocks import blocks_of
from pipeline.errors import ModelError, RecipeError, SinkError
from pipeline.interventions import Intervention
from pipeline.models.sparse_autoencoders import Origin, as_file, of_file
from pipeline.reading.libraries import read_library
from pipeline.recipe import recipe_from
from pipeline.running import driver
from pipeline.settings.configuration import config_from
from pipeline.studies.sae.config import LayoutConfig, ScoreConfig
from pipeline.studies.sae.labelling import label
from pipeline.studies.sae.layout import compare_layouts
from pipeline.studies.sae.scoring import score
from pipeline.writing.recorded_columns import attended_of
from tests.golden.replay import TINY_SD
from tests.methods import tiny_sd
from tests.studies.sae.jobs import DOWN, IMAGES, LABELS, RECORD, UP, label_config, recipe_data, table_of

pytestmark = pytest.mark.timeout(240)


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


def test_labelling_refuses_maps_in_part_and_a_library_of_another_model_step_block_or_width(
    made: Path, library: Path, tmp_path: Path
) -> None:
    part = label_config(made, library, recordings={"folders": str(made / "some")})
    with pytest.raises(SinkError, match="needs whole maps"):
        label(part)
    with pytest.raises(RecipeError, match="nowhere:labels"):
        label(label_config(made, library, labels="nowhere:labels"))
    for number, (changes, says) in enumerate(
        (
            ({"timestep": 501.0, "model_digest": "0" * 16}, "is of the model 'tiny'"),
            ({"timestep": 901.0}, "has no autoencoder of what was recorded"),
            ({"timestep": 501.0, "block": "up_blocks.2.attentions.0"}, "has no autoencoder of what was recorded"),
            ({"timestep": 501.0, "size": 6}, "is for 6 channels"),
        )
    ):
        folder = write_library(tmp_path / f"library{number}", **changes)
        with pytest.raises(ModelError, match=says):
            label(label_config(made, folder))


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
        ({"timestep": 1.0}, "is of timestep 1, and the step is at 501, more than 300 away"),
    ],
)
def test_autoencoders_of_another_model_block_width_or_step_are_refused_before_the_run(
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
