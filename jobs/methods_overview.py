"""Write the tables of docs/methods/README.md: python -m jobs.methods_overview (or: make recipe-reference).

A method's line in the first tables stands on its own page, below the title. What it needs of a model and of its partner
is asked of the code, at default settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.editing import EDITORS
from pipeline.editing.base import EditingMethod
from pipeline.engine.backbone import Offers
from pipeline.inversion import INVERSIONS
from pipeline.inversion.base import Inversion
from pipeline.models.outline import outline_of
from pipeline.recipe import ModelConfig

FOLDER = Path("docs/methods")
PAGE = FOLDER / "README.md"
BEGIN, END = "<!-- made by `make recipe-reference` -->", "<!-- end of what is made -->"
NEEDS = """## What a method needs

Of its partner, and of the model at default settings. Noise maps: one per step. DDIM steps: the solver is DDIM. Path:
replayed, it returns the image, at least about. Faithful source: a source branch follows it without guidance. Levels
alone: nothing was paid for but image and levels. Upward velocities: along what the inversion went up. Displaced
target: one that is predicted where the inversion predicted. Source branch: one that shows the source beside the target.
Unconditional prompt: one to guide away from, in whose place an inversion's embeddings stand. Distilled models know no
guidance and cannot be walked backwards.
"""
COLUMNS = {
    "inversion": ("records", "reconstruction", "network rows for N steps"),
    "editor": ("reads", "masks", "network rows after N steps of inversion"),
}


def page(now: str, folder: Path = FOLDER) -> str:
    """The overview with what stands between its marks made anew; the rest is written by hand.

    Raises:
        ValueError: the overview has lost its marks, or a method's page has no line for it.
    """
    before, begin, rest = now.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} lacks the lines '{BEGIN}' and '{END}'. Restore them: the tables go between")
    made = "\n".join(tables(folder))
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"


def tables(folder: Path) -> Iterator[str]:
    """All lines between the marks."""
    registries: dict[str, Mapping[str, Any]] = {"inversion": INVERSIONS, "editor": EDITORS}
    for kind, registry in registries.items():
        yield from table((kind, *COLUMNS[kind]), ((link(name), line_of(folder, kind, name)) for name in registry))
    yield NEEDS
    yield from table(
        ("inversion", "has for editors", "wasted on editors without", "needs of the model"),
        ((link(name), *needs_of_inversion(method())) for name, method in registries["inversion"].items()),
    )
    yield from table(
        ("editor", "needs of an inversion", "has for inversions", "keeps to a user's mask", "needs of the model"),
        ((link(name), *needs_of_editor(method())) for name, method in registries["editor"].items()),
    )


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Markdown lines; a cell may hold several cells that are already joined."""
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def link(name: str) -> str:
    """A method's name, which leads to its page."""
    return f"[`{name}`]({name}.md)"


def line_of(folder: Path, kind: str, name: str) -> str:
    """The only line of the table below a page's title.

    Raises:
        ValueError: there is no such table.
    """
    head = f"| {' | '.join(COLUMNS[kind])} |"
    _, found, rest = (folder / f"{name}.md").read_text(encoding="utf-8").partition(f"\n\n{head}\n")
    if not found:
        raise ValueError(f"{folder}/{name}.md has no table with the head '{head}'. Put one below its title")
    return rest.splitlines()[1].removeprefix("| ").removesuffix(" |")


def needs_of_inversion(inversion: Inversion) -> tuple[str, str, str]:
    """The cells of one line."""
    return named(inversion.provides), named(inversion.demands), needs_of_model(inversion)


def needs_of_editor(editor: EditingMethod) -> tuple[str, str, str, str]:
    """The cells of one line."""
    keeps = "yes" if editor.keeps_to_masks else "no"
    return named(editor.needs), named(editor.takes), keeps, needs_of_model(editor)


def named(words: Iterable[str]) -> str:
    """Words in a fixed order, or that there are none."""
    return ", ".join(sorted(words)) or "nothing"


def needs_of_model(method: Inversion | EditingMethod) -> str:
    """What a method refuses a model for that has all else."""
    return named(need for need, offers in lacking().items() if any(method.model_problems(offers)))


def lacking() -> dict[str, Offers]:
    """The bundled model, which serves every method, less one thing that a model may lack, by its name."""
    whole = outline_of(ModelConfig(name="demo")).offers
    assert whole is not None
    openings = whole.openings

    def without(**parts: Any) -> Offers:
        return dataclasses.replace(whole, openings=dataclasses.replace(openings, **parts))

    return {
        "attention layers": without(layers=()),
        "cross-attention at a quarter of the latents' side": without(watched=frozenset()),
        "decoder features at a quarter of the latents' side": without(residuals=()),
        "features of a decoder block": without(decoder=()),
        "gradients to the text's embedding": dataclasses.replace(whole, embedding_gradients=False),
        "Jacobian products of the bottleneck": dataclasses.replace(whole, bottleneck=None),
        "not distilled": dataclasses.replace(whole, distilled="distilled"),
    }


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
