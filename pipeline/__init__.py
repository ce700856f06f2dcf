"""shardedit: edit image datasets with diffusion models, at the scale of a cluster.

The front door: `Editor` edits images in plain Python, `Recipe` and `load_recipe` describe a run, `run` makes it,
`Concept` and `EditRequest` say what to change. Everything else is reached by its full path.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.editor import Editor
    from pipeline.recipe import Recipe, load_recipe
    from pipeline.records import Concept, EditRequest
    from pipeline.running.driver import run

__version__ = "0.1.0"
__all__ = ["Concept", "EditRequest", "Editor", "Recipe", "__version__", "load_recipe", "run"]

# Imported at first use: torch and ray take seconds to load, and `shardedit --help` needs neither.
_HOMES = {
    "Concept": "pipeline.records",
    "EditRequest": "pipeline.records",
    "Editor": "pipeline.editor",
    "Recipe": "pipeline.recipe",
    "load_recipe": "pipeline.recipe",
    "run": "pipeline.running.driver",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
