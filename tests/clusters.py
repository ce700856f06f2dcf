"""Ray clusters in processes of their own, which tests end; `ray stop` would end every Ray of the user."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.processes import end_with_children


def ray_environment(**more: str) -> dict[str, str]:
    """This process's environment without what it says to Ray, and more."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**bare, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **more}


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder for what Ray writes: its path is short, since it holds sockets."""
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"shardedit-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def edit_on_a_cluster(
    program: Sequence[str], recipes: Mapping[str, Any], *, seconds: float, **environment: str
) -> None:
    """Run a program that starts a cluster, edits the recipes that it reads from its standard input, and ends.

    Args:
        program: what follows `python`.
        recipes: as plain data, by name.
        seconds: that it may take.
        environment: what it is told beside `ray_environment`.
    """
    with socket_folder() as folder:
        process = subprocess.Popen(
            [sys.executable, *program],
            env=ray_environment(RAY_TMPDIR=str(folder), **environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, said = process.communicate(json.dumps(recipes), timeout=seconds)
        finally:
            end_with_children(process)
    assert process.returncode == 0, said[-5000:]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ports_below_rays() -> list[int]:
    """Three free ports outside 10002-19999, which a head node keeps for its workers."""
    found: list[int] = []
    while len(found) < 3:
        if (port := free_port()) not in found and not 10002 <= port <= 19999:
            found.append(port)
    return found


def wait_until_it_answers(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until a head node answers, were it with a refusal."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, "the head node did not start"
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5)
            return
        except urllib.error.HTTPError:
            return  # it answers; who has no token is turned away
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the head node does not answer")
