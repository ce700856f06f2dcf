"""The benchmarks' own aggregates as tables: both sets of rows, and both figures that papers call overall, labelled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.benchmarks.gedit_bench import GROUPS
from pipeline.evaluation.benchmarks.imgedit_bench import CRITERIA

Grid = tuple[str, list[str], list[list[str]]]  # title, heads, rows
SETS = {"full set": "", "intersection": "_intersection"}


def official_grids(kind: str, official: Mapping[str, Any]) -> list[Grid]:
    """Tables of what `official.py` has aggregated, by method; none where it has nothing.

    Args:
        kind: of the set.
        official: by method.
    """
    if not official:
        return []
    return _gedit(official) if kind == "gedit_bench" else _imgedit(official)


def _gedit(official: Mapping[str, Any]) -> list[Grid]:
    means: list[list[str]] = []
    groups: list[list[str]] = []
    for method, by_language in official.items():
        for language, found in by_language.items():
            for label, suffix in SETS.items():
                counts = found[f"n{suffix}"]
                begin = [f"`{method}`", language, label, str(sum(counts.values()))]
                averages = [
                    _text(found[f"{part}{suffix}"][f"avg_{part}"]) for part in ("semantics", "quality", "overall")
                ]
                means.append([*begin, *averages, ", ".join(found[f"empty_groups{suffix}"])])
                by_group = found[f"overall{suffix}"]
                groups.append([*begin, *(f"{_text(by_group[name])} ({counts[name]})" for name in GROUPS)])
    begin = ["method", "language", "rows", "n"]
    return [
        ("GEdit-Bench's own means over the eleven groups", [*begin, "SC", "PQ", "O", "groups without a row"], means),
        ("GEdit-Bench: O by group (n)", [*begin, *GROUPS], groups),
    ]


def _imgedit(official: Mapping[str, Any]) -> list[Grid]:
    heads = ["method", "n", "overall, mean of types", "overall, mean of items", *CRITERIA]
    rows = []
    for method, found in official.items():
        overall = [_text(found[name]) for name in ("overall_mean_of_types", "overall_mean_of_items")]
        by_type = [
            f"{_text(found['type_score'][name])} ({found['n'][name]})" if name in found["n"] else ""
            for name in CRITERIA
        ]
        rows.append([f"`{method}`", str(sum(found["n"].values())), *overall, *by_type])
    return [("ImgEdit-Bench's own scores, by type (n)", heads, rows)]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
