"""Write the tables of docs/recipe.md from the code: python -m jobs.recipe_reference (or: make recipe-reference)."""

from __future__ import annotations

from pathlib import Path

from pipeline.settings.reference import markdown

PAGE = Path("docs/recipe.md")
MARK = "<!-- From here on made by `make recipe-reference`. The texts stand in the code, under each key. -->\n"


def page(now: str) -> str:
    """The page with what follows the mark made anew; what stands before it is written by hand."""
    by_hand, mark, _ = now.partition(MARK)
    assert mark, f"{PAGE} has lost its mark"
    return f"{by_hand}{mark}\n{markdown()}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
