"""A benchmark becomes Parquet once: from there the job reads it like any source, and so do the measures.

evaluate/items/items-00000.parquet ...    written first
evaluate/items.json                       then this: from now on the set is fixed
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.showing import describe
from pipeline.errors import SinkError, SourceError
from pipeline.evaluation.benchmarks import drawn, gedit_bench, imgedit_bench, pie_bench
from pipeline.evaluation.benchmarks.files import Folder
from pipeline.evaluation.config import DrawnWorld, EvaluateConfig, GEditBench, ImgEditBench, OwnSet, PieBench
from pipeline.evaluation.items import SCHEMA, Item
from pipeline.reading.storage import FileSystem, open_fs
from pipeline.settings.sections import SourceConfig
from pipeline.writing.files import from_json, get, put

FOLDER = "evaluate"
RECORD = f"{FOLDER}/items.json"
ROWS_PER_FILE = 64  # of pictures; what is measured, and lost by a kill, together


def items_of(config: EvaluateConfig) -> Iterator[Item]:
    """The items of a benchmark or of the drawn world.

    Raises:
        SourceError: it is not there, or another version.
    """
    chosen = config.set
    if isinstance(chosen, PieBench):
        return pie_bench.items_of(Folder(chosen.folder, chosen.storage_options), chosen.subset)
    if isinstance(chosen, GEditBench):
        return gedit_bench.items_of(_here_or_from_hub(chosen), chosen.languages)
    if isinstance(chosen, ImgEditBench):
        return imgedit_bench.items_of(Folder(chosen.folder, chosen.storage_options), chosen.images)
    assert isinstance(chosen, DrawnWorld), "a set of one's own is read by the job itself"
    return drawn.items_of(chosen.count, chosen.seed, chosen.size)


def _here_or_from_hub(chosen: GEditBench) -> Folder:
    name = chosen.folder
    if "://" in name or os.path.isdir(os.path.expanduser(name)) or name.count("/") != 1 or name.startswith((".", "~")):
        return Folder(name, chosen.storage_options)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.parquet", "*.arrow", "*.json"]
        return Folder(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"set.folder '{name}' is no folder here and could not be fetched from the hub: {describe(error)}. Check "
            "the name, the network, or give a folder"
        ) from error


def write_set(config: EvaluateConfig) -> list[str]:
    """Write the set where it is not written yet; returns its files, relative to the sink's folder.

    Raises:
        SourceError: the set cannot be read, is empty, or has two items of one name.
        SinkError: it cannot be written.
    """
    fs, root = open_fs(config.sink.folder, config.sink.storage_options)
    before = get(fs, f"{root}/{RECORD}")
    if before is not None:
        return _files_in(before, config.set_hash)
    files: list[str] = []
    keys: Counter[str] = Counter()
    held: list[Item] = []

    def flush() -> None:
        path = f"{FOLDER}/items/items-{len(files):05d}.parquet"
        put(fs, f"{root}/{path}", _as_parquet(held))
        files.append(path)
        held.clear()

    for item in items_of(config):
        keys[item.key] += 1
        held.append(item)
        if len(held) == ROWS_PER_FILE:
            flush()
    if held:
        flush()
    if not files:
        raise SourceError(f"the set {config.set.kind} has no items. Check set.folder and what it is narrowed to")
    if twice := [key for key, count in keys.items() if count > 1]:
        raise SourceError(f"the set {config.set.kind} has the item {twice[0]} {keys[twice[0]]} times")
    record = {"set": config.set_hash, "items": keys.total(), "files": files}
    put(fs, f"{root}/{RECORD}", json.dumps(record, indent=1).encode())
    return files


def _files_in(record: bytes, wanted: str) -> list[str]:
    try:
        held = from_json(record)
        files = held["files"]
        ours = re.compile(rf"{FOLDER}/items/items-\d{{5,}}\.parquet")
        if not files or not all(isinstance(path, str) and ours.fullmatch(path) for path in files):
            raise ValueError("a name in it is none of ours")
        if held["set"] != wanted:
            raise SinkError("the folder holds another set. Set another sink.folder")
        return list(files)
    except (ValueError, KeyError, TypeError) as error:
        raise SinkError(f"{RECORD} is damaged: {describe(error)}. Remove it, and start again") from error


def _as_parquet(items: Sequence[Item]) -> bytes:
    buffer = BytesIO()
    table = pa.Table.from_pylist([item.as_row() for item in items], schema=SCHEMA)
    pq.write_table(table, buffer, compression="none", use_dictionary=False, row_group_size=ROWS_PER_FILE)
    return buffer.getvalue()


def read_items(fs: FileSystem, root: str, path: str) -> list[Item]:
    """The items of a file of the set.

    Raises:
        SinkError: it is missing or damaged.
    """
    data = get(fs, f"{root}/{path}")
    if data is None:
        raise SinkError(f"{path} is missing. Remove {RECORD}, and start again")
    rows: list[dict[str, Any]] = pq.read_table(BytesIO(data)).to_pylist()
    return [Item.of_row(row) for row in rows]


def source_of(config: EvaluateConfig, files: Sequence[str]) -> SourceConfig:
    """Where the job reads the set."""
    if isinstance(config.set, OwnSet):
        return config.set.source
    folder = config.sink.folder.rstrip("/")
    return SourceConfig(
        shards=tuple(f"{folder}/{path}" for path in files),
        format="parquet",
        image="image",
        storage_options=config.sink.storage_options,
    )
