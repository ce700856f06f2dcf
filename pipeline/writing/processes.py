"""Which process of which machine holds a lock, and is it alive?"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path


def this_host() -> str:
    """A hash that two processes share exactly where each can see whether the other is alive."""
    parts = [platform.node()]
    if sys.platform == "linux":
        # Containers may share a kernel and a name, yet not their process ids; a reboot gives ids out anew.
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def started_at(pid: int) -> str | None:
    """When a process of this machine was started, in the kernel's ticks; None where it is dead."""
    if sys.platform == "linux":
        try:
            # After the name, which may hold anything and ends at the last ")": the state is field 3, the start 22.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""  # alive; its start is not known here
