"""The evaluation of all methods on drawn scenes: what it asks, every method can be asked."""

from __future__ import annotations

from functools import cache

import pytest

from demo_world.methods import valid_pairs
from demo_world.methods_evaluation import evaluated
from pipeline.evaluation.benchmarks.drawn import KINDS, items_of
from pipeline.records import EditRequest


@cache
def requests() -> list[EditRequest]:
    return [item.request for item in items_of(len(KINDS))]


@pytest.mark.parametrize("pair", valid_pairs(), ids="+".join)
def test_a_method_serves_every_kind_of_edit(pair: tuple[str, str]) -> None:
    method = evaluated(*pair, 20)
    for request in requests():
        method.editing.check(request, method.inversion)
