"""Processes that tests start, and how they are ended."""

from __future__ import annotations

import contextlib
import subprocess
from typing import Any

import psutil


def end_with_children(process: subprocess.Popen[Any]) -> None:
    """Kill a process and what it started, by their ids."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(30)
