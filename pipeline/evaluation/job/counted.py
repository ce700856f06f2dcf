"""What an evaluation would take, before it starts: items, edits, network rows with and without sharing, questions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.evaluation.config import EvaluateConfig, OwnSet
from pipeline.evaluation.job.costs import Costs, bare
from pipeline.evaluation.judging.questions import PARTS
from pipeline.evaluation.set_files import items_of
from pipeline.looking.counting import RowCounter
from pipeline.looking.planning import plan
from pipeline.settings.sections import SourceConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """An evaluation in numbers."""

    items: int  # that can be edited; of a set of one's own: images
    excluded: dict[str, int]  # items that cannot, by class
    results: int
    network_rows: int | None  # of the job, in which methods share inversions; None: results are there
    network_rows_alone: int | None  # of the methods one by one; None: not known
    questions: int  # to the judge, each one request at least


def counts_of(config: EvaluateConfig) -> Counts:
    """Read the set and count. Nothing is written, edited or asked.

    Raises:
        RecipeError, SourceError: as `evaluate`.
    """
    methods = list(config.methods or config.results)
    per_edit = _questions_per_edit(config, len(methods))
    if isinstance(config.set, OwnSet):
        planned = plan(config.recipe(config.set.source), probe=False)
        return Counts(
            items=planned.images,
            excluded={},
            results=planned.results,
            network_rows=planned.network_rows,
            network_rows_alone=None,
            questions=planned.results // len(methods) * per_edit,
        )
    recipe = config.recipe(SourceConfig(shards=("-",))) if config.methods else None
    shared = RowCounter(recipe) if recipe is not None else None
    costs = Costs(recipe)
    items, excluded, rows, alone = 0, Counter[str](), 0, 0
    for item in items_of(config):
        if item.problem:
            excluded[item.excluded] += 1
            continue
        items += 1
        if shared is not None:
            rows += shared.rows({"edit": bare(item.request)})
            alone += sum(costs.of(method, item.request)["network_rows"] for method in methods)
    return Counts(
        items=items,
        excluded=dict(sorted(excluded.items())),
        results=items * len(methods),
        network_rows=rows if shared is not None else None,
        network_rows_alone=alone if shared is not None else None,
        questions=items * per_edit,
    )


def _questions_per_edit(config: EvaluateConfig, methods: int) -> int:
    """Of all methods together; of pairwise preference, of every two of them."""
    if config.judge is None:
        return 0
    asked = methods if config.judge.scores_rows else methods * (methods - 1) // 2
    return asked * len(PARTS[config.judge.protocol]) * config.judge.passes
