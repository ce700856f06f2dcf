"""On what something was measured, and a table of it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def machine() -> dict[str, Any]:
    """This one, today."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),  # of the last minute: what else is running
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {
            "card": card.name,
            "card_gib": round(card.total_memory / 2**30),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return lines[0].partition(":")[2].strip() if lines else "unknown"


def show(console: Console, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One table: a column per key."""
    if not rows:
        console.print(f"{title}: nothing was measured")
        return
    table = Table(title=title, title_justify="left")
    for column, value in rows[0].items():
        table.add_column(column.replace("_", " "), justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
