"""A job that is submitted to a head node of its own. Who may submit one has nothing to do with where its files are."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clusters import ports_below_rays, ray_environment, socket_folder, wait_until_it_answers
from tests.processes import end_with_children
from tests.runs import contents, recipe_data

pytestmark = pytest.mark.timeout(400)


@dataclass(frozen=True)
class Head:
    address: str
    environment: dict[str, str]


@pytest.fixture
def head() -> Iterator[Head]:
    """A head node with a job port, on loopback, with a random token of its own."""
    port, dashboard, agent = ports_below_rays()
    environment = ray_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-agent-listen-port={agent}", "--num-cpus=2"]
    with socket_folder() as folder:
        command += [f"--temp-dir={folder}"]
        process = subprocess.Popen([str(part) for part in command], env=environment, stdout=subprocess.DEVNULL)
        try:
            wait_until_it_answers(f"http://127.0.0.1:{dashboard}", process)
            yield Head(f"http://127.0.0.1:{dashboard}", environment)
        finally:
            end_with_children(process)  # a polite end would drain the node for half a minute


def submit(head: Head, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", head.address]
    command += ["--working-dir", str(folder), "--", sys.executable, "-m", "jobs.edit", "recipe.json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow  # a head node with a dashboard takes a minute
def test_a_submitted_job_edits_on_the_cluster_it_runs_in_and_needs_the_token(
    head: Head, four_shards: Path, four_edited: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "job").mkdir()
    recipe = recipe_data(four_shards, tmp_path / "out", engine="ray")
    (tmp_path / "job" / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=60)
    stranger = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH")}
    refused = submit(head, tmp_path / "job", {**stranger, "HOME": str(tmp_path)})  # no token of the user's either
    assert refused.returncode != 0
    assert "token authentication is enabled" in refused.stdout + refused.stderr
    assert not (tmp_path / "out").exists()
    done = submit(head, tmp_path / "job", head.environment)
    assert contents(tmp_path / "out") == four_edited, done.stdout + done.stderr
    assert done.returncode == 0  # though one image could not be decoded
    assert "succeeded" in done.stdout + done.stderr
    assert head.environment["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr
