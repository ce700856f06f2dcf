"""Compare every pair of inversion and editor on drawn scenes with the demo model.

    python -m jobs.methods_table --scenes 64

Writes build/methods.json, docs/methods/table.md and docs/images/methods.png. About half an hour on two cores.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pipeline.editor import Editor
from pipeline.models.demo import methods_table
from pipeline.models.demo.methods_table import Pair, cells, measure_pairs, tasks_of, valid_pairs

WIDTHS = (16, 17, 8, 10, 9, 16, 10)  # of the columns on the terminal


def row(texts: tuple[str, ...]) -> str:
    """A line for the terminal."""
    return "".join(text.ljust(width) for text, width in zip(texts, WIDTHS, strict=True)).rstrip()


def main(
    scenes: Annotated[int, typer.Option(min=1, help="drawn images; each gets one edit")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="sampling steps of every method")] = methods_table.NUM_STEPS,
    pairs: Annotated[str, typer.Option(help="only these, as inversion+editor, separated by commas")] = "",
    model: Annotated[str, typer.Option(help="'demo', or a folder with a model trained on the same world")] = "demo",
    seed: Annotated[int, typer.Option(help="of the scenes; settings were chosen on others")] = methods_table.SEED,
    out: Annotated[Path, typer.Option(help="where methods.json goes")] = Path("build"),
    docs: Annotated[Path, typer.Option(help="whose methods/table.md and images/methods.png are rewritten")] = Path(
        "docs"
    ),
) -> None:
    """Compare every pair of inversion and editor on drawn scenes."""
    chosen = [
        (inversion, editor) for inversion, _, editor in (name.partition("+") for name in pairs.split(",") if name)
    ]
    started = time.monotonic()
    editor = Editor.load(model)
    tasks = tasks_of(editor, scenes, seed)
    typer.echo(row(methods_table.COLUMNS))

    def tell(pair: Pair) -> None:
        typer.echo(row(cells(pair)))

    table, made = measure_pairs(editor, tasks, chosen or valid_pairs(), steps, tell)
    minutes = (time.monotonic() - started) / 60
    out.mkdir(parents=True, exist_ok=True)
    (out / "methods.json").write_text(methods_table.as_json(table))
    methods_table.write_between_marks(
        docs / "methods" / "table.md",
        f"{scenes} scenes, {steps} steps.\n\n{methods_table.markdown(table)}",
    )
    (docs / "images").mkdir(exist_ok=True)
    methods_table.picture(tasks, made).save(docs / "images" / "methods.png", optimize=True)
    typer.echo(
        f"{minutes:.1f} minutes; wrote {out / 'methods.json'}, {docs}/methods/table.md, {docs}/images/methods.png"
    )


if __name__ == "__main__":
    typer.run(main)
