"""Rows of one unit as one WebDataset tar, in memory. Both `webdataset` and Hugging Face `datasets` read it.

    KEY.edited.png  KEY.mask.png  KEY.mask.0.png ...  KEY.input.jpg  KEY.thumbnail.jpg  KEY.json  KEY.source.<member>

KEY.json holds every column that is no image, as JSON throughout. A mask that a result lacks has no member. The same
rows give the same bytes: owner, mode and time are fixed.
`datasets` takes the members of the first rows for those of all: where rows have different numbers of masks, only
`webdataset` reads the tar, and Parquet is the format to choose.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from webdataset import TarWriter

from pipeline.recipe import SinkConfig
from pipeline.writing.rows import LABELS, OutputRow, as_written, format_of

PICTURES = {"image": "edited", "mask": "mask", "input": "input", "input_thumbnail": "thumbnail"}  # column: member


def render_tar(rows: Sequence[OutputRow], sink: SinkConfig) -> bytes:
    """Write rows as a tar, one sample each, in their order."""
    return render_samples(_sample(row, sink) for row in rows)


def render_samples(samples: Iterable[Mapping[str, Any]]) -> bytes:
    """Write samples, {member: bytes} and their "__key__", as a tar."""
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, user="", group="", mode=0o644, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    return buffer.getvalue()


def json_member(columns: Mapping[str, Any]) -> bytes:
    """Columns as a sample's JSON, in one fixed spelling."""
    return json.dumps(columns, sort_keys=True, ensure_ascii=False, allow_nan=False).encode("utf-8")


def member_of(column: str, sink: SinkConfig) -> str:
    """Name of a picture's member, without its extension."""
    return sink.column_names.get(column, PICTURES[column])


def _sample(row: OutputRow, sink: SinkConfig) -> dict[str, Any]:
    # The first dot ends the key, and `rows.stem_of` writes none: what follows it is the member's name.
    sample: dict[str, Any] = {"__key__": row["image"]["path"].partition(".")[0]}
    for column in PICTURES:
        if picture := row.get(column):
            kind = format_of(picture["bytes"]) if column == "input" else picture["path"].rpartition(".")[2]
            sample[f"{member_of(column, sink)}.{kind}"] = picture["bytes"]
    for mask in filter(None, row["masks"]):
        sample[mask["path"].partition(".")[2]] = mask["bytes"]
    for member in row["members"]:
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", member["name"]).strip(".") or "member"
        while f"source.{name}" in sample:
            name = f"_{name}"
        sample[f"source.{name}"] = member["bytes"]
    no_text = (*PICTURES, "masks", "members")
    texts = as_written({name: value for name, value in row.items() if name not in no_text}, sink)
    plain = {name: _plain(value) for name, value in texts.items()}
    for name in ("request", "columns"):  # text in Parquet, which has no type for any object; here they are objects
        plain[name] = json.loads(plain[name])
    if row[LABELS]:
        plain["labels"] = row[LABELS]
    sample["json"] = json_member(plain)
    return sample


def pictures_of(sample: Mapping[str, bytes], names: Mapping[str, str]) -> dict[str, bytes]:
    """The pictures of a sample by our own names: "image", "mask", "mask.0", ..., "input" or "input_thumbnail".

    Args:
        sample: members of a tar of ours.
        names: of columns that are not our own, as `SinkConfig.column_names`.
    """
    columns = {names.get(column, member): column for column, member in PICTURES.items()}
    found = {}
    for name, data in sample.items():
        stem, _, rest = name.partition(".")
        if column := columns.get(stem):
            found[f"{column}.{rest.partition('.')[0]}" if "." in rest else column] = data
    return found


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON knows no NaN
