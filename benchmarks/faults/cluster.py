"""A Ray cluster on this machine whose nodes come and go: kept by a process of its own, asked through a socket.

A head with one CPU, on which drivers live, and two nodes with two each. Only the process that made a cluster can add
to it, and only from its main thread.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import psutil

NODES = 2
# Loopback, but not 127.0.0.1, for which Ray would put the machine's outer address.
COMMON = {"num_gpus": 0, "node_ip_address": "127.0.0.2", "include_dashboard": False}


class Cluster:
    """Asks the keeper. `socket` is where it listens."""

    def __init__(self, socket: Path) -> None:
        self._socket = str(socket)

    def _ask(self, *question: Any) -> Any:
        with Client(self._socket, "AF_UNIX") as connection:
            connection.send(question)
            return connection.recv()

    @property
    def address(self) -> str:
        """For drivers."""
        return str(self._ask("address"))

    def fill(self) -> None:
        """Let there be `NODES` nodes beside the head, as at the beginning."""
        self._ask("fill")

    def lose(self, *, whole: bool) -> None:
        """Kill a node's raylet, which takes its workers along; or all of a node's processes at one moment."""
        self._ask("lose", whole)


@contextmanager
def kept_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster, until the block ends."""
    socket = folder / "keeper"
    pid = os.fork()
    if pid == 0:
        try:
            _keep(socket)
        finally:
            os._exit(0)
    while not socket.exists():
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise RuntimeError("the cluster did not start")
        time.sleep(0.05)
    try:
        yield Cluster(socket)
    finally:
        with suppress(OSError):
            Cluster(socket)._ask("end")
        os.waitpid(pid, 0)


def _keep(socket: Path) -> None:
    """In the keeper's process."""
    os.environ["RAY_raylet_start_wait_time_s"] = "300"  # noqa: SIM112  Ray's own name; a busy machine is no fault
    from ray.cluster_utils import Cluster as RayCluster

    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1, **COMMON})
    nodes: list[Any] = []

    def raylet(node: Any) -> Any:
        return node.all_processes["raylet"][0].process

    with Listener(str(socket), "AF_UNIX") as listener:
        while True:
            with listener.accept() as connection:
                match connection.recv():
                    case ["address"]:
                        answer = cluster.address
                    case ["fill"]:
                        nodes = [node for node in nodes if raylet(node).poll() is None]
                        while len(nodes) < NODES:
                            nodes.append(cluster.add_node(num_cpus=2, **COMMON))
                        answer = ""
                    case ["lose", whole]:
                        _lose(raylet(nodes[-1]).pid, whole)
                        raylet(nodes[-1]).wait()
                        answer = ""
                    case _:
                        for node in [*nodes, cluster.head_node]:  # a polite end would drain each for half a minute
                            node.kill_all_processes(check_alive=False, allow_graceful=False)
                        connection.send("")
                        return
                connection.send(answer)


def _lose(raylet: int, whole: bool) -> None:
    victims = [psutil.Process(raylet)]
    if whole:
        victims += victims[0].children(recursive=True)
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
