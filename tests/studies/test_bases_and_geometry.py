"""Runs that write bases, comparisons of them, and edits along directions that came out: as commands, end to end."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from pipeline.common.partition import Partition
from pipeline.diffusion.subspaces import geodesic_distance, transported
from pipeline.errors import RecipeError, SinkError, SourceError
from pipeline.looking.counting import RowCounter
from pipeline.recipe import recipe_from
from pipeline.running import driver
from pipeline.settings.configuration import config_from, load_config
from pipeline.studies import geometry
from pipeline.studies.config import GeometryConfig
from pipeline.studies.tables import pictures, summary_of
from pipeline.writing.basis_columns import basis_of
from tests.golden.replay import TINY_SD
from tests.looking.test_verify import shardedit
from tests.runs import contents, png, results, write_shards

pytestmark = pytest.mark.timeout(240)
EDITING = {"method": "riemannian", "num_vectors": 2, "oversample": 1, "max_iterations": 1}
PROMPTS = {"none": {"target_prompt": ""}, "cat": {"target_prompt": "a cat"}}
LEVELS = {"late": 0.3, "early": 0.9}


def recipe_data(folder: Path, out: str, **sections: Any) -> dict[str, Any]:
    return {
        "source": {"shards": str(folder / "in")},
        "edits": PROMPTS,
        "model": {"name": str(TINY_SD), "size": 64},
        "methods": {
            name: {"inversion": {"method": "ddim", "num_steps": 4}, "editing": {**EDITING, "edit_time": time}}
            for name, time in LEVELS.items()
        },
        "sink": {"folder": str(folder / out)},
        "run": {"unit_size": 2, "call_size": 24, "engine": "local"},  # 6 products a call
        **sections,
    }


def bases_recipe(folder: Path, out: str, **sections: Any) -> Any:
    return recipe_from({**recipe_data(folder, out, **sections), "job": "basis"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of two shards of two images, one of which is damaged, under two prompts and at two levels: half of them by
    a partition's run, the others by the command, which goes on with it."""
    folder = tmp_path_factory.mktemp("made")
    write_shards(folder / "in", shards=2, rows=2, damaged=(3,))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_data(folder, "bases")))
    first = driver.run(bases_recipe(folder, "bases"), progress="off", partition=Partition(0, 2))
    assert not first.complete
    assert shardedit("basis", folder / "recipe.yaml").exit_code == 0
    return folder


def rows(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    tables = [pq.read_table(path) for path in sorted((folder / "data").glob("*.parquet"))]
    return {(row["id"], row["edit"], row["method"]): row for table in tables for row in table.to_pylist()}


def config(folder: Path, out: str, **settings: Any) -> Any:
    return config_from(
        GeometryConfig, {"bases": str(folder / "bases"), "sink": {"folder": str(folder / out)}, **settings}
    )


# Bases --------------------------------------------------------------------------------------------------------------


def test_every_image_has_its_bases_once_and_they_are_singular_pairs_in_half_precision(made: Path) -> None:
    found = results(made / "bases")
    images = ("s0.tar/im00", "s0.tar/im01", "s1.tar/im02", "s1.tar/im03")
    assert set(found) == {(image, edit, level) for image in images for edit in PROMPTS for level in LEVELS}
    assert set(found.values()) == {1}
    table = rows(made / "bases")
    assert len(table) == 12
    for row in table.values():
        basis = basis_of(row)
        assert row["latent_shape"] == [4, 8, 8]
        assert basis.tangents.shape == (2, 256)
        assert basis.features.shape == (2, int(np.prod(row["feature_shape"])))
        for vectors in (basis.tangents, basis.features):
            torch.testing.assert_close(vectors @ vectors.mT, torch.eye(2).double(), atol=2e-3, rtol=0.0)
        assert row["singular_values"] == sorted(row["singular_values"], reverse=True)
        assert row["timestep"] == (251 if row["method"] == "late" else 751)
        assert row["layer"] == "mid_block"
        with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
            assert picture.size == (56, 40)


def test_a_run_of_bases_that_went_on_is_whole_and_a_basis_alone_has_the_same_bytes(made: Path) -> None:
    before = contents(made / "bases")
    assert shardedit("basis", made / "recipe.yaml").exit_code == 0
    assert contents(made / "bases") == before
    said = shardedit("verify", made / "bases")
    assert said.exit_code == 0, said.stdout
    said = shardedit("regenerate", made / "bases", "im00", "--edit", "cat", "--method", "late")
    assert said.exit_code == 0, said.stdout
    assert shardedit("edit", made / "recipe.yaml").exit_code != 0, "the folder is that of other results"


def test_a_run_of_bases_refuses_what_has_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"a basis is that of editing\.method riemannian"):
        bases_recipe(tmp_path, "out", methods={"m": {"editing": {"method": "ledits_pp"}}})
    with pytest.raises(RecipeError, match="bases are written as Parquet"):
        bases_recipe(tmp_path, "out", sink={"folder": "-", "format": "webdataset"})
    with pytest.raises(RecipeError, match=r"sink\.background.*is of edited images"):
        bases_recipe(tmp_path, "out", sink={"folder": "-", "background": "input"})


