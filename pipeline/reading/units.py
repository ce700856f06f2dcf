"""Cut shards into units, plan who reads what, and read units one by one, front to back.

A tar has no index: one task reads it whole and passes over what is committed. Parquet is cut at row groups: one task
reads the units that begin in a row group, since a group can only be decoded from its start. A folder is cut by files.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate
from typing import Any, BinaryIO

from pipeline.errors import SourceError
from pipeline.reading import folder, parquet, webdataset
from pipeline.reading.listing import list_shards
from pipeline.reading.shards import ReadTask, Shard, shard_slug, unit_id, unit_of
from pipeline.reading.storage import open_fs, retrying, storage_errors
from pipeline.recipe import SourceConfig
from pipeline.records import Sample, UnitInput, Unreadable
from pipeline.showing import public_url

Row = Sample | Unreadable
BUFFER = 4 << 20  # bytes fetched from an object store at a time
COUNT_BUFFER = 256 << 10  # the same while only headers are read

__all__ = ["ReadTask", "Shard", "count_rows", "list_shards", "plan_reads", "read_units", "shard_slug", "unit_id"]


def plan_reads(
    shards: Iterable[Shard],
    unit_size: int,
    is_committed: Callable[[str], bool],
    last_unit_known_committed: Callable[[str], bool],
) -> list[ReadTask]:
    """What is left to read.

    Args:
        shards: as `list_shards` returns them.
        unit_size: rows of a unit.
        is_committed: whether a unit, by its id, needs no reading.
        last_unit_known_committed: whether every unit of a shard, by its path, is committed up to the one whose manifest
            says that it is the last. Asked where nothing else tells how many units a shard has.
    """
    tasks: list[ReadTask] = []
    for shard in shards:
        if shard.rows is None:
            if not last_unit_known_committed(shard.path):
                tasks.append(ReadTask(shard=shard, start=0, stop=None))
            continue
        chunks = [chunk for chunk in range(_chunks(shard, unit_size)) if not is_committed(unit_id(shard.path, chunk))]
        if shard.format == "folder":
            tasks += _folder_tasks(shard, unit_size, chunks)
        else:
            tasks += _parquet_tasks(shard, unit_size, chunks)
    return tasks


def read_units(
    task: ReadTask, source: SourceConfig, unit_size: int, is_committed: Callable[[str], bool]
) -> Iterator[UnitInput]:
    """Read a task's units in order, without those that are committed. Lazy: one unit is held, and one row ahead.

    A stream that breaks is opened again, up to five times per unit; what was handed out is passed over then.

    Raises:
        SourceError: the shard vanished, changed since it was listed, or cannot be read after all attempts.
    """
    shard = task.shard
    done = task.start // unit_size  # chunks before this one were handed out

    @cache
    def is_skipped(chunk: int) -> bool:
        return is_committed(unit_id(shard.path, chunk))

    def begin() -> Iterator[UnitInput]:
        first = done
        rows = _rows(task, source, lambda index: index // unit_size >= first and not is_skipped(index // unit_size))
        return _cut(rows, task, unit_size, lambda chunk: chunk < first or is_skipped(chunk))

    reader = begin()
    while True:
        with storage_errors(shard.url):
            for attempt in retrying():
                with attempt:
                    if attempt.retry_state.attempt_number > 1:
                        reader = begin()
                    unit = next(reader, None)
        if unit is None:
            return
        done = unit.unit.chunk + 1
        yield unit


def count_rows(shard: Shard, source: SourceConfig) -> int:
    """How many rows a shard has, unreadable ones included. Of a tar only the headers are read.

    Raises:
        SourceError: the shard cannot be read.
    """
    if shard.rows is not None:
        return shard.rows
    task = ReadTask(shard=shard, start=0, stop=None)
    with storage_errors(shard.url):
        for attempt in retrying():
            with attempt:
                count = sum(1 for _ in _rows(task, source, lambda _: False, COUNT_BUFFER))
    return count


def _chunks(shard: Shard, unit_size: int) -> int:
    return max(1, -(-(shard.rows or 0) // unit_size))  # an empty shard has one empty unit, so that it can be committed


def _folder_tasks(shard: Shard, unit_size: int, chunks: list[int]) -> Iterator[ReadTask]:
    # Every task carries its own files only: a folder may hold millions.
    bare = replace(shard, files=())
    for chunk in chunks:
        rows = shard.files[chunk * unit_size : (chunk + 1) * unit_size]
        start = chunk * unit_size
        yield ReadTask(shard=bare, start=start, stop=start + len(rows), rows=rows)


def _parquet_tasks(shard: Shard, unit_size: int, chunks: list[int]) -> Iterator[ReadTask]:
    """One task for consecutive units that begin in the same row group."""
    ends = list(accumulate(shard.row_groups))
    run: list[int] = []
    for chunk in chunks:
        together = bool(run) and run[-1] == chunk - 1
        if together and bisect_right(ends, run[0] * unit_size) == bisect_right(ends, chunk * unit_size):
            run.append(chunk)
            continue
        if run:
            yield _run_task(shard, unit_size, run)
        run = [chunk]
    if run:
        yield _run_task(shard, unit_size, run)


def _run_task(shard: Shard, unit_size: int, run: list[int]) -> ReadTask:
    return ReadTask(shard=shard, start=run[0] * unit_size, stop=min((run[-1] + 1) * unit_size, shard.rows or 0))


def _rows(
    task: ReadTask, source: SourceConfig, wants: Callable[[int], bool], buffer: int = BUFFER
) -> Iterator[Row | None]:
    """Every row of a task in order; None for a row whose index nobody wants."""
    shard = task.shard
    if shard.format == "folder":
        yield from folder.read_rows(task, source, wants)
    elif shard.format == "parquet":
        # Columns are read side by side, each in pages of its own: some blocks are kept.
        opened = partial(_open, shard, source, block_size=1 << 20, cache_type="blockcache")
        yield from parquet.read_rows(
            opened, shard=shard.path, start=task.start, stop=task.stop, source=source, wants=wants
        )
    else:
        with _open(shard, source, block_size=buffer, cache_type="readahead") as file:
            yield from webdataset.read_rows(
                file, shard=shard.path, url=public_url(shard.url), size=shard.size, source=source, wants=wants
            )


def _open(shard: Shard, source: SourceConfig, **caching: Any) -> BinaryIO:
    fs, path = open_fs(shard.url, source.storage_options)
    file: BinaryIO = fs.open(path, "rb", **caching)
    size = getattr(file, "size", None)
    if isinstance(size, int) and size != shard.size:
        file.close()
        raise SourceError(
            f"{public_url(shard.url)} has {size} bytes, but had {shard.size} when it was listed: it changed during the "
            "run. Start again once nobody writes to the source"
        )
    return file


def _cut(
    rows: Iterator[Row | None], task: ReadTask, unit_size: int, is_skipped: Callable[[int], bool]
) -> Iterator[UnitInput]:
    """Units of rows; the last one is known by one row of lookahead."""
    chunk = task.start // unit_size
    held: list[Row | None] = []
    for row in rows:
        if len(held) == unit_size:
            if not is_skipped(chunk):
                yield _unit(task.shard, chunk, unit_size, held, is_last=False)
            chunk, held = chunk + 1, []
        held.append(row)
    if not is_skipped(chunk):
        is_last = task.stop is None or task.stop == (task.shard.rows or 0)
        yield _unit(task.shard, chunk, unit_size, held, is_last=is_last)


def _unit(shard: Shard, chunk: int, unit_size: int, rows: list[Row | None], *, is_last: bool) -> UnitInput:
    return UnitInput(
        unit=unit_of(shard, chunk, unit_size, len(rows), is_last=is_last),
        shard_size=shard.size,
        shard_etag=shard.etag,
        rows=tuple(row for row in rows if row is not None),
    )
