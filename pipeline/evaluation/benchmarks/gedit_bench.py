"""GEdit-Bench (Liu et al., Step1X-Edit, arXiv 2504.17761): 606 instructions per language in eleven groups.

The hub keeps it as Arrow; mirrors keep Parquet. Read are a folder with `*.parquet`, `data-*.arrow` as
`datasets.save_to_disk` writes them, or bare `*.arrow`, and a hub id, which is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.showing import describe, public_url
from pipeline.errors import SourceError
from pipeline.evaluation.benchmarks.files import Folder
from pipeline.evaluation.items import Item
from pipeline.records import EditRequest

GROUPS = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)
ALIASES = {"zh": "cn"}  # of languages: the official statistics say zh, the data cn
IMAGES = ("input_image", "source_image")  # mirrors rename it
COLUMNS = ("task_type", "key", "instruction", "instruction_language")


def items_of(folder: Folder, languages: Sequence[str] = ("en", "cn")) -> Iterator[Item]:
    """The items of some languages, in the order of the data.

    Raises:
        SourceError: the folder holds no GEdit-Bench.
    """
    wanted = {ALIASES.get(language, language) for language in languages}
    seen: set[str] = set()
    for path, row in _rows(folder):
        item = _item(row)
        if item.key in seen:
            raise SourceError(f"{public_url(folder.url)}/{path} has the key {item.key} a second time")
        seen.add(item.key)
        if item.language in wanted:
            yield item
    if not seen:
        raise SourceError(f"{public_url(folder.url)} holds no rows. Give the folder of GEdit-Bench")


def _item(row: Mapping[str, Any]) -> Item:
    language = ALIASES.get(row["instruction_language"], row["instruction_language"])
    picture = next(row[name] for name in IMAGES if name in row)
    image = picture.get("bytes") if isinstance(picture, Mapping) else picture
    problem = "" if image else "missing_image: the row holds no picture"
    if row["task_type"] not in GROUPS:
        problem = f"unknown_type: task_type '{row['task_type']}' is none of the eleven groups"
    flag = row.get("Intersection_exist", row.get("intersection_exist"))
    return Item(
        key=f"{language}-{row['key']}",
        image=image,
        request=EditRequest(instruction=row["instruction"], target_prompt=row["instruction"]),
        edit_type=row["task_type"],
        language=language,
        facts={"key": row["key"], "intersection": None if flag is None else str(flag).lower() in ("true", "1")},
        problem=problem,
    )


def _rows(folder: Folder) -> Iterator[tuple[str, dict[str, Any]]]:
    parquet = folder.find(".parquet")
    paths = parquet or folder.find(".arrow")
    if not paths:
        raise SourceError(f"{public_url(folder.url)} has neither *.parquet nor *.arrow. Give the folder of GEdit-Bench")
    for path in paths:
        try:
            with folder.fs.open(f"{folder.root}/{path}", "rb") as file:
                for batch in _batches(file, is_parquet=bool(parquet)):
                    names = set(batch.schema.names)
                    if not names.issuperset(COLUMNS) or not names & set(IMAGES):
                        raise SourceError(
                            f"{public_url(folder.url)}/{path} is no GEdit-Bench: it has {', '.join(sorted(names))}, "
                            f"needed are {', '.join(COLUMNS)} and {' or '.join(IMAGES)}"
                        )
                    kept = [name for name in batch.schema.names if name != "input_image_raw"]  # which nobody is shown
                    yield from ((path, row) for row in batch.select(kept).to_pylist())
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{public_url(folder.url)}/{path} cannot be read: {describe(error)}") from error


def _batches(file: Any, *, is_parquet: bool) -> Iterator[pa.RecordBatch]:
    if is_parquet:
        yield from pq.ParquetFile(file).iter_batches(batch_size=16)
        return
    try:
        yield from pa.ipc.open_stream(file)
    except pa.ArrowInvalid:  # the other form, which begins with a mark
        file.seek(0)
        opened = pa.ipc.open_file(file)
        yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
