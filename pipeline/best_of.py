"""Best of N: results that do not pass the gates are tried again, with other seeds and settings, and one is kept.

Rounds: a unit's results are edited, then those that are still wanted are edited once more, and so on. Which those are
depends on each result's own earlier attempts alone, so that an attempt's bits, like any result's, depend on the image,
the recipe and the seed. Attempt k is what a run with another `run.seed`, and settings as varied, would have made first.

Cost: attempts share an inversion of the same settings from the same noise, or from none (gating/inverting.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pipeline.gating.varying import varied_request
from pipeline.recipe import Recipe
from pipeline.records import Asked, Rejected
from pipeline.writing.rows import ATTEMPTS_FAILED, CHOSEN, REASONS, OutputRow

Key = tuple[int, str, str]
"""A result: index, edit, method."""
Make = Callable[[Sequence[Asked]], list[OutputRow | Rejected]]
MOST_TEXT = 300  # characters of why an attempt failed


def best_of(asked: Sequence[Asked], recipe: Recipe, make: Make) -> list[OutputRow | Rejected]:
    """Every result that is asked for, in all of its attempts, of which at most one is chosen.

    A result whose first attempt fails is not tried again: it is quarantined as without attempts. A later attempt that
    fails is named in the rows of the others.

    Args:
        asked: a unit's rows.
        recipe: a run with `best_of`.
        make: edits rows, and encodes what comes out.
    """
    config = recipe.best_of
    assert config is not None, "only for runs that make several attempts"
    made = make(asked)
    failures = [one for one in made if isinstance(one, Rejected)]
    tries: dict[Key, list[OutputRow]] = {_key(row): [row] for row in made if not isinstance(row, Rejected)}
    failed: dict[Key, list[str]] = {key: [] for key in tries}
    for attempt in range(1, config.attempts):
        wanted = {key for key, rows in tries.items() if config.until == "budget" or all(row[REASONS] for row in rows)}
        again = [one for one in (_again(row, recipe, attempt, wanted) for row in asked) if one is not None]
        if not again:
            break
        for one in make(again):
            if isinstance(one, Rejected):
                text = f"{attempt}: {one.stage}: {one.error_class}: {one.message}"
                failed[one.sample.index, one.edit, one.method].append(text[:MOST_TEXT])
            else:
                tries[_key(one)].append(one)
    rows = [row for key, some in tries.items() for row in _with_choice(some, failed[key], rank_by(recipe))]
    return [*rows, *failures]


def rank_by(recipe: Recipe) -> str:
    """The figure by which an attempt is chosen among those that pass."""
    assert recipe.best_of is not None, "only for runs that make several attempts"
    assert recipe.gates is not None, "which have gates"
    return recipe.best_of.ranked_by(recipe.gates)


def _again(row: Asked, recipe: Recipe, attempt: int, wanted: set[Key]) -> Asked | None:
    """What is asked of a row once more; None for nothing."""
    pairs = frozenset((edit, method) for index, edit, method in wanted if index == row.sample.index)
    return again(row, recipe, attempt, pairs) if pairs else None


def again(row: Asked, recipe: Recipe, attempt: int, pairs: frozenset[tuple[str, str]]) -> Asked:
    """A row whose results of these edits and methods are made in a later attempt."""
    assert recipe.best_of is not None, "only for runs that make several attempts"
    variation = recipe.best_of.variation(attempt)
    edits = {edit for edit, _ in pairs}
    requests = {name: varied_request(request, variation) for name, request in row.requests.items() if name in edits}
    return replace(row, edits=tuple(requests), requests=requests, attempt=attempt, only=pairs)


def _with_choice(rows: Sequence[OutputRow], failed: Sequence[str], rank: str) -> list[OutputRow]:
    """All attempts at one result, the best of those that passed being chosen; of equal ones the first."""
    passing = [row for row in rows if not row[REASONS]]
    best = max(passing, key=lambda row: (_rank(row, rank), -row["attempt"])) if passing else None
    return [row | {CHOSEN: row is best, ATTEMPTS_FAILED: list(failed)} for row in rows]


def _rank(row: Mapping[str, object], name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) else -float("inf")


def _key(row: OutputRow) -> Key:
    return row["index"], row["edit"], row["method"]
