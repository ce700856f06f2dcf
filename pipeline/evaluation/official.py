"""Aggregates as the benchmarks' own scripts make them, and the files that those scripts write and read."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.evaluation.benchmarks.gedit_bench import GROUPS, LANGUAGES
from pipeline.evaluation.published import finite_mean

Row = Mapping[str, Any]  # of the scores, see score_rows.py
GEDIT_PARTS = {"semantics": "judge_sc", "quality": "judge_pq", "overall": "judge_overall"}
GEDIT_COLUMNS = (
    "source_image",
    "edited_image",
    "instruction",
    "sementics_score",  # spelled so by the official scripts
    "quality_score",
    "intersection_exist",
    "instruction_language",
)


def gedit_aggregates(rows: Iterable[Row]) -> dict[str, Any]:
    """Of one method, by language: means per group, then the plain mean over the eleven groups; over all rows, and over
    those of the intersection. A group without a row makes the mean null, and is named."""
    found: dict[str, Any] = {}
    every = list(rows)
    scored = [row for row in every if row["judge_sc"] is not None and row["judge_pq"] is not None]
    for language in sorted({row["language"] for row in every if row["language"] in LANGUAGES}):
        mine = [row for row in scored if row["language"] == language]
        both = [row for row in mine if row["facts"].get("intersection")]
        found[language] = {}
        for suffix, some in (("", mine), ("_intersection", both)):
            for part, column in GEDIT_PARTS.items():
                groups = {name: finite_mean(_of_group(some, name, column)) for name in GROUPS}
                found[language][f"{part}{suffix}"] = groups | {f"avg_{part}": _mean_of_all(groups.values())}
            empty = [name for name in GROUPS if not _of_group(some, name, "judge_sc")]
            found[language][f"n{suffix}"] = {name: len(_of_group(some, name, "judge_sc")) for name in GROUPS}
            found[language][f"empty_groups{suffix}"] = empty
    return found


def _of_group(rows: Sequence[Row], group: str, column: str) -> list[float]:
    return [row[column] for row in rows if row["edit_type"] == group]


def _mean_of_all(values: Iterable[float | None]) -> float | None:
    """None where one is missing: the mean over fewer groups is another figure."""
    every = list(values)
    return None if None in every else finite_mean(every)


def imgedit_aggregates(rows: Iterable[Row]) -> dict[str, Any]:
    """Of one method: score of a row rounded to two digits (as it stands in `judge_overall`), types rounded alike, and
    both figures that papers call overall."""
    scored = [row for row in rows if row["judge_overall"] is not None]
    by_type: dict[str, list[float]] = {}
    for row in scored:
        by_type.setdefault(row["edit_type"], []).append(row["judge_overall"])
    types = {name: round(math.fsum(values) / len(values), 2) for name, values in sorted(by_type.items())}
    return {
        "average_score": {row["item"]: row["judge_overall"] for row in scored},
        "type_score": types,
        "n": {name: len(by_type[name]) for name in types},
        "overall_mean_of_types": finite_mean(types.values()),
        "overall_mean_of_items": finite_mean(row["judge_overall"] for row in scored),
    }


def gedit_files(method: str, judge: str, rows: Sequence[Row]) -> dict[str, bytes]:
    """The scorer's CSV files of one method, by path relative to the tree of methods."""
    folder = f"{method}/{judge}/eval_results_new"
    scored = [row for row in rows if row["judge_sc"] is not None and row["judge_pq"] is not None]
    files = {
        f"{folder}/{method}_{group}_gpt_score.csv": _gedit_csv(method, some)
        for group in GROUPS
        if (some := [row for row in scored if row["edit_type"] == group])
    }
    return files | {f"{folder}/{method}_combined_gpt_score.csv": _gedit_csv(method, scored)}


def _gedit_csv(method: str, rows: Sequence[Row]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(GEDIT_COLUMNS)
    for row in rows:
        stem = f"{method}/fullset/{row['edit_type']}/{row['language']}/{row['facts']['key']}"
        scores = (row["judge_sc"], row["judge_pq"], bool(row["facts"].get("intersection")))
        writer.writerow((f"{stem}_SRCIMG.png", f"{stem}.png", row["instruction"], *scores, row["language"]))
    return out.getvalue().encode()


def imgedit_files(method: str, rows: Sequence[Row]) -> dict[str, bytes]:
    """`result.json` with the raw answers, and what the official scripts make of it."""
    found = imgedit_aggregates(rows)
    raw = {row["item"]: row["judge_raw"] for row in rows if row["judge_overall"] is not None}
    return {
        f"{method}/result.json": _json(raw),
        f"{method}/average_score.json": _json(found["average_score"]),
        f"{method}/typescore.json": _json(found["type_score"]),
    }


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=4, ensure_ascii=False) + "\n").encode()


def pie_csv(methods: Mapping[str, Sequence[Row]], measures: Sequence[str]) -> bytes:
    """PIE-Bench's own wide table: a line per item, columns `<method>|<metric>`, "nan" and "inf" as there."""
    by_item: dict[str, dict[str, Row]] = {}
    for method, rows in methods.items():
        for row in rows:
            by_item.setdefault(row["item"], {})[method] = row
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["file_id", *(f"{method}|{name}" for method in methods for name in measures)])
    for item, found in by_item.items():
        cells = [_cell(found.get(method), name) for method in methods for name in measures]
        writer.writerow([item, *cells])
    return out.getvalue().encode()


def _cell(row: Row | None, measure: str) -> Any:
    if row is None or row[measure] is None:
        infinite = row is not None and "psnr_infinite" in row["notes"] and measure.startswith("psnr_unedit")
        return "inf" if infinite else "nan"
    return row[measure]
