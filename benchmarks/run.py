"""All benchmarks: `make bench`. Prints tables of ratios measured in one run, and writes them to build/bench.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import against_diffusers, attention_memory, basis, commit_overhead, many_units, memory, ray_overhead
from benchmarks.machine import machine, show

BUILD = Path("build")


def main() -> None:
    """Measure, print, write."""
    console = Console(width=120)
    results: dict[str, Any] = {"machine": machine()}
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
