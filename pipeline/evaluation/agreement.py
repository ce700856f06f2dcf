"""Whether two judges, or any two measures, say the same of the same results: ranks, and who wins each item."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.score_rows import rows_in
from pipeline.evaluation.set_files import FOLDER
from pipeline.reading.storage import open_fs
from pipeline.writing.files import get, list_folder

Row = Mapping[str, Any]
Place = tuple[str, str, str]  # item, edit and method


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of two columns of scores."""

    n: int  # results that both have a number for
    spearman: float | None  # rank correlation over these; None: fewer than three, or one column has one value alone
    items: int  # of several methods, all with both numbers
    equal_winners: float | None  # share of these items whose best methods are the same; None: there is none


def rows_of(folder: str, storage_options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """All rows of an evaluation.

    Args:
        folder: its `sink.folder`.
        storage_options: of the store.
    """
    fs, root = open_fs(folder, storage_options or {})
    found: list[dict[str, Any]] = []
    for path in sorted(list_folder(fs, f"{root}/{FOLDER}/rows")):
        found += rows_in(get(fs, path) or b"")
    return found


def agreement(
    ones: Iterable[Row], others: Iterable[Row], one: str = "judge_overall", other: str | None = None
) -> Agreement:
    """Compare what two evaluations, or two columns of one, say of the same results.

    Args:
        ones, others: rows of scores, see `rows_of`.
        one: column of the first.
        other: column of the second, of the same direction; None: the same column.
    """
    first, second = _numbers(ones, one), _numbers(others, other or one)
    both = [place for place in first if place in second]
    by_item: dict[tuple[str, str], list[Place]] = {}
    for place in both:
        by_item.setdefault(place[:2], []).append(place)
    several = [some for some in by_item.values() if len(some) > 1]
    equal = [_winners(some, first) == _winners(some, second) for some in several]
    return Agreement(
        n=len(both),
        spearman=_spearman([first[place] for place in both], [second[place] for place in both]),
        items=len(several),
        equal_winners=sum(equal) / len(equal) if equal else None,
    )


def _numbers(rows: Iterable[Row], column: str) -> dict[Place, float]:
    return {(row["item"], row["edit"], row["method"]): row[column] for row in rows if row.get(column) is not None}


def _winners(places: Iterable[Place], scores: Mapping[Place, float]) -> set[Place]:
    some = list(places)
    best = max(scores[place] for place in some)
    return {place for place in some if scores[place] == best}


def _spearman(ones: list[float], others: list[float]) -> float | None:
    from scipy.stats import spearmanr

    if len(ones) < 3 or len(set(ones)) < 2 or len(set(others)) < 2:
        return None
    return float(spearmanr(ones, others).statistic)