def test_planning_counts_the_products_of_a_basis(tmp_path: Path) -> None:
    recipe = bases_recipe(tmp_path, "out")
    products = 3 * (2 * 1 + 1)  # three rows, one iteration, one to finish
    assert RowCounter(recipe).rows(recipe.edits) == 4 + 4 * products  # one inversion of four steps


# Geometry -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(made: Path) -> Path:
    smile = {"id": "s0.tar/im00", "edit": "cat", "method": "late", "vector": 1}
    settings = config(made, "geometry", block_size=2, directions={"smile": smile}, mean_directions=2)
    found = geometry.compare(settings)
    assert (found.bases, found.parts, found.computed_now, found.missing) == (12, 3, 3, 0)
    return made / "geometry"


def test_distances_are_those_between_the_rows_and_every_pair_is_there_once(made: Path, compared: Path) -> None:
    table = pq.read_table(compared / "distances.parquet").to_pylist()
    bases = {(row["id"], row["target_prompt"], row["timestep"]): basis_of(row) for row in rows(made / "bases").values()}
    kinds = [row["differ_in"] for row in table]
    # Three images under two prompts at two levels: 3 pairs of images in each of 4; of each image 2 of either kind.
    assert {kind: kinds.count(kind) for kind in kinds} == {"samples": 12, "timesteps": 6, "prompts": 6}
    pairs = set()
    for row in table:
        one, other = ((row[f"{which}id"], row[f"{which}prompt"], row[f"{which}timestep"]) for which in ("", "other_"))
        pairs.add(frozenset((one, other)))
        differing = [name for name, a, b in zip(("samples", "prompts", "timesteps"), one, other, strict=True) if a != b]
        assert differing == [row["differ_in"]]
        assert row["distance"] == pytest.approx(geodesic_distance(bases[one].features, bases[other].features))
        kept = [transported(feature, bases[other]).kept for feature in bases[one].features]
        assert row["kept"] == pytest.approx(sum(kept) / 2)
    assert len(pairs) == len(table)


def test_spectra_add_up_to_one_and_pictures_and_tables_say_the_same(compared: Path) -> None:
    for row in pq.read_table(compared / "spectra.parquet").to_pylist():
        assert sum(row["spectrum"]) == pytest.approx(1.0)
    summary = json.loads((compared / "geometry.json").read_text())
    assert [row["timestep"] for row in summary["samples"]] == [251, 751]
    assert summary["samples"][0]["pairs"] == 6
    text = (compared / "geometry.md").read_text()
    assert f"| {summary['samples'][0]['distance']:.4g} |" in text
    for name in ("distance_by_timestep", "distance_by_gap", "distance_by_prompt", "spectrum_by_timestep"):
        with Image.open(compared / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(10_000)) > 3, "a figure has axes, text and a line"


