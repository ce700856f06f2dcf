"""A folder of edit pairs, in any of the known layouts, as tasks that are read one by one, here or elsewhere.

Parquet and tars are read by the readers of `shardedit edit`, in guarded processes, with their limits; tables that name
files by `tables.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from pipeline.common.showing import public_url
from pipeline.errors import SourceError
from pipeline.pairs.layouts import (
    PICTURE_KINDS,
    PairLayout,
    known_layouts,
    layout_of_columns,
    layout_of_members,
    split_of,
    with_what_is_there,
)
from pipeline.pairs.records import Pair
from pipeline.pairs.tables import TableTask, open_tables, pairs_of_table
from pipeline.reading.listing import list_source
from pipeline.reading.rows import extension
from pipeline.reading.shards import ReadTask
from pipeline.reading.storage import open_fs, retrying, source_error, storage_errors
from pipeline.reading.tar import Entry, Stream, TarWalk
from pipeline.reading.units import count_rows, plan_reads, read_units
from pipeline.reading.webdataset import split_name
from pipeline.samples import Sample, Unreadable
from pipeline.settings.sections import SourceConfig

ROWS = 64  # of a task
NONE = "\x7f"  # a column that nobody has
PEEKED = 64  # members of a tar that are looked at to tell its layout


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTask:
    """What is read in one go; all tasks of a shard together are the shard."""

    shard: str
    number: int  # in its shard, from 0
    of: int  # tasks of the shard
    rows: ReadTask | TableTask


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSet:
    """A folder of pairs."""

    url: str
    layout: PairLayout
    source: SourceConfig
    tasks: tuple[PairTask, ...]
    rows: int | None  # None: only a read can tell
    orphans: tuple[str, ...] = ()  # pictures that no row names
    note: str = ""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)


def open_pairs(url: str, given: PairLayout | None = None, storage_options: Mapping[str, Any] | None = None) -> PairSet:
    """Find out what a folder holds.

    Args:
        url: of the folder, or of a file in it.
        given: what its columns are called; None: told from their names.
        storage_options: for the store.

    Raises:
        SourceError: it cannot be read, or no known layout is there.
    """
    options = dict(storage_options or {})
    names = _listed(url, options)
    parquet = [name for name in names if name.endswith(".parquet")]
    tars = [name for name in names if name.endswith((".tar", ".tar.gz", ".tgz"))]
    if parquet:
        columns = _columns(url, parquet[0], options)
        layout = _checked(given, columns, url) or layout_of_columns(columns)
        if layout is not None and _holds_bytes(url, parquet[0], options, layout):
            return _of_shards(url, "parquet", layout, options)
    may_have_tables = parquet or not tars or any(name.endswith((".json", ".jsonl", ".csv")) for name in names)
    tables = open_tables(url, names, given, options) if may_have_tables else None
    if tables is None and tars:  # a JSON beside them may be about the set, as an export's is
        members = _members(url, tars[0], options)
        layout = _checked(given, members, url) or layout_of_members(members)
        if layout is None:
            raise _unknown(url, f"members of its samples: {', '.join(members[:8])}")
        return _of_shards(url, "webdataset", layout, options)
    if tables is None:
        raise _unknown(url, f"{len(names):,} files, such as {', '.join(names[:3])}" if names else "no file")
    tasks = [
        PairTask(shard=table.name, number=number, of=len(chunks), rows=chunk)
        for table, chunks in tables.chunks(ROWS)
        for number, chunk in enumerate(chunks)
    ]
    return PairSet(
        url=url,
        layout=tables.layout,
        source=SourceConfig(shards=(url,)),
        tasks=tuple(tasks),
        rows=tables.rows,
        orphans=tables.orphans,
        storage_options=options,
    )


def _of_shards(url: str, kind: str, layout: PairLayout, options: Mapping[str, Any]) -> PairSet:
    source = SourceConfig.model_validate(
        {
            "shards": [url],
            "format": kind,
            "image": layout.source,
            "mask": layout.mask or None,
            "caption": layout.prompt or NONE,
            "edit": NONE,
            "storage_options": dict(options),
        }
    )
    listed = list_source(source)
    reads = plan_reads(listed.shards, ROWS, lambda _: False, lambda _: False)
    by_shard: dict[str, list[ReadTask]] = {}
    for read in reads:
        by_shard.setdefault(read.shard.path, []).append(read)
    tasks = [
        PairTask(shard=shard, number=number, of=len(some), rows=read)
        for shard, some in by_shard.items()
        for number, read in enumerate(some)
    ]
    known = [shard.rows for shard in listed.shards]
    rows = sum(one or 0 for one in known) if all(one is not None for one in known) else None
    return PairSet(
        url=url,
        layout=layout,
        source=source,
        tasks=tuple(tasks),
        rows=rows,
        note=listed.note(),
        storage_options=dict(options),
    )


def count_pairs(pairs: PairSet) -> int:
    """How many rows a set has; of tars the headers are read."""
    if pairs.rows is not None:
        return pairs.rows
    return sum(count_rows(task.rows.shard, pairs.source) for task in pairs.tasks if isinstance(task.rows, ReadTask))


def pairs_of(pairs: PairSet, task: PairTask) -> Iterator[Pair]:
    """The pairs of a task, in the order of its rows.

    Raises:
        SourceError: the store fails.
    """
    if isinstance(task.rows, TableTask):
        yield from pairs_of_table(pairs.url, pairs.layout, task.rows, pairs.storage_options)
        return
    for unit in read_units(task.rows, pairs.source, ROWS, lambda _: False):
        for row in unit.rows:
            yield from _pairs(row, pairs.layout)


def _pairs(row: Sample | Unreadable, layout: PairLayout) -> Iterator[Pair]:
    sample, problem = (row.sample, row.message) if isinstance(row, Unreadable) else (row, "")
    source = sample.image if sample.image or not problem else _member(sample, layout.source)
    turn = sample.columns.get(layout.turn)
    common: dict[str, Any] = {
        "id": _id(sample, layout),
        "shard": sample.shard,
        "index": sample.index,
        "split": split_of(sample.shard),
        "source": source,
        "mask": sample.mask if sample.mask is not None or not layout.mask else _member(sample, layout.mask),
        "wants_mask": bool(layout.mask),
        "prompt": _prompt(sample, layout),
        "source_prompt": _text(sample, layout.source_prompt),
        "target_prompt": _text(sample, layout.target_prompt),
        "turn": turn if isinstance(turn, int) else None,
        "problem": problem,
    }
    paths = (sample.image_path if layout.source == sample.image_name else "", "")
    yield Pair(edited=_member(sample, layout.edited), paths=paths, **common)
    if layout.rejected:
        yield Pair(edited=_member(sample, layout.rejected), part="rejected", paths=paths, **common)


def _id(sample: Sample, layout: PairLayout) -> str:
    value = sample.columns.get(layout.id) if layout.id else None
    return sample.key if value is None else str(value)


def _member(sample: Sample, name: str) -> bytes | None:
    """A picture by the name of its column, or of its member whatever kind of picture that is."""
    if name in sample.members:
        return sample.members[name]
    stem, dot, kind = name.rpartition(".")
    if dot and kind in PICTURE_KINDS:
        for other in PICTURE_KINDS:
            if f"{stem}.{other}" in sample.members:
                return sample.members[f"{stem}.{other}"]
    return None


def _prompt(sample: Sample, layout: PairLayout) -> str | None:
    if sample.caption:
        return sample.caption
    return _text(sample, layout.prompt) if layout.prompt else _text(sample, "instruction")


def _text(sample: Sample, name: str) -> str | None:
    value = sample.columns.get(name)
    return value if isinstance(value, str) else None


def _listed(url: str, options: Mapping[str, Any]) -> list[str]:
    fs, root = open_fs(url, options)
    try:
        info = retrying()(fs.info, root)
        found = [root] if info["type"] == "file" else sorted(retrying()(fs.find, root))
    except Exception as error:
        raise source_error(error, url) from error
    base = root.rpartition("/")[0] if found == [root] else root
    names = [path.removeprefix(base).lstrip("/") for path in found]
    return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def _open(url: str, name: str, options: Mapping[str, Any]) -> Any:
    fs, root = open_fs(url, options)
    return fs.open(root if root.endswith(f"/{name}") or root == name else f"{root}/{name}", "rb")


def _columns(url: str, name: str, options: Mapping[str, Any]) -> list[str]:
    with storage_errors(url), _open(url, name, options) as file:
        try:
            return list(pq.read_schema(file).names)
        except Exception as error:
            raise SourceError(f"{public_url(url)}/{name} is no Parquet file, or it is cut: {error}") from error


def _holds_bytes(url: str, name: str, options: Mapping[str, Any], layout: PairLayout) -> bool:
    """Whether the pictures are in the file, not named by it."""
    with storage_errors(url), _open(url, name, options) as file:
        kind = pq.read_schema(file).field(layout.source).type
    return "binary" in str(kind)


def _members(url: str, name: str, options: Mapping[str, Any]) -> list[str]:
    """Extensions of the first members of a tar."""
    found: list[str] = []
    with storage_errors(url), _open(url, name, options) as file:
        walk = TarWalk(Stream(file, None, packed=name.endswith("gz")))
        for item in walk:
            split = split_name(item.name) if isinstance(item, Entry) and not item.oddity else None
            if split is not None and split[1] not in found:
                found.append(extension(split[1]))
            if len(found) >= PEEKED:
                break
    return found


def _checked(given: PairLayout | None, names: Sequence[str], url: str) -> PairLayout | None:
    if given is None:
        return None
    if gone := [name for name in given.roles.values() if name not in names]:
        raise SourceError(
            f"{public_url(url)} has no column or member {', '.join(gone)}, which --columns names; it has: "
            f"{', '.join(names[:20])}"
        )
    return with_what_is_there(given, names)


def _unknown(url: str, what: str) -> SourceError:
    known = "; ".join(f"{name} by {columns}" for name, columns in known_layouts().items())
    return SourceError(
        f"{public_url(url)} has no layout of edit pairs that is known ({what}). Known: {known}. Say what is what with "
        "--columns source=...,edited=...,prompt=..."
    )
