"""Tables whose rows name files: ImgEdit's and pico-banana's, folders of InstructPix2Pix; the files loose or in tars."""

from __future__ import annotations

import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.parquet as pq

from pipeline.common.showing import public_url
from pipeline.errors import SourceError
from pipeline.pairs.layouts import COLUMNS, PATHS, PICTURE_KINDS, PairLayout, layout_of_columns, split_of
from pipeline.pairs.records import Pair
from pipeline.reading.storage import open_fs, retrying, storage_errors
from pipeline.reading.tar import Entry, Stream, TarWalk

MOST_BYTES = 256 << 20  # of a picture
MOST_TABLE = 1 << 30  # of a table that is read whole
FILE_NAME = "_file_name"  # ends the columns of `datasets`' folders of images
ORIGINAL = PairLayout(name="ip2p_original", source="0", edited="1", prompt="edit")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a picture's bytes are."""

    path: str  # of the file, relative to the folder
    offset: int = 0
    size: int = -1  # -1: to the end


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRow:
    """A row with the files that it names."""

    id: str
    index: int
    names: tuple[str, str, str]  # of source, result and mask, as the table has them
    places: tuple[Place | None, Place | None, Place | None]
    texts: tuple[str | None, str | None, str | None]  # prompt, source and target prompt
    elsewhere: str = ""  # files that are not where the table has them, but alone have such a name


@dataclass(frozen=True, slots=True, kw_only=True)
class TableTask:
    """Some rows of a table."""

    name: str
    rows: tuple[NamedRow, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table, whole."""

    name: str
    rows: tuple[NamedRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """All tables of a folder."""

    layout: PairLayout
    tables: tuple[Table, ...]
    orphans: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Of all tables."""
        return sum(len(table.rows) for table in self.tables)

    def chunks(self, size: int) -> Iterator[tuple[Table, list[TableTask]]]:
        """Tables in parts of some rows."""
        for table in self.tables:
            starts = range(0, max(1, len(table.rows)), size)
            yield table, [TableTask(name=table.name, rows=table.rows[at : at + size]) for at in starts]


def open_tables(url: str, names: Sequence[str], given: PairLayout | None, options: Mapping[str, Any]) -> Tables | None:
    """The tables among a folder's files; None where there are none.

    Raises:
        SourceError: a table cannot be read, or lacks the columns of the first one.
    """
    fs, root = open_fs(url, options)
    files = _Files(fs, root, names)
    tables, layout = [], None
    with storage_errors(url):
        if any(posixpath.basename(name) == "prompt.json" for name in names):
            layout, tables = ORIGINAL, list(_folders_of_original(fs, root, names, files))
        for name in names if not tables else []:
            rows = _rows_of(fs, root, name)
            if not rows:
                continue
            columns = {column for row in rows[:100] for column in row}
            found = (
                given
                or layout_of_columns(columns, PATHS)
                or layout_of_columns(columns, COLUMNS)
                or _with_file_names(columns)
            )
            if found is None or not {found.source, found.edited} <= columns:
                continue
            layout = layout or found
            tables.append(Table(name, tuple(_named(at, row, found, files) for at, row in enumerate(rows))))
    if layout is None or not tables:
        return None
    return Tables(layout=layout, tables=tuple(tables), orphans=files.orphans())


def pairs_of_table(url: str, layout: PairLayout, task: TableTask, options: Mapping[str, Any]) -> Iterator[Pair]:
    """Rows with their files' bytes."""
    fs, root = open_fs(url, options)
    for row in task.rows:
        source, edited, mask = (_bytes(fs, root, place) for place in row.places)
        yield Pair(
            id=row.id,
            shard=task.name,
            index=row.index,
            split=split_of(task.name) or split_of(row.names[0]),
            source=source,
            edited=edited,
            mask=mask,
            wants_mask=bool(layout.mask),
            prompt=row.texts[0],
            source_prompt=row.texts[1],
            target_prompt=row.texts[2],
            paths=(row.names[0], row.names[1]),
            elsewhere=row.elsewhere,
        )


class _Files:
    """Pictures of a folder, loose and in tars, and which of them a row named."""

    def __init__(self, fs: Any, root: str, names: Sequence[str]) -> None:
        self._places: dict[str, Place] = {}
        for name in names:
            if name.endswith(".tar"):
                self._places |= dict(_members(fs, root, name))
            elif name.rpartition(".")[2].lower() in (*PICTURE_KINDS, "jpeg"):
                self._places[name] = Place(name)
        self._by_name = defaultdict(list)
        for path in self._places:
            self._by_name[posixpath.basename(path)].append(path)
        self._used: set[str] = set()

    def find(self, name: str) -> Place | None:
        """By its path. None for "" too."""
        path = posixpath.normpath(name).lstrip("/") if name else ""
        if path not in self._places:
            return None
        self._used.add(path)
        return self._places[path]

    def find_alike(self, name: str) -> Place | None:
        """By its file name, where one file alone has that."""
        alike = self._by_name.get(posixpath.basename(name), []) if name else []
        return self.find(alike[0]) if len(alike) == 1 else None

    def orphans(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._places) - self._used))