def test_figures_that_nothing_tells_of_are_left_out() -> None:
    assert pictures(summary_of([], [], [])) == {}


def test_a_comparison_goes_on_part_by_part_and_partitions_give_the_same_bytes(made: Path, compared: Path) -> None:
    smile = {"id": "s0.tar/im00", "edit": "cat", "method": "late", "vector": 1}
    settings = config(made, "shared", block_size=2, directions={"smile": smile}, mean_directions=2)
    first = geometry.compare(settings, partition=Partition(1, 2))
    assert (first.computed_now, first.missing, first.summary) == (1, 2, None)
    assert geometry.compare(settings).computed_now == 2
    assert geometry.compare(settings).computed_now == 0
    files = sorted(path.relative_to(compared) for path in compared.rglob("*") if path.is_file())
    files = [path for path in files if path.name != "comparison.json"]
    assert len(files) >= 13
    for path in files:
        assert (compared / path).read_bytes() == (made / "shared" / path).read_bytes(), path
    whole = config(made, "whole", directions={"smile": smile}, mean_directions=2)
    geometry.compare(whole)
    for name in ("distances.parquet", "spectra.parquet", "directions.parquet", "transport.parquet"):
        assert (compared / name).read_bytes() == (made / "whole" / name).read_bytes(), "blocks decide no number"


def test_what_cannot_be_compared_is_refused_with_the_way_out(made: Path, compared: Path, tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="holds another comparison"):
        geometry.compare(config(made, "geometry", space="tangents"))
    twice = config_from(GeometryConfig, {"bases": [str(made / "bases")] * 2, "sink": {"folder": str(tmp_path / "g")}})
    with pytest.raises(SinkError, match="a second time"):
        geometry.compare(twice)
    with pytest.raises(SinkError, match="num_vectors is 3, and the basis"):
        geometry.compare(config(made, "more", num_vectors=3))
    with pytest.raises(RecipeError, match="no basis of"):
        geometry.compare(config(made, "gone", directions={"a": {"id": "nobody"}}))
    here = {"id": "s0.tar/im00", "edit": "cat", "method": "late", "vector": 5}
    with pytest.raises(RecipeError, match="vector 5 is asked for"):
        geometry.compare(config(made, "far", directions={"a": here}))
    write_shards(tmp_path / "in", shards=1, rows=1)
    other = bases_recipe(tmp_path, "bases", model={"name": str(TINY_SD), "size": 32})
    driver.run(other, progress="off")
    both = [str(made / "bases"), str(tmp_path / "bases")]
    with pytest.raises(SinkError, match="different models or sizes"):
        geometry.compare(config_from(GeometryConfig, {"bases": both, "sink": {"folder": str(tmp_path / "g")}}))


def test_a_configuration_tells_all_that_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "geometry.yaml"
    path.write_text("bases: []\nspaces: features\nblock_size: 0\n")
    with pytest.raises(RecipeError) as caught:
        load_config(GeometryConfig, path, ["num_vectors=0"])
    assert {where for where, _ in caught.value.problems} == {"bases", "spaces", "block_size", "num_vectors", "sink"}


