"""Nodes are lost for good, come, go and stand still: a run ends by itself on what is left, with every row and byte."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe import recipe_from
from pipeline.running import driver
from tests.processes import end_with_children
from tests.runs import asked, contents, recipe_data, results, write_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1600)]
SHARDS, ROWS, UNITS = 4, 5, 12
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
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("source") / "in", shards=SHARDS, rows=ROWS)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed")
    driver.run(recipe_from(recipe_data(source, out, engine="local")), progress="off")
    return contents(out)


@pytest.fixture(scope="module")
def told(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """All runs, one after the other on one cluster, which takes long to start."""
    folder = tmp_path_factory.mktemp("changing")
    temporary = Path(os.environ.get("TMPDIR", "/tmp")) / f"shardedit-{secrets.token_hex(4)}"  # short: holds sockets
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(temporary)}
    environment["RAY_worker_niceness"] = "0"  # beside other programs workers would get no time at all
    recipes = {name: recipe_data(source, folder / name, engine="ray", **run) for name, run in RUNS.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.changing_cluster", str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, said = process.communicate(json.dumps(recipes), timeout=1500)
    finally:
        end_with_children(process)
        shutil.rmtree(temporary, ignore_errors=True)
    assert process.returncode == 0, said[-5000:]
    return {name: Told(folder / name, **json.loads((folder / f"{name}.json").read_text())) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_whose_cluster_changes_ends_by_itself_with_every_row_and_byte(
    told: dict[str, Told], undisturbed: dict[str, Any], name: str
) -> None:
    run = told[name]
    print(f"{name}: {len(run.begun) - UNITS} of {UNITS} units recomputed, {run.seconds} s")
    assert run.exit_code == 0
    assert len(set(run.begun)) == UNITS
    assert len(run.begun) > UNITS, "no unit was at work on what was lost"
    assert contents(run.out) == undisturbed
    assert results(run.out) == asked(shards=SHARDS, rows=ROWS)
    assert not list((run.out / "_attempts").iterdir())


def test_a_pool_between_two_sizes_grows_onto_a_node_that_comes(told: dict[str, Told]) -> None:
    assert told["elastic"].nodes == 2
