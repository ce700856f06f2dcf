"""Named pipes, sockets and devices where a file is expected: to open one may wait for ever."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether something is there, through links, that is neither a file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def special_files(folder: Path) -> list[str]:
    """Names of a folder's own entries that are neither files nor folders; of those in folders below it, none."""
    return sorted(path.name for path in folder.iterdir() if is_special(path)) if folder.is_dir() else []
