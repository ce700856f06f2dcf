"""What cannot work of a recipe whose methods ask servers: told before the run, with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

EXTRA = "httpx2"
"""The package that asking takes, of the extra `evaluate`."""
OF_THE_ROUND_TRIP = ("edit_change", "rest_change")
"""Gates whose figures compare with an input that has been through the autoencoder and back."""


def server_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Key paths, and what is wrong there."""
    asking = [name for name, method in recipe.all_methods.items() if method.editing.server is not None]
    if not asking:
        return
    at = f"methods.{asking[0]}.editing" if recipe.methods else "editing"
    if find_spec(EXTRA) is None:
        yield at, f"asks a server by {EXTRA}, which is not installed: pip install 'shardedit[evaluate]'"
    on = {} if recipe.gates is None else recipe.gates.gates
    for name in (name for name in OF_THE_ROUND_TRIP if name in on):
        text = f"a server's picture has been through no autoencoder (method '{asking[0]}'), so that nothing measures it"
        yield f"gates.{name}", f"{text}. Set it to null; change_inside and background_psnr are measured"


def needless_model(recipe: Recipe) -> list[tuple[str, str]]:
    """A model that nobody reads would be loaded for nothing; as problems of the recipe."""
    if recipe.model.name == "none" or any(method.editing.reads_model for method in recipe.all_methods.values()):
        return []
    text = f"names '{recipe.model.name}', and no method reads a model. Set model.name to none: nothing is loaded then"
    return [("model.name", text)]
