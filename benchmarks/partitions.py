"""Partitions of one run at once, killed at random operations, against the same run by one command.

    python -m benchmarks.partitions                     10 runs in two partitions and 10 in four
    python -m benchmarks.partitions --runs 1 --counts 3

Every process is killed (SIGKILL) before or after one of its writes or removals, drawn at random, and is started again,
as long as kills are left. A run is compared by its merged files: every (image, edit, method) once, and every byte.
Writes build/partitions.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pipeline.common.partition import WHOLE, Partition
from pipeline.looking.runs import find_run
from pipeline.looking.verify import verify
from pipeline.recipe import recipe_from
from pipeline.running import driver
from pipeline.writing.files import is_temporary
from tests.runs import asked, recipe_data, results, write_shards

SHARDS, ROWS = 8, 4
DEADLY = 0.03  # share of operations that a process is killed at
KILLS = 2  # of a partition: a row that is at work in three deaths goes to quarantine, as it should
FORK = multiprocessing.get_context("fork")  # they need no imports of their own


def _drive(data: dict[str, Any], partition: Partition, deadly: float, seed: float) -> None:
    """A command of its own: exit code 0, that of its error, or death."""
    draw = random.Random(seed)

    def killing(operation: Callable[..., Any]) -> Callable[..., Any]:
        def killed_at(*arguments: Any) -> Any:
            strikes, before = draw.random() < deadly, draw.random() < 0.5
            if strikes and before:
                os.kill(os.getpid(), signal.SIGKILL)
            done = operation(*arguments)
            if strikes:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return killed_at

    os.replace, os.remove = killing(os.replace), killing(os.remove)  # what puts and removals end with
    try:
        driver.run(recipe_from(data), progress="off", partition=partition)
        code = 0
    except Exception as error:
        print(f"{partition}: {type(error).__name__}: {error}", flush=True)
        code = 1
    os._exit(code)


def _start(data: dict[str, Any], partition: Partition, deadly: float, seed: float) -> BaseProcess:
    process = FORK.Process(target=_drive, args=(data, partition, deadly, seed))
    process.start()
    return process


def run_in_parts(data: dict[str, Any], count: int, *, seed: int, deadly: float = DEADLY) -> dict[str, int]:
    """Let one process per partition work until all have ended well, killing some on the way.

    Returns:
        killed: how many; failed: how many ended with an error.
    """
    draw = random.Random(seed)
    parts = {_start(data, (part := Partition(index, count)), deadly, draw.random()): part for index in range(count)}
    killed, failed = Counter[Partition](), 0
    while parts:
        ended = wait([process.sentinel for process in parts])
        for process in [process for process in parts if process.sentinel in ended]:
            process.join()
            part = parts.pop(process)
            if process.exitcode == -signal.SIGKILL:
                killed[part] += 1
                parts[_start(data, part, deadly if killed[part] < KILLS else 0.0, draw.random())] = part
            else:
                failed += process.exitcode != 0
    return {"killed": killed.total(), "failed": failed}


def data_of(out: Path) -> dict[str, bytes]:
    """A run's merged files by name; not what a kill left of a write."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for kind in ("data", "quarantine")
        for path in sorted((out / kind).iterdir())
        if not is_temporary(path.name)
    }


def is_whole(out: Path, calm: dict[str, bytes]) -> bool:
    """Whether a run is complete, every result is there once, and every byte is that of the calm run."""
    run = find_run(str(out))
    inspection = verify(run.sink, run.record)
    complete = json.loads((out / "summary.json").read_text())["complete"]
    return complete and inspection.clean and results(out) == asked(shards=SHARDS, rows=ROWS) and data_of(out) == calm


def measure(counts: list[int], runs: int) -> list[dict[str, Any]]:
    """One line per number of partitions."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        source = write_shards(Path(folder) / "in", shards=SHARDS, rows=ROWS)
        calm = Path(folder) / "calm"
        process = _start(recipe_data(source, calm, engine="local"), WHOLE, 0.0, 0)
        process.join()
        expected = data_of(calm)
        for count in counts:
            start, sums, differ = time.monotonic(), {"killed": 0, "failed": 0}, 0
            for number in range(runs):
                out = Path(folder) / f"{count}-{number}"
                data = recipe_data(source, out, engine="local")
                found = run_in_parts(data, count, seed=1000 * count + number)
                sums = {key: value + found[key] for key, value in sums.items()}
                differ += not is_whole(out, expected)
            seconds = round(time.monotonic() - start, 1)
            lines.append({"partitions": count, "runs": runs, **sums, "differ": differ, "seconds": seconds})
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4])
    chosen = parser.parse_args()
    lines = measure(chosen.counts, chosen.runs)
    Path("build").mkdir(exist_ok=True)
    Path("build/partitions.json").write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
