"""Compare every pair of inversion and editor on drawn scenes with the demo model.

    python -m demo_world.methods_table --scenes 64

Writes build/methods.json, docs/methods/table.md and docs/images/methods.png. About half an hour on two cores: the pairs
of one inversion are measured by one process, which inverts once for all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import torch
import typer

from demo_world import methods
from demo_world.methods import EditedScene, Pair, cells, measure_pairs, tasks_of, valid_pairs
from demo_world.methods_pictures import SHOWN, picture, pictures_by_editor
from pipeline.editor import Editor
from pipeline.models.allocator import keep_freed_memory

WIDTHS = (16, 17, 8, 10, 9, 16, 10)  # of the columns on the terminal
PairNames = tuple[str, str]


def row(texts: tuple[str, ...]) -> str:
    """A line for the terminal."""
    return "".join(text.ljust(width) for text, width in zip(texts, WIDTHS, strict=True)).rstrip()


def measure(
    pairs: list[PairNames], model: str, scenes: int, seed: int, steps: int
) -> tuple[list[Pair], dict[PairNames, list[EditedScene]]]:
    """The share of one process: what `measure_pairs` gives, but of the images only those that are shown."""
    torch.set_num_threads(1)  # the processes share the cores
    keep_freed_memory()
    editor = Editor.load(model)
    table, made = measure_pairs(editor, tasks_of(editor, scenes, seed), pairs, steps)
    return table, {pair: outcomes[:SHOWN] for pair, outcomes in made.items()}


def main(
    scenes: Annotated[int, typer.Option(min=1, help="drawn images; each gets one edit")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="sampling steps of every method")] = methods.NUM_STEPS,
    pairs: Annotated[str, typer.Option(help="only these, as inversion+editor, separated by commas")] = "",
    model: Annotated[str, typer.Option(help="'demo', or a folder with a model trained on the same world")] = "demo",
    seed: Annotated[int, typer.Option(help="of the scenes; settings were chosen on others")] = methods.SEED,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="where methods.json goes")] = Path("build"),
    docs: Annotated[Path, typer.Option(help="whose methods/table.md and images/methods.png are rewritten")] = Path(
        "docs"
    ),
) -> None:
    """Compare every pair of inversion and editor on drawn scenes."""
    started = time.monotonic()
    named = [name.strip().partition("+") for name in pairs.split(",") if name.strip()]
    chosen = [(inversion, editor) for inversion, _, editor in named] or valid_pairs()
    if unknown := set(chosen) - set(valid_pairs()):
        raise typer.BadParameter(
            f"{', '.join('+'.join(pair) for pair in sorted(unknown))}: no pair that a recipe accepts"
        )
    by_inversion: dict[str, list[PairNames]] = {}
    for pair in chosen:
        by_inversion.setdefault(pair[0], []).append(pair)
    longest_first = sorted(by_inversion.items(), key=lambda item: (item[0] != "null_text", -len(item[1])))

    typer.echo(row(methods.COLUMNS))
    found: dict[PairNames, Pair] = {}
    made: dict[PairNames, list[EditedScene]] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(measure, share, model, scenes, seed, steps) for _, share in longest_first]
        for finished in as_completed(shares):
            part, images = finished.result()
            made |= images
            for line in part:
                found[line.inversion, line.editor] = line
                typer.echo(row(cells(line)))

    table = [found[pair] for pair in chosen]
    out.mkdir(parents=True, exist_ok=True)
    (out / "methods.json").write_text(methods.as_json(table))
    methods.write_between_marks(
        docs / "methods" / "table.md", f"{scenes} scenes, {steps} steps.\n\n{methods.markdown(table)}"
    )
    (docs / "images").mkdir(exist_ok=True)
    shown = tasks_of(Editor.load(model), min(scenes, SHOWN), seed)
    sheet = picture(shown, {pair: made[pair] for pair in chosen})
    sheet.save(docs / "images" / "methods.png", optimize=True)
    (docs / "images" / "methods").mkdir(exist_ok=True)
    for editor, strip in pictures_by_editor(shown, {pair: made[pair] for pair in chosen}).items():
        strip.save(docs / "images" / "methods" / f"{editor}.png", optimize=True)
    minutes = (time.monotonic() - started) / 60
    typer.echo(f"{minutes:.1f} minutes; wrote {out}/methods.json, {docs}/methods/table.md, {docs}/images/methods.png")


if __name__ == "__main__":
    typer.run(main)
