"""Pairs of methods before a judge, once every row is measured: which result of an edit is better.

Rows are committed by units, and a unit of somebody else's results holds one method; what is compared here is all that
the methods made of the same items. evaluate/preferences/NAME.parquet holds a row per edit and pair of methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from pipeline.common import stopping
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.job.measuring import Unit, load_unit
from pipeline.evaluation.judging.judged import Judging
from pipeline.evaluation.score_rows import as_bytes, preference_schema, preferences_in
from pipeline.evaluation.set_files import FOLDER
from pipeline.reading.storage import FileSystem
from pipeline.writing.files import get, put
from pipeline.writing.rows import utf8_text

PREFERENCES = f"{FOLDER}/preferences"
MEASURE = "judge_preference"
Row = dict[str, Any]
Measured = Sequence[tuple[Unit, Sequence[Row]]]


def prefer(
    fs: FileSystem,
    root: str,
    config: EvaluateConfig,
    units: Measured,
    judging: Judging,
    *,
    check: Callable[[], None],
    retry_failed: bool = False,
) -> list[Row]:
    """Ask what was not asked yet; returns the rows of all pairs.

    Args:
        fs, root: the sink's folder.
        config: the evaluation's.
        units: with their rows, of all methods.
        judging: who is asked.
        check: raises where another driver has taken over.
        retry_failed: ask anew about pairs without a choice.

    Raises:
        JudgeError: the judge cannot be asked. What is answered by then is kept.
    """
    found: list[Row] = []
    for name, some in _groups(units).items():
        path = f"{root}/{PREFERENCES}/{name}.parquet"
        data = get(fs, path)
        rows = [] if data is None else preferences_in(data)
        wanted = _pairs(some)
        there = {(row["item"], row["edit"], row["first"], row["second"]) for row in rows}
        if there != wanted or (retry_failed and any(row["judge_reason"] for row in rows)):
            stopping.check()
            rows = judging.preferences(_results(config, some))
            check()
            put(fs, path, as_bytes(rows, preference_schema()))
        found += rows
    return found


def _groups(units: Measured) -> dict[str, list[tuple[Unit, Sequence[Row]]]]:
    """Units of the same items: each alone, or those of all methods."""
    groups: dict[str, list[tuple[Unit, Sequence[Row]]]] = {}
    for unit, rows in units:
        name = unit.items.rpartition("/")[2].removesuffix(".parquet") or unit.name
        groups.setdefault(name, []).append((unit, rows))
    return groups


def _pairs(units: Measured) -> set[tuple[str, str, str, str]]:
    """What can be compared: item, edit and two methods with a picture each, in the order of their names."""
    methods: dict[tuple[str, str], list[str]] = {}
    for _, rows in units:
        for row in rows:
            if not row["reason"]:
                methods.setdefault((row["item"], row["edit"]), []).append(row["method"])
    return {(*edit, *pair) for edit, some in methods.items() for pair in combinations(sorted(some), 2)}


def _results(config: EvaluateConfig, units: Measured) -> list[Any]:
    """The results with a picture, of units of the same items."""
    results = []
    for unit, rows in units:
        good = {(row["item"], row["edit"], row["method"]) for row in rows if not row["reason"]}
        results += [one for one in load_unit(config, unit) if (utf8_text(one.item.key), one.edit, one.method) in good]
    return results


def with_preferences(rows: Sequence[Row], preferences: Sequence[Row]) -> list[Row]:
    """The rows with `judge_preference`: the share of its comparisons that a result has won, ties half, 0..1."""
    shares: dict[tuple[str, str, str], list[float]] = {}
    for row in preferences:
        if row["preference"] is not None:
            for method, sign in ((row["first"], 1), (row["second"], -1)):
                shares.setdefault((row["item"], row["edit"], method), []).append((1 + sign * row["preference"]) / 2)
    means = {place: sum(some) / len(some) for place, some in shares.items()}
    return [row | {MEASURE: means.get((row["item"], row["edit"], row["method"]))} for row in rows]


def differences_in(
    preferences: Sequence[Row], methods: Sequence[str]
) -> Mapping[tuple[str, str], Sequence[tuple[str, float]]]:
    """By pair of methods in their order: (image, preference of the first, -1..1)."""
    place = {method: at for at, method in enumerate(methods)}
    found: dict[tuple[str, str], list[tuple[str, float]]] = {pair: [] for pair in combinations(methods, 2)}
    for row in preferences:
        if row["preference"] is None:
            continue
        turned = place[row["first"]] > place[row["second"]]
        pair = (row["second"], row["first"]) if turned else (row["first"], row["second"])
        found[pair].append((row["image"], -row["preference"] if turned else row["preference"]))
    return found
