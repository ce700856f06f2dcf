"""The recipes that come with the package: those of configs/, which lie beside the modules once it is installed."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from pipeline.errors import RecipeError

FOLDER = Path(str(files("pipeline") / "configs"))


def names() -> list[str]:
    """Names of the recipes, e.g. "demo_edits/add_hat"."""
    paths = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")]
    return sorted(paths, key=lambda name: (name.count("/"), name))


def text(name: str) -> str:
    """The YAML of a recipe, with or without the ending in its name.

    Raises:
        RecipeError: there is none of that name; lists those that there are.
    """
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    if wanted not in names():
        raise RecipeError(name, [("name", f"no recipe of that name is shipped. There are: {', '.join(names())}")])
    return (FOLDER / f"{wanted}.yaml").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """What a recipe makes: the first sentence of its opening comment."""
    prose = re.match(r"(?:# ?\S.*\n)+", text(name))
    assert prose is not None, "tests/test_configs.py asks for it"
    joined = " ".join(line.removeprefix("#").strip() for line in prose[0].splitlines())
    return re.split(r"(?<=[.?]) ", joined)[0]
