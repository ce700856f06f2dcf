"""What a plan says of servers that are asked: how many requests, and what they cost at most. None is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.editing.endpoint import Endpoint
from pipeline.recipe import Recipe


def cost_at_most(asked: Mapping[str, int], recipe: Recipe) -> float | None:
    """What requests cost if every one is made as often as it may be and paid for; None: the recipe does not tell.

    Args:
        asked: results that are asked for, by method.
        recipe: the run.
    """
    costs = []
    for name, editing in _asking(recipe):
        if editing.most_per_request is None:
            return None
        costs.append(asked.get(name, 0) * attempts_of(recipe) * editing.tries * editing.most_per_request)
    return sum(costs) if costs else None


def requests_notes(asked: Mapping[str, int], recipe: Recipe) -> Iterator[str]:
    """What stands behind the numbers."""
    for name, editing in _asking(recipe):
        most = asked.get(name, 0) * attempts_of(recipe) * editing.tries
        text = f"{name} asks for {asked.get(name, 0):,} pictures, in {most:,} requests at most (editing.tries)"
        if (price := editing.most_per_request) is not None:
            yield f"{text}; {price:g} each at most: {asked.get(name, 0) * price:,.2f} if each is answered at once"
        elif editing.prices.are_named:
            yield f"{text}. How many tokens each takes is not known before: set editing.cost_at_most for a bound"
        else:
            yield f"{text}. No price is named, so that tokens are counted alone: editing.price_picture and others"


def attempts_of(recipe: Recipe) -> int:
    """Results of each image, edit and method, at most."""
    return 1 if recipe.best_of is None else recipe.best_of.attempts


def without_servers(recipe: Recipe) -> Recipe | None:
    """The methods that a probe may run: those that ask no server, which would have to be paid. None: there are none."""
    if not recipe.asks_servers:
        return recipe
    rest = {name: method for name, method in recipe.all_methods.items() if method.editing.server is None}
    return recipe.model_copy(update={"methods": rest}) if rest else None


def _asking(recipe: Recipe) -> Iterator[tuple[str, Endpoint]]:
    for name, method in recipe.all_methods.items():
        if isinstance(method.editing, Endpoint):
            yield name, method.editing
