"""Names in a run's folder, as its records may give them. A run folder may come from a stranger: none leads elsewhere.

Every path that a manifest, the index or a note holds is checked where the record is parsed, so that no reader has to.
Letters, digits, "_" and "-" alone make up a name: no "..", no root, no backslash, no control character.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, StringConstraints, ValidationError

from pipeline.common.showing import public_url
from pipeline.errors import SinkError
from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig

_NAME = "[A-Za-z0-9_-]{1,200}"
_KIND = "(?:data|rejected|quarantine)"
_CHUNK = "[0-9]{5,8}"  # readers hold a bit per chunk of a shard: 12 MB at the most

UnitId = Annotated[str, StringConstraints(pattern=f"^{_NAME}-{_CHUNK}$")]
"""Shard slug and chunk."""
FilePath = Annotated[str, StringConstraints(pattern=rf"^(?:_parts/{_KIND}/{_NAME}|{_KIND})/{_NAME}\.(?:parquet|tar)$")]
"""A file of rows, relative to the run's folder: a unit's own, or a merged one."""
ContentsPath = Annotated[str, StringConstraints(pattern=rf"^_output/{_KIND}/{_NAME}\.json$")]
"""What a merged file holds."""
MergedPath = Annotated[
    str,
    StringConstraints(
        pattern=rf"^(?:_output/)?{_KIND}/train-[0-9]{{5,}}-of-[0-9]{{5,}}(?:-[0-9a-f]+)*\.(?:parquet|tar|json)$"
    ),
]
"""A merged file, or its contents."""
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Chunk = Annotated[int, Field(ge=0, lt=10**8)]
Generation = Annotated[int, Field(ge=0, lt=10**15)]  # of a driver
Bits = Annotated[str, StringConstraints(pattern="^[0-9a-f]+$", max_length=10**8 // 4)]
"""A bit for each chunk of a shard, in hexadecimal digits."""

_MERGED = re.compile(rf"{_KIND}/train-[0-9]{{5,}}-of-[0-9]{{5,}}(?:-[0-9a-f]+)*\.(?:parquet|tar)")
_MORE = r"(?:-[0-9a-f]+)*"  # what tells commits of one unit apart

JUDGED = "_judged"
"""Folder with a judge's answers, of a run whose gates ask one."""
ANSWERS = "_answers"
"""Folder with the answers of servers that edit, of a run whose methods ask some."""

# Folders of ours that are written to or removed from, and those of them that hold folders of shards or kinds.
FOLDERS = (
    "data",
    "quarantine",
    "rejected",
    "report",
    ANSWERS,
    "_attempts",
    "_baseline",
    JUDGED,
    "_lock",
    "_output",
    "_parts",
    "_shards",
    "_units",
)
_WITH_FOLDERS = ("_output", "_parts", "_parts/data", "_parts/rejected", "_parts/quarantine", "_units")


def is_merged(path: str) -> bool:
    """Whether a path is that of a merged file."""
    return _MERGED.fullmatch(path) is not None


def is_of_unit(path: str, slug: str, chunk: str) -> bool:
    """Whether a file of rows is one that this unit writes: no manifest lists, and so none removes, another's."""
    apart = rf"_parts/{_KIND}/{re.escape(slug)}/{re.escape(chunk)}{_MORE}\.(?:parquet|tar)"
    beside = rf"{_KIND}/part-{re.escape(slug)}-{re.escape(chunk)}{_MORE}\.(?:parquet|tar)"
    return re.fullmatch(f"{apart}|{beside}", path) is not None


def first_problem(error: Exception) -> str:
    """What is wrong with a record that does not parse: the first of it, in a few words."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def refuse_links(sink: SinkConfig) -> None:
    """See that no folder of a run is a symbolic link to outside of it: files are written to, and removed from, these.

    Links to single files need no look: a file is replaced by renaming, and removed by its name, whatever it leads to.

    Raises:
        SinkError: names the link, and where it leads.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    if not isinstance(fs, LocalFileSystem):
        return
    home = os.path.realpath(root)
    for folder in _folders(root):
        if not os.path.islink(folder):  # which is no error for a name that is too long: opening it says so
            continue
        target = os.path.realpath(folder)
        if os.path.commonpath([home, target]) != home:
            raise SinkError(
                f"{public_url(str(folder))} is a link to {target}, outside of the run's folder: nothing there is "
                "touched. Put a folder in the link's place; sink.folder itself may be a link"
            )


def _folders(root: str) -> Iterator[Path]:
    for name in FOLDERS:
        yield Path(root, name)
    for name in _WITH_FOLDERS:
        try:
            with os.scandir(Path(root, name)) as entries:
                yield from (Path(entry) for entry in entries if entry.is_symlink())
        except OSError:  # not there, or not to be read: who needs it says so
            continue
