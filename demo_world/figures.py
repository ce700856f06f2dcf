"""Measures of an evaluation on the drawn world: what the oracle reads of a result (`metrics.own` in a configuration).

    metrics: {own: ["demo_world.figures:drawn"]}

`success`: every attribute that the edit should change did. `unchanged`: share of the others that stayed. Cost: a tenth
of a second per result on one core.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from typing_extensions import override

from demo_world.oracle import read
from pipeline.evaluation.items import Item
from pipeline.evaluation.scoring import OwnMeasures
from pipeline.models.demo.world import Scene


class DrawnMeasures(OwnMeasures):
    """Of items that say which scene they were drawn from; None for others."""

    directions: Mapping[str, bool | None] = {"success": True, "unchanged": True}

    @override
    def measure(
        self, item: Item, source: np.ndarray, result: np.ndarray, mask: np.ndarray | None
    ) -> Mapping[str, float | None]:
        if "after" not in item.facts:
            return {"success": None, "unchanged": None}
        wanted, changes = Scene(**item.facts["after"]).attributes(), set(item.facts["changes"])
        found = read(result)
        stayed = [found[name] == value for name, value in wanted.items() if name not in changes]
        return {
            "success": float(all(found[name] == value for name, value in wanted.items() if name in changes)),
            "unchanged": float(np.mean(stayed)),
        }


def drawn() -> OwnMeasures:
    """The measures."""
    return DrawnMeasures()
