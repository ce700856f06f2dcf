"""The peak memory of this process."""

from __future__ import annotations

from pathlib import Path


def peak_mib() -> float:
    """Highest resident set since this program began, MiB (Linux).

    Not `getrusage`: its figure is inherited, so a child of a large process would report its parent's.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no line VmHWM. This needs Linux")
