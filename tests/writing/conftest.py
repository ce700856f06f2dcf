"""A recipe for a sink in a temporary folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.recipe import Recipe, recipe_from


@pytest.fixture
def recipe_for(tmp_path: Path) -> Callable[..., Recipe]:
    """Builds a recipe whose sink is `tmp_path/out`, with settings of the sink."""

    def build(**sink: object) -> Recipe:
        return recipe_from(
            {
                "source": {"shards": str(tmp_path / "in"), "storage_options": {"secret": "SOURCE-SECRET"}},
                "edits": {"b": {"concepts": [{"prompt": "hat"}]}, "a": {"concepts": [{"prompt": "beard"}]}},
                "model": {"name": "analytic"},
                "sink": {"folder": str(tmp_path / "out"), **sink},
            }
        )

    return build