def _members(fs: Any, root: str, name: str) -> Iterator[tuple[str, Place]]:
    path = f"{root}/{name}"
    with fs.open(path, "rb") as file:
        stream = Stream(file, int(fs.info(path)["size"]), packed=False)
        for item in TarWalk(stream):
            if isinstance(item, Entry) and not item.oddity:
                yield item.name.removeprefix("./"), Place(name, stream.offset, item.size)


def _bytes(fs: Any, root: str, place: Place | None) -> bytes | None:
    if place is None:
        return None
    size = MOST_BYTES if place.size < 0 else min(place.size, MOST_BYTES)
    for attempt in retrying():
        with attempt, fs.open(f"{root}/{place.path}", "rb") as file:
            file.seek(place.offset)
            data: bytes = file.read(size)
    return data


def _rows_of(fs: Any, root: str, name: str) -> list[dict[str, Any]]:
    """Rows of a table; none where a file is no table."""
    if not name.endswith((".parquet", ".jsonl", ".json")):
        return []
    path = f"{root}/{name}"
    if int(fs.info(path)["size"]) > MOST_TABLE:
        raise SourceError(f"{public_url(path)} is larger than {MOST_TABLE} bytes. Split the table")
    with fs.open(path, "rb") as file:
        if name.endswith(".parquet"):
            return list(_turned(pq.read_table(file).to_pylist()))
        text = file.read().decode("utf-8-sig", "replace")
    try:
        if name.endswith(".jsonl"):
            data = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            data = json.loads(text)
    except ValueError as error:
        raise SourceError(f"{public_url(path)} is no JSON: {error}") from error
    if isinstance(data, dict):
        data = [{"id": key, **value} for key, value in data.items() if isinstance(value, dict)]
    return list(_turned([row for row in data if isinstance(row, dict)])) if isinstance(data, list) else []


def _turned(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows; those of several turns (ImgEdit's `data`) as one row for each."""
    for row in rows:
        turns = row.get("data")
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
            for number, turn in enumerate(turns, 1):
                yield {**{key: value for key, value in row.items() if key != "data"}, **turn, "turn": number}
        else:
            yield row


def _with_file_names(columns: set[str]) -> PairLayout | None:
    """A layout whose picture columns end as `datasets` has it in folders: `input_image_file_name`."""
    stripped = {column.removesuffix(FILE_NAME) for column in columns}
    layout = layout_of_columns(stripped)
    if layout is None:
        return None

    def there(name: str) -> str:
        return f"{name}{FILE_NAME}" if f"{name}{FILE_NAME}" in columns else name

    return replace(layout, source=there(layout.source), edited=there(layout.edited), mask=there(layout.mask))


def _named(index: int, row: dict[str, Any], layout: PairLayout, files: _Files) -> NamedRow:
    source, edited, mask = (
        _name(row.get(column)) if column else "" for column in (layout.source, layout.edited, layout.mask)
    )
    key = next((row[name] for name in (layout.id, "id", "key") if name and row.get(name) is not None), None)
    names = (source, edited, mask)
    there = [files.find(name) for name in names]
    alike = [files.find_alike(name) if place is None else None for name, place in zip(names, there, strict=True)]
    places = [place or other for place, other in zip(there, alike, strict=True)]
    return NamedRow(
        id=f"{index:08d}" if key is None else str(key),
        index=index,
        names=names,
        places=(places[0], places[1], places[2]),
        elsewhere=", ".join(name for name, other in zip(names, alike, strict=True) if other is not None),
        texts=(_said(row, layout.prompt), _said(row, layout.source_prompt), _said(row, layout.target_prompt)),
    )


def _said(row: Mapping[str, Any], column: str) -> str | None:
    value = row.get(column)
    return value if isinstance(value, str) else None


def _name(value: Any) -> str:
    """A file's name: text, the first of a list, or a struct's path."""
    if isinstance(value, list):
        value = value[0] if value else ""
    if isinstance(value, dict):
        value = value.get("path") or value.get("url") or ""
    return value if isinstance(value, str) else ""


def _folders_of_original(fs: Any, root: str, names: Sequence[str], files: _Files) -> Iterator[Table]:
    """InstructPix2Pix's own folders: 0000017/prompt.json, 0000017/1234_0.jpg, 0000017/1234_1.jpg."""
    rows: list[NamedRow] = []
    for name in sorted(name for name in names if posixpath.basename(name) == "prompt.json"):
        folder = posixpath.dirname(name)
        with fs.open(f"{root}/{name}", "rb") as file:
            try:
                prompt = json.loads(file.read(1 << 20).decode("utf-8-sig", "replace"))
            except ValueError:
                prompt = {}
        known = prompt if isinstance(prompt, dict) else {}
        seeds = sorted(
            {
                found.group(1)
                for other in names
                if posixpath.dirname(other) == folder
                and (found := re.match(r"(.+)_[01]\.jpg$", posixpath.basename(other)))
            }
        )
        for seed in seeds or [""]:
            source, edited = f"{folder}/{seed}_0.jpg", f"{folder}/{seed}_1.jpg"
            rows.append(
                NamedRow(
                    id=f"{folder}/{seed}",
                    index=len(rows),
                    names=(source, edited, ""),
                    places=(files.find(source), files.find(edited), None),
                    texts=(_said(known, "edit"), _said(known, "input"), _said(known, "output")),
                )
            )
    yield Table("", tuple(rows))
