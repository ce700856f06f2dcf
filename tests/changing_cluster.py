"""A Ray cluster of nodes on this machine that come, go and stand still while it edits, for test_cluster_that_changes.

    python -m tests.changing_cluster FOLDER < recipes.json     writes FOLDER/NAME.json for each scenario

A process of its own, since a process has one Ray at a time, and its nodes end with it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from pipeline.recipe import recipe_from
from pipeline.running import driver
from pipeline.running.on_ray import pool_watch
from pipeline.writing.lock import DriverLock
from pipeline.writing.summary import Summary

# Loopback, but not 127.0.0.1, for which Ray would put the machine's outer address. GPUs are counted and not there.
NODE = {"num_gpus": 1, "num_cpus": 1, "node_ip_address": "127.0.0.2", "include_dashboard": False}
# A node that does not answer is taken for dead after some 10 s, where 30 are usual.
HEALTH = {"health_check_period_ms": 2000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4}


def witness(begun: str, hold: str) -> Callable[[], None]:
    """What every process of the cluster does first: note where each unit is begun, and take time over it.

    Args:
        begun: file of the notes.
        hold: file; no unit is finished while it is there.
    """

    def install() -> None:
        import json
        import time
        from pathlib import Path

        import ray

        import pipeline.running.on_ray.executor

        edit = pipeline.running.on_ray.executor.EditWorker.__call__

        def slow(self: Any, batch: Any) -> Any:
            unit = json.loads(batch["unit"][0].as_py())["unit"]["id"]
            with open(begun, "a") as file:
                file.write(f"{unit} {ray.get_runtime_context().get_node_id()}\n")
            until = time.time() + 180
            while Path(hold).exists() and time.time() < until:
                time.sleep(0.1)
            time.sleep(1.5)
            return edit(self, batch)

        pipeline.running.on_ray.executor.EditWorker.__call__ = slow

    return install


class Stage:
    """The cluster, and what runs on it."""

    def __init__(self, folder: Path) -> None:
        self.begun, self.hold = folder / "begun", folder / "hold"
        self.nodes = Cluster(initialize_head=True, head_node_args={"_system_config": HEALTH, **NODE})
        hook = {"worker_process_setup_hook": witness(str(self.begun), str(self.hold))}
        ray.init(address=self.nodes.address, log_to_driver=False, runtime_env=hook)

    def lines(self) -> list[tuple[str, str]]:
        """Units as they were begun, with the nodes."""
        unit_and_node = [line.split() for line in self.begun.read_text().splitlines()]
        return [(unit, node) for unit, node in unit_and_node]

    def wait(self, run: Future[Summary], until: Callable[[], bool]) -> None:
        """Until something holds."""
        while not until():
            if run.done():
                raise AssertionError(f"the run ended before: {run.result()}")
            time.sleep(0.05)

    def at_work(self, node: Any) -> Callable[[], bool]:
        """Whether a unit has begun on a node."""
        return lambda: any(where == node.node_id for _, where in self.lines())


def lose_one_of_two(stage: Stage, run: Future[Summary], nodes: list[Any]) -> None:
    """A node with a GPU goes for good, units at work on it."""
    stage.wait(run, stage.at_work(nodes[0]))
    stage.nodes.remove_node(nodes.pop(), allow_graceful=False)


def lose_two_of_three(stage: Stage, run: Future[Summary], nodes: list[Any]) -> None:
    """Of three nodes with a CPU each and three workers two go for good: what is left has room for two workers."""
    stage.wait(run, lambda: all(stage.at_work(node)() for node in nodes))
    while nodes:
        stage.nodes.remove_node(nodes.pop(), allow_graceful=False)


def come_and_go(stage: Stage, run: Future[Summary], nodes: list[Any]) -> None:
    """A node comes while one worker is at work, gets a worker, and goes for good."""
    stage.hold.touch()  # the worker has all the units that it may have, and the others wait for another one
    stage.wait(run, lambda: len(stage.lines()) > 0)
    nodes.append(stage.nodes.add_node(**NODE))
    stage.wait(run, stage.at_work(nodes[0]))
    stage.nodes.remove_node(nodes.pop(), allow_graceful=False)
    stage.hold.unlink()


def stand_still(stage: Stage, run: Future[Summary], nodes: list[Any]) -> None:
    """A node stands still, as in a network cut, until it is taken for dead; then it wakes up, its workers too."""
    stage.wait(run, stage.at_work(nodes[0]))
    raylet = psutil.Process(nodes[0].all_processes["raylet"][0].process.pid)
    stopped = [raylet, *raylet.children(recursive=True)]
    for process in stopped:
        process.suspend()
    node = nodes[0].node_id
    stage.wait(run, lambda: not next(one["Alive"] for one in ray.nodes() if one["NodeID"] == node))
    time.sleep(2.0)
    for process in stopped:
        process.resume()


SCENARIOS: dict[str, tuple[Callable[[Stage, Future[Summary], list[Any]], None], int]] = {  # and nodes beside the head
    "gpu": (lose_one_of_two, 1),
    "cpu": (lose_two_of_three, 2),
    "elastic": (come_and_go, 0),
    "still": (stand_still, 1),
}


def main(folder: Path) -> None:
    """All scenarios for which there is a recipe, on one cluster."""
    DriverLock.__init__.__kwdefaults__["settle_s"] = 0.2  # type: ignore[index]
    pool_watch.STRANDED_AFTER_S = 5.0
    recipes: dict[str, Any] = json.load(sys.stdin)
    stage = Stage(folder)
    for name, recipe in recipes.items():
        disturb, count = SCENARIOS[name]
        nodes = [stage.nodes.add_node(**NODE) for _ in range(count)]
        stage.begun.write_text("")
        started = time.monotonic()
        with ThreadPoolExecutor(1) as pool:  # nodes can only be added from the main thread
            run = pool.submit(driver.run, recipe_from(recipe), progress="off")
            disturb(stage, run, nodes)
            summary = run.result()
        told = {
            "exit_code": summary.exit_code,
            "begun": [unit for unit, _ in stage.lines()],
            "nodes": len({node for _, node in stage.lines()}),
            "seconds": round(time.monotonic() - started, 1),
        }
        (folder / f"{name}.json").write_text(json.dumps(told))
        for node in nodes:
            stage.nodes.remove_node(node, allow_graceful=False)
    ray.shutdown()
    for node in stage.nodes.list_all_nodes():
        stage.nodes.remove_node(node, allow_graceful=False)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main(Path(sys.argv[1]))
