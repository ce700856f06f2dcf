"""What killed runs leave behind is removed at the start of the next one, by the one driver of a folder.

Data files of a unit without a manifest are not looked for: every reader goes by the manifests, and the unit, which is
done again, overwrites or removes them (writing/commit.py).
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import time
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.attempts import FOLDER as ATTEMPTS
from pipeline.writing.attempts import forget_stops
from pipeline.writing.commit import Committed
from pipeline.writing.files import is_temporary, list_folder, remove

# No put takes as long: a younger temporary file may be one that a worker is about to rename. The process id in its name
# proves nothing, since that worker may be on another machine, of a driver that has died.
OLD_S = 24 * 3600.0


def clean(sink: SinkConfig, committed: Committed) -> None:
    """Remove temporary files older than a day, and the attempts of committed units.

    Raises:
        SinkError: the folder cannot be listed, or something cannot be removed.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    if isinstance(fs, LocalFileSystem):  # other stores have none: they put whole objects
        before = time.time() - OLD_S
        for temporary in _temporary(root):
            with contextlib.suppress(FileNotFoundError):
                if temporary.stat().st_mtime < before:
                    temporary.unlink()
    for path in list_folder(fs, f"{root}/{ATTEMPTS}"):
        unit = posixpath.basename(path).removesuffix(".json")
        # Named like a unit's, or it is none of ours.
        if unit.rpartition("-")[2].isdigit() and committed.has(unit):
            remove(fs, path)
    forget_stops(sink)


def _temporary(root: str) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        for name in names:
            if is_temporary(name):
                yield Path(folder, name)
