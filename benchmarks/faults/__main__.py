"""The command line; see the package."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BUILD = Path("build")
TOTAL = 1000
# Before numpy, torch and pyarrow are imported: a process that forks has one thread.
SINGLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
PRELOADED = (
    "pandas",
    "s3fs",
    "pipeline.cli",
    "pipeline.running.driver",
    "pipeline.entry",
    "pipeline.looking.report.page",
    "pipeline.models.loading",
    "pipeline.looking.verify",
    "pipeline.running.worker",
)
PRELOADED_FOR_RAY = ("ray.cluster_utils", "ray.data", "pipeline.running.on_ray.executor")


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="Disturb runs, repeat, compare.")
    parser.add_argument("--kind", default="", help="only kinds whose name and store hold this, e.g. 'zombie on files'")
    parser.add_argument("--count", type=int, default=TOTAL, help=f"of about {TOTAL} so many, of all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--at-once", type=int, default=2, help="cases side by side")
    return parser.parse_args()


def preload(names: Iterable[str]) -> None:
    """Import what drivers need, once. Nothing of it may have started a thread: processes are forked from this one."""
    for name in names:
        importlib.import_module(name)
    from pipeline.looking.report.templates import page_template

    page_template("report/page.html.j2")
    remember_services()
    threads = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    # jemalloc's own, which it ends and starts again around a fork.
    if len([name for name in threads if name != "jemalloc_bg_thd"]) > 1:
        raise SystemExit(f"the process that is to be forked has threads: {threads}")


def remember_services() -> None:
    """Let botocore parse its descriptions of services once: every client reads them anew, for a third of a second."""
    from functools import cache

    import botocore.session
    from botocore.loaders import JSONFileLoader

    JSONFileLoader.load_file = cache(JSONFileLoader.load_file)  # type: ignore[method-assign]
    session = botocore.session.get_session()
    session.create_client("s3", region_name="us-east-1", aws_access_key_id="any", aws_secret_access_key="any")


def where() -> dict[str, str]:
    """What ran where."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.partition(":")[2].strip() for line in cpus if line.startswith("model name")]
    return {
        "commit": asked.stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{os.cpu_count()} x {(model or [platform.processor()])[0]}, Python {platform.python_version()}",
        "command": f"python -m benchmarks.faults {shlex.join(sys.argv[1:])}".strip(),
    }


def main() -> None:
    """Play what is left, print a table, write build/faults.json; exit code 1 where anything was wrong."""
    os.environ.update(SINGLE)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an end like Ctrl-C's: nothing is left running
    asked = arguments()
    begun = time.monotonic()
    from benchmarks.faults import campaign

    kinds = campaign.chosen(asked.kind)
    preload([*PRELOADED, *(PRELOADED_FOR_RAY if any(kind.store.startswith("Ray") for kind in kinds) else ())])

    code = campaign.code_under_test()
    results = campaign.Results(BUILD / "faults" / f"{code}-seed{asked.seed}")
    # Short: Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="sf-", ignore_cleanup_errors=True) as work:
        for name in [name for name in os.environ if name.startswith(("RAY_", "AWS_"))]:
            del os.environ[name]
        os.environ |= {"RAY_TMPDIR": work, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.getcwd()}
        notes = campaign.run_part(
            Path(work),
            results,
            kinds=kinds,
            seed=asked.seed,
            share=asked.count / TOTAL,
            until=begun + 60 * asked.minutes,
            at_once=asked.at_once,
        )
    found: dict[str, Any] = {
        **campaign.sums(results.rows),
        "by_kind": {name: campaign.sums(rows) for name, rows in campaign.by_kind(results.rows)},
        "seconds_of_cases": round(sum(row["seconds"] for row in results.rows)),
        "seed": asked.seed,
        "code": code,
        **where(),
        "notes": notes,
    }
    show(found)
    (BUILD / "faults.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    wrong = ("lost", "doubled", "contradictions", "healthy_quarantined", "disorderly")
    raise SystemExit(int(any(found[name] for name in wrong) or not found["bytes_equal"]))


def show(found: dict[str, Any]) -> None:
    """A line for each kind, and one for all."""
    from rich.console import Console
    from rich.table import Table

    from benchmarks.faults.campaign import FIGURES

    table = Table("", *(name.replace("_", " ") for name in FIGURES), title="Faults", title_justify="left")
    for name, figures in [*found["by_kind"].items(), ("all", found)]:
        table.add_row(name, *(str(figures[key]) for key in FIGURES))
    console = Console(width=150)
    console.print(table)
    for note in found["notes"]:
        console.print(note)


if __name__ == "__main__":
    main()
