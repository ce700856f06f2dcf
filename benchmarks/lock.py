"""Does the driver's lock exclude? Processes take it in turns, each looking whether it is alone inside.

python -m benchmarks.lock               100,000 holds by 6 processes on local files, to build/lock.json
python -m benchmarks.lock --holds 1000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from pipeline.errors import SinkError
from pipeline.recipe import SinkConfig
from pipeline.writing.lock import DriverLock


def _take_turns(folder: Path, holds: int, done: Synchronized[int], twice: Synchronized[int], errors: Any) -> None:
    inside = folder / "inside"
    while done.value < holds:
        try:
            with DriverLock(SinkConfig(folder=str(folder)), on_lost=lambda _: None, notify=lambda _: None) as lock:
                try:
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    with twice.get_lock():
                        twice.value += 1
                if not lock.claim.holds():
                    errors.put("the holder does not hold")
                inside.unlink(missing_ok=True)
                with done.get_lock():
                    done.value += 1
        except SinkError as error:
            if "is being written by another driver" not in str(error):
                errors.put(str(error))
        except Exception as error:
            errors.put(f"{type(error).__name__}: {error}")


def hold_many(folder: Path, *, processes: int, holds: int) -> dict[str, int]:
    """Let processes take the lock of a folder until it was held so many times (or a few more, which are under way).

    Returns:
        holds: as asked for; two_inside: how often a second one was inside; errors: other than being refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")  # they need no imports of their own
    done, twice, errors = context.Value("l", 0), context.Value("l", 0), context.SimpleQueue()
    workers = [context.Process(target=_take_turns, args=(folder, holds, done, twice, errors)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    found = []
    while any(worker.is_alive() for worker in workers):
        while not errors.empty():
            found.append(errors.get())
        time.sleep(0.05)
    for worker in workers:
        worker.join()
        if worker.exitcode:
            found.append(f"exit code {worker.exitcode}")
    while not errors.empty():
        found.append(errors.get())
    for text in sorted(set(found)):
        print(f"{found.count(text)} x {text}")
    return {"holds": min(done.value, holds), "two_inside": twice.value, "errors": len(found)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--holds", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=6)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        found: dict[str, float] = dict(hold_many(Path(folder) / "out", processes=chosen.processes, holds=chosen.holds))
        found["seconds"] = round(time.monotonic() - start, 1)
    Path("build").mkdir(exist_ok=True)
    Path("build/lock.json").write_text(json.dumps({"processes": chosen.processes, **found}, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    main()
