"""Cut shards into units, plan who reads what, and read units one by one, front to back.

A tar has no index: one task reads it whole and passes over what is committed. Parquet is cut at row groups: one task
reads the units that begin in a row group, since a group can only be decoded from its start. A folder is cut by files.

A unit of large rows ends early, at `Shard.unit_bytes`: in a tar or a folder with the row that reaches it; in Parquet,
where a row's size is unknown until it is read, by the average in the footer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any, BinaryIO

from pipeline.common.showing import public_url
from pipeline.errors import SourceError
from pipeline.reading import folder, parquet, sets, webdataset
from pipeline.reading.listing import list_shards
from pipeline.reading.rows import damaged_row
from pipeline.reading.shards import Cuts, ReadTask, Shard, shard_slug, unit_id, unit_of
from pipeline.reading.storage import open_fs, retrying, storage_errors
from pipeline.recipe import SourceConfig
from pipeline.samples import ReadRow, Sample, UnitInput

BUFFER = 4 << 20  # bytes fetched from an object store at a time
COUNT_BUFFER = 256 << 10  # the same while only headers are read
MOST_OF_A_UNIT = 4  # times `unit_bytes` that a unit of Parquet may hold: rows vary

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
            says that it is the last. Asked where the number of units is not known otherwise.
    """
    tasks: list[ReadTask] = []
    for shard in shards:
        if shard.rows is None:
            if not last_unit_known_committed(shard.path):
                tasks.append(ReadTask(shard=shard, start=0, stop=None))
            continue
        if shard.format == "folder":
            tasks += _folder_tasks(shard, unit_size, is_committed)
        else:
            rows = shard.unit_rows(unit_size)
            chunks = [chunk for chunk in range(_chunks(shard, rows)) if not is_committed(unit_id(shard.path, chunk))]
            tasks += _parquet_tasks(shard, rows, chunks)
    return tasks


def read_units(
    task: ReadTask, source: SourceConfig, unit_size: int, is_committed: Callable[[str], bool]
) -> Iterator[UnitInput]:
    """Read a task's units in order, without those that are committed. Lazy: one unit is held, and one row ahead.

    A stream that breaks is opened again, up to five times per unit; units handed out before are skipped.

    Raises:
        SourceError: the shard vanished, changed since it was listed, or cannot be read after all attempts.
    """
    shard = task.shard
    done = _chunks_of(task, unit_size, Cuts(unit_size, 1))(task.start)  # chunks before this one were handed out

    @cache
    def is_skipped(chunk: int) -> bool:
        return is_committed(unit_id(shard.path, chunk))

    def begin() -> Iterator[UnitInput]:
        first = done
        cuts = Cuts(unit_size, shard.unit_bytes)
        chunk_of = _chunks_of(task, unit_size, cuts)

        def is_passed_over(chunk: int) -> bool:
            return chunk < first or is_skipped(chunk)

        rows = _rows(task, source, lambda index: not is_passed_over(chunk_of(index)), cuts)
        return _cut(rows, task, chunk_of, is_passed_over)

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
        del unit  # not held while the next one is read


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
                count = sum(1 for _ in _rows(task, source, lambda _: False, Cuts(1, 1), COUNT_BUFFER))
    return count


