"""Rows of a folder of image files: sidecars with the same stem bring caption, edit request and mask.

    cats/tom.jpg   cats/tom.txt   cats/tom.json   cats/tom.mask.png

The key is the path without its last extension, or with it where that is not unique (images that share a stem share
sidecars). Retried file by file.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.reading.rows import IMAGE_EXTENSIONS, build_sample, damaged_row, extension, mask_extension, readable
from pipeline.reading.shards import FolderRow, ReadTask
from pipeline.reading.storage import open_fs, retrying
from pipeline.recipe import SourceConfig
from pipeline.samples import ReadRow

GONE = (FileNotFoundError, PermissionError, IsADirectoryError)


def group_files(files: Iterable[str], source: SourceConfig) -> list[FolderRow]:
    """Rows of a folder, sorted by the path of their image; files that belong to none are left out."""
    mask = mask_extension(source)
    caption = extension(source.caption)
    wanted = IMAGE_EXTENSIONS if source.image is None else (extension(source.image),)
    sidecars: dict[tuple[str, str], str] = {}  # (stem, extension) -> path
    images: list[tuple[str, str]] = []  # (stem, path)
    for path in sorted(files):
        if path.rpartition("/")[2].startswith("."):
            continue
        stem, _, suffix = path.rpartition(".")
        mask_stem, *mask_suffix = path.rsplit(".", mask.count(".") + 1)
        if extension(".".join(mask_suffix)) == mask:
            sidecars[mask_stem, mask] = path
        elif extension(suffix) in wanted and stem:
            images.append((stem, path))
        else:
            sidecars[stem, extension(suffix)] = path
    count = Counter(stem for stem, _ in images)
    paths = {path for _, path in images}
    return [
        FolderRow(
            key=readable(stem if count[stem] == 1 and stem not in paths else path),
            image=path,
            caption=sidecars.get((stem, caption), ""),
            edit=sidecars.get((stem, "json"), ""),
            mask=sidecars.get((stem, mask), ""),
        )
        for stem, path in images
    ]


def read_rows(task: ReadTask, source: SourceConfig, wants: Callable[[int], bool]) -> Iterator[ReadRow | None]:
    """Rows of one chunk of a folder, in order; None for a row whose index nobody `wants`.

    Raises:
        OSError: the store failed on every attempt.
    """
    fs, root = open_fs(task.shard.url, source.storage_options)
    rows = task.rows or task.shard.files[task.start : task.stop]
    for index, row in enumerate(rows, task.start):
        yield _read_row(fs, root, row, index, task.shard.path, source) if wants(index) else None


def _read_row(fs: Any, root: str, row: FolderRow, index: int, shard: str, source: SourceConfig) -> ReadRow:
    image = extension(row.image.rpartition(".")[2])
    parts = {image: row.image, extension(source.caption): row.caption, "json": row.edit}
    parts[mask_extension(source)] = row.mask
    members: dict[str, bytes] = {}
    problem = ""
    for part, path in parts.items():
        if not path:
            continue
        try:
            content = _read_file(fs, f"{root}/{path}", source.max_member_bytes + 1)
        except OSError as error:
            if not isinstance(error, GONE) and error.errno != errno.ELOOP:
                raise
            problem = problem or f"file {path} was listed but cannot be read ({type(error).__name__})"
            continue
        if len(content) > source.max_member_bytes:
            problem = problem or f"file {path} has more bytes than source.max_member_bytes ({source.max_member_bytes})"
        else:
            members[part] = content
    if problem and image not in members:
        return damaged_row(shard, row.key, row.key, index, problem)
    # What is the image is known here; a sidecar mask named like one must not be asked again.
    known = source.model_copy(update={"image": image})
    return build_sample(
        members,
        known,
        shard=shard,
        key=row.key,
        name=row.key,
        index=index,
        image_path=readable(row.image),
        problem=problem,
    )


def _read_file(fs: Any, path: str, limit: int) -> bytes:
    for attempt in retrying():
        with attempt, fs.open(path, "rb") as file:
            data: bytes = file.read(limit)
    return data
