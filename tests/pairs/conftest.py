"""Sets of edit pairs, small enough to be audited in a second."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.pairs import jpeg, sources
from pipeline.pairs.audit import Audit, AuditConfig, audit

SIDE = 128
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(number: int) -> np.ndarray:
    """The crop of a photograph; another one for every number."""
    photograph = sources()["motorcycle_left.png"]
    top, left = 10 + 97 * (number // 10) % 350, 10 + 58 * (number % 10)
    return photograph[top : top + SIDE, left : left + SIDE]


def box(number: int) -> np.ndarray:
    """Where pair `number` is edited."""
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    at = 8 + 11 * number % 70
    mask[at : at + 32, 20:60] = True
    return mask


def edited(number: int) -> np.ndarray:
    """The same crop with something else in the box."""
    result = picture(number).copy()
    result[box(number)] = 255 - result[box(number)]
    return result


def png(pixels: np.ndarray) -> bytes:
    """Encoded without loss; a mask with one bit per pixel."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A sound pair in UltraEdit's columns, but for the changes."""
    return {
        "idx": number,
        "source_image": jpeg(picture(number), 92),
        "edited_image": jpeg(edited(number), 92),
        "mask_image": png(box(number)),
        "edit_prompt": f"Invert part {number}.",
    } | changes


@pytest.fixture
def write_set(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as a Parquet file of a folder `set`; a list of lists as several."""

    def write(rows: list[dict[str, Any]], name: str = "train-00000-of-00001.parquet") -> Path:
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        columns: dict[str, list[Any]] = {column: [one.get(column) for one in rows] for column in rows[0]}
        arrays = {
            column: pa.array([None if one is None else {"bytes": one, "path": None} for one in values], IMAGE)
            if column.endswith("image")
            else pa.array(values)
            for column, values in columns.items()
        }
        pq.write_table(pa.table(arrays), folder / name)
        return folder

    return write


@pytest.fixture
def audited(tmp_path: Path) -> Callable[..., Audit]:
    """Audits a folder in this process."""

    def look(folder: Path, **settings: Any) -> Audit:
        return audit(AuditConfig(**{"url": str(folder), "out": str(tmp_path / "audit"), "engine": "local"} | settings))

    return look


def found_in(result: Audit) -> dict[str, set[str]]:
    """Findings by id."""
    by_id: dict[str, set[str]] = {}
    for one in result.findings:
        by_id.setdefault(one.id, set()).add(one.finding)
    return by_id