def test_the_command_prints_the_means_and_where_the_rest_is(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "geometry.yaml"
    path.write_text(yaml.safe_dump({"bases": str(made / "bases"), "sink": {"folder": str(tmp_path / "out")}}))
    said = shardedit("geometry", path, "--partition", "0/1")
    assert said.exit_code == 0
    assert "## Between samples" in said.stdout
    assert "12 bases in 1 part" in said.stdout
    assert (tmp_path / "out" / "directions.parquet").is_file()


# Edits along what was found -----------------------------------------------------------------------------------------


def edit_recipe(folder: Path, compared: Path, **changes: Any) -> Any:
    editing = {**EDITING, "edit_time": 0.3, "directions": str(compared / "directions.parquet"), "min_kept": 0.0}
    strengths = [-1, 1]
    data = recipe_data(
        folder,
        "edited",
        edits={
            "mean": {"target_prompt": "a cat", "direction": {"stored": "mean-cat-late-0", "strengths": strengths}},
            "smile": {"target_prompt": "a cat", "direction": {"stored": "smile", "strengths": strengths}},
        },
        inversion={"method": "ddim", "num_steps": changes.pop("num_steps", 4)},
        editing={**editing, **changes.pop("editing", {})},
        **changes,
    )
    del data["methods"]
    return recipe_from(data)


def test_images_are_moved_along_means_and_carried_directions_and_lost_ones_are_quarantined(
    made: Path, compared: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        (tmp_path / "in" / f"{number}.png").write_bytes(png(number))
    recipe = edit_recipe(tmp_path, compared)
    assert list(recipe.edits) == ["mean-1", "mean+1", "smile-1", "smile+1"]
    summary = driver.run(recipe, progress="off")
    assert (summary.done, summary.failed) == (8, 0)
    images = {key: row["image"]["bytes"] for key, row in rows(tmp_path / "edited").items()}
    assert len(set(images.values())) == 8
    strict = edit_recipe(tmp_path, compared, editing={"min_kept": 0.999}, sink={"folder": str(tmp_path / "strict")})
    summary = driver.run(strict.model_copy(update={"run": strict.run.model_copy(update={"max_failed_fraction": 1.0})}))
    assert summary.failed_by_class == {"EditError": summary.failed}
    (file,) = (tmp_path / "strict" / "quarantine").glob("*.parquet")
    assert all("less than editing.min_kept 0.999" in row["message"] for row in pq.read_table(file).to_pylist())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"editing": {"edit_time": 0.9}}, "was found at timestep 251, and images are moved at 751"),
        ({"num_steps": 5}, "was found at timestep 251, and images are moved at 201"),
        ({"model": {"name": "demo", "size": 64}}, "is of the model"),
    ],
)
def test_a_direction_of_another_model_or_level_is_refused_before_anything_is_written(
    changes: dict[str, Any], text: str, made: Path, compared: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "in", tmp_path / "in")
    with pytest.raises(RecipeError) as caught:
        driver.run(edit_recipe(tmp_path, compared, **changes), progress="off")
    assert text in str(caught.value)
    assert not (tmp_path / "edited").exists()


def test_a_file_without_directions_or_the_one_that_is_named_is_told(made: Path, compared: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "in", tmp_path / "in")
    with pytest.raises(SourceError, match="cannot be read"):
        driver.run(edit_recipe(tmp_path, compared, editing={"directions": str(made / "bases" / "run.json")}))
    recipe = edit_recipe(tmp_path, compared)
    renamed = {
        name: one.model_copy(update={"direction": one.direction.model_copy(update={"stored": "frown"})})
        for name, one in recipe.edits.items()
    }
    with pytest.raises(RecipeError, match=r"no direction 'frown'. It has: smile, mean-"):
        driver.run(recipe.model_copy(update={"edits": renamed}), progress="off")


def test_a_direction_of_another_layer_is_refused(made: Path, compared: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "in", tmp_path / "in")
    table = pq.read_table(compared / "directions.parquet")
    place = table.column_names.index("layer")
    other = table.set_column(place, "layer", [["up_blocks.0"] * len(table)])
    (tmp_path / "other").mkdir()
    pq.write_table(other, tmp_path / "other" / "directions.parquet")
    with pytest.raises(RecipeError, match="is of the layer 'up_blocks\\.0', and the edit's bottleneck is 'mid_block'"):
        driver.run(edit_recipe(tmp_path, tmp_path / "other"), progress="off")
