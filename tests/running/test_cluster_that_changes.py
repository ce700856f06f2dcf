"""Nodes are lost for good, come, go and stand still: a run ends by itself on what is left, with every row and byte."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clusters import edit_on_a_cluster
from tests.runs import asked, contents, recipe_data, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1600)]
UNITS = 12  # of `four_shards`
RUNS: dict[str, dict[str, Any]] = {
    "gpu": {"workers": 2, "gpus_per_worker": 1},
    "cpu": {"workers": 3, "gpus_per_worker": 0},
    "elastic": {"workers": {"min": 1, "max": 2}, "gpus_per_worker": 1},
    "still": {"workers": 2, "gpus_per_worker": 1},
}


@dataclass(frozen=True)
class Told:
    """A run in which the cluster changed."""

    out: Path
    exit_code: int
    begun: list[str]  # units, each time that they were
    nodes: int  # on which any was
    seconds: float


@pytest.fixture(scope="module")
def told(four_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """All runs, one after the other on one cluster, which takes long to start."""
    folder = tmp_path_factory.mktemp("changing")
    recipes = {name: recipe_data(four_shards, folder / name, engine="ray", **run) for name, run in RUNS.items()}
    # Not nice: beside other programs workers would get no time at all.
    edit_on_a_cluster(["-m", "tests.changing_cluster", str(folder)], recipes, seconds=1500, RAY_worker_niceness="0")
    return {name: Told(folder / name, **json.loads((folder / f"{name}.json").read_text())) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_whose_cluster_changes_ends_by_itself_with_every_row_and_byte(
    told: dict[str, Told], four_edited: dict[str, Any], name: str
) -> None:
    run = told[name]
    print(f"{name}: {len(run.begun) - UNITS} of {UNITS} units recomputed, {run.seconds} s")
    assert run.exit_code == 0
    assert len(set(run.begun)) == UNITS
    assert len(run.begun) > UNITS, "no unit was at work on what was lost"
    assert contents(run.out) == four_edited
    assert results(run.out) == asked(shards=4, rows=5)
    assert not list((run.out / "_attempts").iterdir())


def test_a_pool_between_two_sizes_grows_onto_a_node_that_comes(told: dict[str, Told]) -> None:
    assert told["elastic"].nodes == 2
