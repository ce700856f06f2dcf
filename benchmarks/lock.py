"""Does the driver's lock exclude? Processes take it in turns, each looking whether it is alone inside.

python -m benchmarks.lock               100,000 holds by 6 processes on local files
python -m benchmarks.lock --partitions  the same, each hold of a partition that it draws: of 1, 2, 3, 4 or 6
python -m benchmarks.lock --holds 1000

Killed, it goes on from what build/lock.json (build/lock-partitions.json) counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from pipeline.common.partition import WHOLE, Partition
from pipeline.errors import HeldError
from pipeline.recipe import SinkConfig
from pipeline.writing.lock import DriverLock

CELLS = 12  # stand for shards: partitions of 1, 2, 3, 4 and 6 share some and miss others
PARTITIONS = tuple(Partition(index, count) for count in (1, 2, 3, 4, 6) for index in range(count))
WAIT_S = 0.1  # at most
PART_HOLDS = 500  # after each, the sums are written


def _take_turns(
    folder: Path,
    holds: int,
    partitions: Sequence[Partition],
    done: Synchronized[int],
    twice: Synchronized[int],
    errors: Any,
) -> None:
    draw = random.Random(os.getpid())
    while done.value < holds:
        partition = draw.choice(partitions)
        try:
            with DriverLock(
                SinkConfig(folder=str(folder)), on_lost=errors.put, notify=lambda _: None, partition=partition
            ) as lock:
                cells = [folder / f"inside-{cell}" for cell in partition.of(range(CELLS))]
                found = sum(_was_taken(cell) for cell in cells)
                with twice.get_lock():
                    twice.value += bool(found)
                if not lock.claim.holds():
                    errors.put("the holder does not hold")
                if _was_taken(folder / f"used-{lock.claim.generation}"):
                    errors.put("two have one generation")
                for cell in cells:
                    if not _grows(cell.with_name(cell.name.replace("inside", "generation")), lock.claim.generation):
                        errors.put("a generation came back")
                    cell.unlink(missing_ok=True)
                with done.get_lock():
                    done.value += 1
        except HeldError:  # asked again at once, those who wait would take the cores from the one who holds
            time.sleep(draw.uniform(0, WAIT_S))
        except Exception as error:
            errors.put(f"{type(error).__name__}: {error}")


def _was_taken(note: Path) -> bool:
    try:
        os.close(os.open(note, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return True
    return False


def _grows(note: Path, generation: int) -> bool:
    before = int(note.read_text()) if note.exists() else 0
    note.write_text(str(generation))
    return generation > before


def hold_many(
    folder: Path, *, processes: int, holds: int, partitions: Sequence[Partition] = (WHOLE,)
) -> dict[str, int]:
    """Let processes take the lock of a folder until it was held so many times (or a few more, which are under way).

    Args:
        folder: of the lock.
        processes: at once.
        holds: in all.
        partitions: each hold is of one of these.

    Returns:
        holds: as asked for; two_inside: how often a second one was inside; errors: other than being refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")  # they need no imports of their own
    done, twice, errors = context.Value("l", 0), context.Value("l", 0), context.SimpleQueue()
    arguments = (folder, holds, partitions, done, twice, errors)
    workers = [context.Process(target=_take_turns, args=arguments) for _ in range(processes)]
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
        print(f"{found.count(text)} x {text}", flush=True)
    return {"holds": min(done.value, holds), "two_inside": twice.value, "errors": len(found)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--holds", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--partitions", action="store_true", help="hold partitions, not the whole folder")
    chosen = parser.parse_args()
    partitions = PARTITIONS if chosen.partitions else (WHOLE,)
    notes = Path("build/lock-partitions.json" if chosen.partitions else "build/lock.json")
    notes.parent.mkdir(exist_ok=True)
    sums = {"processes": chosen.processes, "holds": 0, "two_inside": 0, "errors": 0, "seconds": 0.0}
    if notes.exists():
        before = json.loads(notes.read_text())
        if before["processes"] == chosen.processes and before["holds"] < chosen.holds:
            sums = before
    while sums["holds"] < chosen.holds:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            part = min(PART_HOLDS, chosen.holds - sums["holds"])
            found = hold_many(Path(folder) / "out", processes=chosen.processes, holds=part, partitions=partitions)
        sums |= {key: sums[key] + value for key, value in found.items()}
        sums["seconds"] = round(sums["seconds"] + time.monotonic() - start, 1)
        notes.write_text(json.dumps(sums, indent=1) + "\n")
        print(sums, flush=True)


if __name__ == "__main__":
    main()