def _chunks(shard: Shard, unit_size: int) -> int:
    return max(1, -(-(shard.rows or 0) // unit_size))  # an empty shard has one empty unit, so that it can be committed


def _chunks_of(task: ReadTask, unit_size: int, cuts: Cuts) -> Callable[[int], int]:
    """Which chunk a row belongs to, by its index. For a tar and for sets the `cuts` know, as they are read."""
    if task.shard.format in ("webdataset", "sets"):
        return cuts.chunk_of
    if task.shard.format == "folder":
        return lambda index: task.chunk + (index - task.start) // unit_size
    rows = task.shard.unit_rows(unit_size)
    return lambda index: index // rows


def _folder_tasks(shard: Shard, unit_size: int, is_committed: Callable[[str], bool]) -> Iterator[ReadTask]:
    # Every task carries its own files only: a folder may hold millions.
    bare = replace(shard, files=())
    cuts = Cuts(unit_size, shard.unit_bytes)
    for row in shard.files:
        cuts.add(row.size)
    for chunk, (start, stop) in enumerate(pairwise(dict.fromkeys((*cuts.starts, cuts.rows)))):
        if not is_committed(unit_id(shard.path, chunk)):
            yield ReadTask(shard=bare, start=start, stop=stop, chunk=chunk, rows=shard.files[start:stop])


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
    stop = min((run[-1] + 1) * unit_size, shard.rows or 0)
    return ReadTask(shard=shard, start=run[0] * unit_size, stop=stop, chunk=run[0])


def _rows(
    task: ReadTask, source: SourceConfig, wants: Callable[[int], bool], cuts: Cuts, buffer: int = BUFFER
) -> Iterator[ReadRow | None]:
    """Every row of a task in order; None for a row whose index nobody wants. Adds a tar's or sets' rows to `cuts`."""
    shard = task.shard
    if shard.format == "folder":
        yield from folder.read_rows(task, source, wants)
    elif shard.format == "parquet":
        # Columns are read side by side, each in pages of its own: some blocks are kept.
        opened = partial(_open, shard, source, block_size=1 << 20, cache_type="blockcache")
        yield from parquet.read_rows(
            opened, shard=shard.path, start=task.start, stop=task.stop, source=source, wants=wants
        )
    elif shard.format == "sets":
        with _open(shard, source, block_size=buffer, cache_type="readahead") as file:
            yield from sets.read_rows(file, shard=shard.path, url=shard.url, source=source, wants=wants, sized=cuts.add)
    else:
        with _open(shard, source, block_size=buffer, cache_type="readahead") as file:
            yield from webdataset.read_rows(
                file,
                shard=shard.path,
                url=public_url(shard.url),
                size=shard.size,
                source=source,
                wants=wants,
                sized=cuts.add,
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
    rows: Iterator[ReadRow | None],
    task: ReadTask,
    chunk_of: Callable[[int], int],
    is_passed_over: Callable[[int], bool],
) -> Iterator[UnitInput]:
    """Units of rows; the last one is known by one row of lookahead."""
    chunk, start = chunk_of(task.start), task.start
    held: list[ReadRow | None] = []
    taken = 0  # bytes
    for index, row in enumerate(rows, task.start):
        if held and chunk_of(index) != chunk:
            if not is_passed_over(chunk):
                yield _unit(task.shard, chunk, start, held, is_last=False)
            chunk, start, held, taken = chunk_of(index), index, [], 0
        kept = _within(task.shard, row, taken)
        taken += kept.nbytes if isinstance(kept, Sample) else 0
        held.append(kept)
    if not is_passed_over(chunk):
        is_last = task.stop is None or task.stop == (task.shard.rows or 0)
        yield _unit(task.shard, chunk, start, held, is_last=is_last)


def _within(shard: Shard, row: ReadRow | None, taken: int) -> ReadRow | None:
    """The row; or, where its unit already holds far more bytes than the footer announces, an error in its place."""
    most = MOST_OF_A_UNIT * shard.unit_bytes
    if shard.format != "parquet" or not isinstance(row, Sample) or taken < most:
        return row
    name = row.id.removeprefix(f"{shard.path}/")
    return damaged_row(
        shard.path,
        row.key,
        name,
        row.index,
        f"the rows before it in its unit hold more than {most} bytes; the file's footer announces {shard.row_bytes} "
        "for a row. Set a smaller run.unit_size, or write the file anew",
    )


def _unit(shard: Shard, chunk: int, start: int, rows: list[ReadRow | None], *, is_last: bool) -> UnitInput:
    return UnitInput(
        unit=unit_of(shard, chunk, start, len(rows), is_last=is_last),
        shard_size=shard.size,
        shard_etag=shard.etag,
        rows=tuple(row for row in rows if row is not None),
    )
