"""All benchmarks: `make bench`. Prints tables of ratios measured in one run, and writes them to build/bench.json."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import against_diffusers, attention_memory, basis, commit_overhead, many_units, memory, ray_overhead

BUILD = Path("build")


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """One table."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "case" else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    console = Console(width=120)
    results: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    parts = {
        "against_diffusers": ("Engine against diffusers' LEDITS++ (ratio above 1: faster)", against_diffusers.measure),
        "ray_overhead": ("Ray job against a plain loop (ratio 1.1: 10 % slower)", ray_overhead.measure),
        "memory": ("Peak memory of a worker by length of run", memory.measure),
        "basis": ("Latent bases in one job against one image at a time (ratio above 1: faster)", basis.measure),
        "attention_memory": ("Attention control: memory of an image of 512 x 512", attention_memory.measure),
        "commit_overhead": ("What exactly once costs per unit", commit_overhead.measure),
        "many_units": ("Bookkeeping of many units (seconds, MiB)", many_units.measure),
    }
    for name, (title, measure) in parts.items():
        found = measure()
        results[name] = found
        show(console, title, found if isinstance(found, list) else [found])
        BUILD.mkdir(exist_ok=True)
        (BUILD / "bench.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {BUILD / 'bench.json'}")


if __name__ == "__main__":
    main()
