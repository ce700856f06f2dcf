"""Files of this machine, listed with symbolic links followed; fsspec's own listing passes over them.

A link that leads nowhere is listed as a file, with what it should lead to under "leads_nowhere".
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from functools import cache
from typing import Any

from fsspec.utils import glob_translate


def find_local(root: str) -> dict[str, dict[str, Any]]:
    """What stands below a folder but folders, {path: type, size, mtime}, as `fsspec` tells it; links are followed.

    A hidden folder stands for all that is in it.

    Raises:
        OSError: a folder cannot be listed.
    """
    return {path: info for path, info in _walk(root, None) if info["type"] != "directory"}


def glob_local(pattern: str) -> dict[str, dict[str, Any]]:
    """What a pattern picks, files and folders, in the same form. `**` stands for any number of folders.

    Raises:
        OSError: a folder cannot be listed.
    """
    wildcard = re.search(r"[*?\[]", pattern)
    assert wildcard, "a pattern has a wildcard"
    root = pattern[: wildcard.start()].rpartition("/")[0]
    if not os.path.isdir(root or "/"):
        return {}
    matches = re.compile(glob_translate(pattern)).match
    depth = None if "**" in pattern else pattern[len(root) :].rstrip("/").count("/")
    return dict(_walk(root or "/", depth, matches))


def oddity(path: str) -> str:
    """What stands at a path instead of a file or folder that may be read; "" for those.

    Raises:
        OSError: nothing is there, or it may not be looked at.
    """
    found = os.stat(path)
    kind = _kind("", found)
    return "" if kind in ("file", "directory") else kind


@cache
def _kernels_own() -> frozenset[int]:
    """Devices whose files are no data on a disk: some never end, some block, and their folders lead everywhere."""
    devices = {os.stat(path).st_dev for path in ("/proc", "/sys") if os.path.isdir(path)}
    return frozenset(devices - {os.stat("/").st_dev})


def _walk(root: str, depth: int | None, matches: Any = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files and folders at most `depth` levels below `root`. A folder that is inside itself, by a link, is left."""
    pending = [(root.rstrip("/"), depth, frozenset({_identity(os.stat(root))}))]
    while pending:
        folder, left, above = pending.pop()
        with os.scandir(folder or "/") as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}"
                picked = matches is None or matches(path)
                try:
                    found = entry.stat()  # of what a link leads to
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ELOOP):
                        raise
                    # A link to nothing or to itself, or a file that was removed while the folder was listed.
                    if picked and entry.is_symlink():
                        leads_to = os.readlink(path)
                        yield path, {"name": path, "type": "file", "size": 0, "mtime": 0.0, "leads_nowhere": leads_to}
                    continue
                kind = _kind(entry.name, found)
                if picked:
                    yield path, {"name": path, "type": kind, "size": found.st_size, "mtime": found.st_mtime}
                if kind == "directory" and _identity(found) not in above and (left is None or left > 1):
                    pending.append((path, None if left is None else left - 1, above | {_identity(found)}))


def _kind(name: str, found: os.stat_result) -> str:
    if found.st_dev in _kernels_own():
        return "part of /proc or /sys"
    if stat.S_ISDIR(found.st_mode):
        return "hidden folder" if name.startswith(".") else "directory"
    return "file" if stat.S_ISREG(found.st_mode) else "neither file nor folder"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
