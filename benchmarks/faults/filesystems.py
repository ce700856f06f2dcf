"""Real file systems that are too small: a tmpfs for one run, in a mount namespace of its own, gone with its processes.

This needs to be root, in a container with rights to mount; where it is not, these kinds are left out and said to be.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.faults.stage import Stage

CLONE_NEWNS = 0x00020000  # linux/sched.h
ENOUGH = "size=16m,nr_inodes=4096"


def possible() -> bool:
    """Whether this machine lets us."""
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


def _own_mounts() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "no mount namespace")
    _mount("--make-rprivate", "/")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextmanager
def small(stage: Stage, what: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """The run's folder on a tmpfs of so many `kib` or `inodes`; what is yielded makes it large enough."""
    assert stage.store.root is not None
    folder = stage.store.root / Path(stage.folder).name
    folder.mkdir()
    _own_mounts()
    limits = f"size={what['kib']}k" if "kib" in what else f"size=16m,nr_inodes={what['inodes']}"
    _mount("-t", "tmpfs", "-o", limits, "tmpfs", str(folder))
    try:
        yield lambda: _mount("-o", f"remount,{ENOUGH}", str(folder))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
