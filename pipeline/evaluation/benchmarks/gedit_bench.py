"""GEdit-Bench (Liu et al., Step1X-Edit, arXiv 2504.17761): 606 instructions per language in eleven groups.

The hub keeps it as Arrow; mirrors keep Parquet. Read are a folder with `*.parquet`, `data-*.arrow` as
`datasets.save_to_disk` writes them, or bare `*.arrow`, and a hub id, which is downloaded.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.showing import describe, public_url
from pipeline.errors import SourceError
from pipeline.evaluation.benchmarks.files import Folder, is_plain_name
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
LANGUAGES = ("en", "cn")
COLUMNS = ("key", "task_type", "instruction", "instruction_language")


def items_of(folder: Folder, languages: Sequence[str] = ("en", "cn")) -> Iterator[Item]:
    """The items of some languages, in the order of the data.

    Raises:
        SourceError: the folder holds no GEdit-Bench.
    """
    wanted = {ALIASES.get(language, language) for language in languages}
    seen: Counter[str] = Counter()
    for row in _rows(folder):
        item = _item(row)
        seen[item.key] += 1
        if seen[item.key] > 1:
            text = f"duplicate_key: the key {item.key} stands here for the {seen[item.key]}. time; the first one counts"
            item = replace(item, key=f"{item.key}#{seen[item.key]}", problem=text)
        # A row of a language that the benchmark does not have is nobody's choice: it is counted.
        if item.language in wanted or item.language not in LANGUAGES:
            yield item
    if not seen:
        raise SourceError(f"{public_url(folder.url)} holds no rows. Give the folder of GEdit-Bench")


def _item(row: Mapping[str, Any]) -> Item:
    key, kind, instruction, language = (_text(row[name]) for name in COLUMNS)
    language = ALIASES.get(language, language)
    picture = next(row[name] for name in IMAGES if name in row)
    image = picture.get("bytes") if isinstance(picture, Mapping) else picture
    flag = row.get("Intersection_exist", row.get("intersection_exist"))
    return Item(
        key=f"{language}-{key}",
        image=image if isinstance(image, bytes) else None,
        request=EditRequest(instruction=instruction, target_prompt=instruction),
        edit_type=kind,
        language=language,
        facts={"key": key, "intersection": None if flag is None else str(flag).lower() in ("true", "1")},
        problem=_problem(key, kind, instruction, language, image),
    )


def _problem(key: str, kind: str, instruction: str, language: str, image: Any) -> str:
    """What keeps a row from being edited and judged, or ""."""
    if not is_plain_name(key):
        return f"bad_key: the key '{key[:100]}' cannot be the name of a file"
    if kind not in GROUPS:
        return f"unknown_type: task_type '{kind[:100]}' is none of the eleven groups"
    if language not in LANGUAGES:
        return f"unknown_language: instruction_language '{language[:100]}' is neither en nor cn"
    if not instruction.strip():
        return "no_instruction: the row has none"
    return "" if isinstance(image, bytes) and image else "missing_image: the row holds no picture"


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _rows(folder: Folder) -> Iterator[dict[str, Any]]:
    parquet = folder.find(".parquet")
    # `datasets` keeps what it has computed beside the data, under such names.
    paths = parquet or [path for path in folder.find(".arrow") if not posixpath.basename(path).startswith("cache-")]
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
                    yield from batch.select(kept).to_pylist()
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
