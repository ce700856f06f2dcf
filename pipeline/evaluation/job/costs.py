"""What a method takes of a model, alone: steps, and network rows by the formulas that `shardedit plan` counts with."""

from __future__ import annotations

from pipeline.looking.counting import RowCounter
from pipeline.recipe import Recipe
from pipeline.records import EditRequest


class Costs:
    """Of the methods of a recipe, each as if it were the only one: nothing is shared."""

    def __init__(self, recipe: Recipe | None) -> None:
        methods = recipe.all_methods if recipe is not None else {}
        self._steps = {name: getattr(method.inversion, "num_steps", None) for name, method in methods.items()}
        self._counters = {
            name: RowCounter(recipe.model_copy(update={"methods": {name: method}}))
            for name, method in methods.items()
            if recipe is not None
        }

    def of(self, method: str, request: EditRequest) -> dict[str, int]:
        """`steps` and `network_rows` of one edit; empty where no method of ours made it."""
        if method not in self._counters:
            return {}
        steps = self._steps[method]
        found = {"network_rows": self._counters[method].rows({"edit": bare(request)})}
        return found if steps is None else found | {"steps": int(steps)}


def bare(request: EditRequest) -> EditRequest:
    """A request without words and windows, which say what a row reads and not how many rows there are: so that few
    cases are counted."""
    return request.model_copy(
        update={"blend_words": None, "subtract_words": None, "equalizer": {}, "cross_replace_steps": {}}
    )
