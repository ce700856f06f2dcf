"""Settings that are changed on the command line: `inversion.num_steps=20`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline.errors import RecipeError
from pipeline.settings.yaml_file import UnusableFileError, parse_yaml


def apply_overrides(data: Any, overrides: Sequence[str], where: str) -> None:
    """Change plain data in place; values are YAML.

    Raises:
        RecipeError: one is not written as it should be, or leads nowhere.
    """
    for number, override in enumerate(overrides, 1):
        _apply(data, override, number, where)


def _apply(data: Any, override: str, number: int, where: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:  # what was typed may be a secret on its own
        raise RecipeError(where, [(f"override {number}", "is not written section.key=value")])
    try:
        value = parse_yaml(text)
    except UnusableFileError as error:
        raise RecipeError(where, [(path, f"the override's value {error}")]) from None
    *parents, last = path.split(".")
    node = data
    for part in parents:
        if isinstance(node, list) and _is_place(part, node):
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            node = None
    if isinstance(node, list) and _is_place(last, node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(where, [(path, "the override leads into a value that has no keys")])


def _is_place(text: str, items: list[Any]) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", text) is not None and int(text) < len(items)
