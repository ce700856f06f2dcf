"""A node is lost with units at work, on local files and on S3: every row and byte is there in the end."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.running import driver
from tests.clusters import edit_on_a_cluster
from tests.places import SETTLE_QUICKLY, local_place, s3_place
from tests.runs import asked, contents, results

NODE_LOSS = textwrap.dedent("""
    import json, sys, time
    import ray
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    from ray.cluster_utils import Cluster
    from pipeline.running import driver
    from pipeline.recipe import recipe_from

    recipes, begun, told = json.load(sys.stdin), *sys.argv[1:]

    def witness():
        import json, time
        import ray
        import pipeline.running.on_ray.executor
        edit = pipeline.running.on_ray.executor.EditWorker.__call__

        def slow(self, batch):
            unit = json.loads(batch["unit"][0].as_py())["unit"]["id"]
            with open(begun, "a") as file:
                file.write(f"{unit} {ray.get_runtime_context().get_node_id()}\\n")
            time.sleep(0.5)
            return edit(self, batch)

        pipeline.running.on_ray.executor.EditWorker.__call__ = slow

    # Loopback, but not 127.0.0.1, for which Ray would put the machine's outer address.
    common = {"num_gpus": 0, "node_ip_address": "127.0.0.2", "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **common})
    victim = nodes.add_node(num_cpus=2, **common)
    ray.init(address=nodes.address, log_to_driver=False, runtime_env={"worker_process_setup_hook": witness})
    head = ray.get_runtime_context().get_node_id()

    for kind, recipe in recipes.items():
        Path(begun).write_text("")
        with ThreadPoolExecutor(1) as pool:  # nodes can only be added from the main thread
            summary = pool.submit(driver.run, recipe_from(recipe), progress="off")
            while not summary.done() and all(line.endswith(head) for line in Path(begun).read_text().splitlines()):
                time.sleep(0.02)
            time.sleep(0.2)
            nodes.remove_node(victim, allow_graceful=False)
            victim = nodes.add_node(num_cpus=2, **common)
        units = [line.split()[0] for line in Path(begun).read_text().splitlines()]
        with open(told, "a") as file:
            file.write(json.dumps([kind, summary.result().exit_code, units]) + "\\n")
    ray.shutdown()
    for node in nodes.list_all_nodes():
        nodes.remove_node(node, allow_graceful=False)
""")


@dataclass(frozen=True)
class Survived:
    """A run in which a node was lost."""

    out: Path
    undisturbed: dict[str, Any]
    exit_code: int
    units: list[str]  # as they were begun


@pytest.fixture(scope="module")
def survived(
    four_shards: Path, s3_server: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Survived]]:
    """By kind of place: a run each, one after the other on one cluster of two nodes, since that takes long to start."""
    folder = tmp_path_factory.mktemp("nodes")
    with s3_place(s3_server) as bucket:
        places = {place.kind: place for place in (local_place(folder), bucket)}
        undisturbed = {}
        for kind, place in places.items():
            shutil.copytree(four_shards, place.root / "in")
            recipe = place.recipe("in", "undisturbed")
            driver.run(recipe, progress="off")
            undisturbed[kind] = contents(place.folder(recipe))
        recipes = {kind: place.recipe_data("in", "out", engine="ray", workers=2) for kind, place in places.items()}
        program = ["-c", SETTLE_QUICKLY + NODE_LOSS, str(folder / "begun"), str(folder / "told")]
        edit_on_a_cluster(program, recipes, seconds=500)
        yield {
            kind: Survived(places[kind].root / "out", undisturbed[kind], code, units)
            for kind, code, units in map(json.loads, (folder / "told").read_text().splitlines())
        }


@pytest.mark.slow  # a cluster of nodes, and minutes until Ray gives one up
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_node_that_is_lost_with_units_at_work_costs_no_row_and_no_byte(
    survived: dict[str, Survived], kind: str
) -> None:
    run = survived[kind]
    assert run.exit_code == 0
    assert len(set(run.units)) == 12
    assert len(run.units) > 12, "no unit was at work on the lost node"
    assert contents(run.out) == run.undisturbed
    assert results(run.out) == asked(shards=4, rows=5)
