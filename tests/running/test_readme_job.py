"""The README's `ray job submit`, as printed, on a head of its own: in a home that holds no token yet."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.running.demo import draw_input
from tests.clusters import ports_below_rays, socket_folder, wait_until_it_answers
from tests.processes import end_with_children
from tests.runs import write_shards

ROOT = Path(__file__).parents[2]


def printed() -> list[str]:
    """The lines of the README's block that starts a head."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (found,) = (block for block in blocks if "ray start --head" in block)
    return str(found).splitlines()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_job_that_the_readme_submits_succeeds_though_an_image_is_damaged(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("configs", "jobs", "pipeline"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".gitignore", checkout)
    draw_input(checkout / "demo-output", 2)
    write_shards(tmp_path / "damaged", shards=1, rows=1, damaged=(0,))
    shutil.copy(tmp_path / "damaged" / "s0.tar", checkout / "demo-output" / "input")
    token, head_line, submit_line, stop_line = printed()
    assert (head_line, stop_line) == (
        "ray start --head",
        "ray stop",
    )  # which would end every Ray of this machine's user

    port, dashboard, agent = ports_below_rays()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}
    environment |= {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    own = f"--block --node-ip-address=127.0.0.1 --port={port} --dashboard-port={dashboard} --num-cpus=2"
    own += f" --dashboard-agent-listen-port={agent}"
    with socket_folder() as folder:
        head_line += f" {own} --temp-dir={folder}"
        head = subprocess.Popen(["bash", "-c", f"{token}\n{head_line}"], cwd=checkout, env=environment)
        try:
            wait_until_it_answers(environment["RAY_API_SERVER_ADDRESS"], head)
            done = subprocess.run(
                ["bash", "-c", f"{token}\n{submit_line}"],
                cwd=checkout,
                env=environment,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
        finally:
            end_with_children(head)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "succeeded" in said
    assert "max_restarts" not in said
    summary = json.loads((checkout / "edited-on-ray" / "summary.json").read_text())
    assert (summary["done"], summary["failed"], summary["outcome"]) == (4, 2, "complete with failures")
