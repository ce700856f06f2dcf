"""What pydantic finds wrong with a recipe, as (key path, what is wrong and the way out)."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from pipeline.editing import EDITORS
from pipeline.inversion import INVERSIONS


def describe(error: ValidationError) -> list[tuple[str, str]]:
    """Pydantic's findings as (key path, what is wrong and the way out)."""
    found = []
    tags = set(INVERSIONS) | set(EDITORS)
    for item in error.errors():
        # Pydantic names the union's branch in the path: `inversion.ddim.num_steps`. Users wrote no such key.
        path = ".".join(
            str(part)
            for at, part in enumerate(item["loc"])
            if not (part in tags and at > 0 and _is_tag(item["loc"], at))
        )
        context = item.get("ctx", {})
        match item["type"]:
            case "union_tag_invalid":
                known_tags = str(context.get("expected_tags")).replace("'", "")
                text = f"method is '{context.get('tag')}', known are: {known_tags}"
            case "union_tag_not_found":
                known = INVERSIONS if path.endswith("inversion") else EDITORS
                text = f"method is missing, known are: {', '.join(known)}"
            case "extra_forbidden":
                text = "unknown key. Remove it or correct its spelling"
            case "missing":
                text = "is required"
            case _:
                text = item["msg"].removeprefix("Value error, ")
        found.append((path or "recipe", text))
    return found


def _is_tag(location: tuple[Any, ...], at: int) -> bool:
    return location[at - 1] in ("inversion", "editing")
