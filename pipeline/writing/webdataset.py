"""Rows of one unit as one WebDataset tar, in memory. Both `webdataset` and Hugging Face `datasets` read it.

    KEY.edited.png  KEY.mask.png  KEY.mask.0.png ...  KEY.input.png  KEY.thumbnail.jpg  KEY.json  KEY.source.<member>

KEY.json holds every column that is no image. A mask that a result lacks has no member. The same rows give the same
bytes: owner, mode and time are fixed.
`datasets` takes the members of the first rows for those of all: where rows have different numbers of masks, only
`webdataset` reads the tar, and Parquet is the format to choose.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from webdataset import TarWriter

from pipeline.writing.rows import Row


def render_tar(rows: Sequence[Row]) -> bytes:
    """Write rows as a tar, one sample each, in their order."""
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, user="", group="", mode=0o644, mtime=0) as writer:
        for row in rows:
            writer.write(_sample(row))
    return buffer.getvalue()


def _sample(row: Row) -> dict[str, Any]:
    images = [
        row["image"],
        row["mask"],
        *row["masks"],
        *(row[name] for name in ("input", "input_thumbnail") if name in row),
    ]
    # The first dot ends the key, and `rows.stem_of` writes none: what follows it is the member's name.
    sample: dict[str, Any] = {"__key__": row["image"]["path"].partition(".")[0]}
    sample |= {image["path"].partition(".")[2]: image["bytes"] for image in images if image is not None}
    for member in row["members"]:
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", member["name"]).strip(".") or "member"
        while f"source.{name}" in sample:
            name = f"_{name}"
        sample[f"source.{name}"] = member["bytes"]
    no_text = ("image", "mask", "masks", "input", "input_thumbnail", "members")
    plain = {name: _plain(value) for name, value in row.items() if name not in no_text}
    sample["json"] = json.dumps(plain, sort_keys=True, ensure_ascii=False, allow_nan=False).encode("utf-8")
    return sample


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON knows no NaN
