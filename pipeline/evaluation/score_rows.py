"""Rows of scores as they are stored: one per image, edit and method, in `evaluate/rows/`, a file per unit of work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.evaluation.scoring import Scored
from pipeline.writing.rows import json_text, utf8_text

TEXTS = ("item", "image", "edit", "method", "edit_type", "language", "instruction", "reason", "message", "facts")
ABOUT_JUDGE = (
    "judge_protocol",
    "judge_model",
    "judge_model_reported",
    "judge_revision",
    "judge_base_url_host",
    "judge_prompts",
    "judge_image_format",
    "judge_reason",
    "judge_finish_reason",
)
JUDGE_TEXTS = (
    *ABOUT_JUDGE,
    "judge_raw",
    "judge_sc_raw",
    "judge_pq_raw",
    "judge_reasoning_sc",
    "judge_reasoning_pq",
)
JUDGE_NUMBERS = ("judge_sc", "judge_pq", "judge_overall", "judge_score", "judge_pass_sd")
JUDGE_LISTS = ("judge_scores", "judge_sc_scores", "judge_pq_scores")


def schema(measures: Sequence[str], *, judged: bool) -> pa.Schema:
    """Columns of the rows of an evaluation.

    Args:
        measures: names of figures.
        judged: whether there is a judge.
    """
    columns: list[tuple[str, pa.DataType]] = [(name, pa.string()) for name in TEXTS]
    columns += [("seed", pa.int64()), ("steps", pa.int64()), ("network_rows", pa.int64())]
    columns.append(("notes", pa.list_(pa.string())))
    columns += [(name, pa.float64()) for name in measures]
    if judged:
        columns += [(name, pa.string()) for name in JUDGE_TEXTS]
        columns += [(name, pa.float64()) for name in JUDGE_NUMBERS]
        columns += [(name, pa.list_(pa.float64())) for name in JUDGE_LISTS]
        columns += [("judge_names", pa.list_(pa.string())), *ABOUT_ASKING]
    return pa.schema(columns)


ABOUT_ASKING: tuple[tuple[str, pa.DataType], ...] = (
    ("judge_prompt_hash", pa.list_(pa.string())),
    ("judge_flags", pa.list_(pa.string())),
    ("judge_temperature", pa.float64()),
    ("judge_seed", pa.int64()),
    ("judge_passes", pa.int64()),
    ("judge_prompt_tokens", pa.int64()),
    ("judge_completion_tokens", pa.int64()),
)


def preference_schema() -> pa.Schema:
    """Columns of the rows of pairs of methods; `preference` is that of `first`, -1..1."""
    texts = ("item", "image", "edit", "edit_type", "first", "second", *ABOUT_JUDGE)
    words = ("judge_ab_raw", "judge_ba_raw", "judge_reasoning_ab", "judge_reasoning_ba")
    return pa.schema(
        [
            *((name, pa.string()) for name in (*texts, *words)),
            ("preference", pa.float64()),
            *((name, pa.list_(pa.float64())) for name in ("judge_ab_scores", "judge_ba_scores")),
            *ABOUT_ASKING,
        ]
    )


def row_of(scored: Scored, *, cost: Mapping[str, int], judged: Mapping[str, Any]) -> dict[str, Any]:
    """One row.

    Args:
        scored: what was measured.
        cost: steps and network rows of the method alone; empty where they are not known.
        judged: the judge's columns; empty without one.
    """
    result, item = scored.result, scored.result.item
    return {
        "item": utf8_text(item.key),
        "image": utf8_text(str(item.facts.get("image", item.key))),
        "edit": result.edit,
        "method": result.method,
        "edit_type": item.edit_type,
        "language": item.language,
        "instruction": utf8_text(item.request.instruction),
        "reason": scored.reason,
        "message": utf8_text(scored.message)[:2000],
        "facts": json_text(dict(item.facts)),
        "seed": result.seed,
        **{name: cost.get(name) for name in ("steps", "network_rows")},
        "notes": list(scored.notes),
        **scored.figures,
        **judged,
    }


def as_bytes(rows: Sequence[Mapping[str, Any]], columns: pa.Schema) -> bytes:
    """Rows as Parquet: the same rows give the same bytes."""
    full = [{name: row.get(name) for name in columns.names} for row in rows]
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(full, schema=columns), buffer, compression="zstd")
    return buffer.getvalue()


def preferences_in(data: bytes) -> list[dict[str, Any]]:
    """Rows of `preference_schema`."""
    rows: list[dict[str, Any]] = pq.read_table(BytesIO(data)).to_pylist()
    return rows


def rows_in(data: bytes) -> list[dict[str, Any]]:
    """Rows as they were given, `facts` as an object."""
    rows: list[dict[str, Any]] = pq.read_table(BytesIO(data)).to_pylist()
    return [row | {"facts": json.loads(row["facts"])} for row in rows]
