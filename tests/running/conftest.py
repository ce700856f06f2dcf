"""What several files of this folder start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

# The package is imported in the functions alone: see `tests/conftest.py`.


@pytest.fixture(scope="session")
def four_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tars of five images each; one image does not decode."""
    from tests.runs import write_shards

    return write_shards(tmp_path_factory.mktemp("four") / "in", shards=4, rows=5)


@pytest.fixture(scope="session")
def four_edited(four_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the plain loop writes of them."""
    from pipeline.recipe import recipe_from
    from pipeline.running import driver
    from tests.runs import contents, recipe_data

    out = tmp_path_factory.mktemp("edited")
    driver.run(recipe_from(recipe_data(four_shards, out, engine="local")), progress="off")
    return contents(out)
