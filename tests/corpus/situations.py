"""Every situation of the corpus."""

from __future__ import annotations

from collections.abc import Iterator

from tests.corpus import checkpoints, recipes, run_folders, run_places
from tests.corpus.commands import Situation


def all_situations() -> Iterator[Situation]:
    """Kind by kind."""
    for module in (recipes, run_places, run_folders, checkpoints):
        yield from module.situations()
