"""The servers that a recipe's methods ask, with the journal in the run's folder."""

from __future__ import annotations

import numpy as np

from pipeline.reading.decode import decode
from pipeline.recipe import Recipe
from pipeline.remote.journal import MemoryStore
from pipeline.remote.pictures import PictureServer, Servers
from pipeline.writing.answers import answers_of

MAX_PIXELS = 64_000_000  # of an answer


def servers_of(recipe: Recipe, *, asks: bool = True) -> Servers | None:
    """Who asks what a run's methods ask; None where they ask nothing.

    Args:
        recipe: the run.
        asks: whether servers may be asked; else what they have answered before must do.

    Raises:
        ServerError: a server's key is missing: told now, not by the first row.
    """
    asked = servers_in(recipe)
    if not asked:
        return None
    if asks:
        refuse_without_key(recipe)
    return Servers(_decoded, answers_of(recipe.sink), asks=asks)


def servers_without_a_run() -> Servers:
    """For edits of single images: what is answered is remembered as long as the process lasts."""
    return Servers(_decoded, MemoryStore())


def servers_in(recipe: Recipe) -> list[PictureServer]:
    """Whom the recipe's methods ask."""
    return [server for method in recipe.all_methods.values() if (server := method.editing.server) is not None]


def refuse_without_key(recipe: Recipe) -> None:
    """See that the servers of a recipe can be asked, as far as that is known without asking.

    Raises:
        ServerError: a key is missing.
    """
    for server in servers_in(recipe):
        server.opened()


def _decoded(data: bytes) -> np.ndarray:
    return decode(data, MAX_PIXELS)[0]
