"""The editors that were made for flow matching, on the drawn world's flow model, each at its best settings.

    python -m demo_world.flow_score --scenes 64

Scenes, edits and figures are those of `demo_world/methods.py`, on scenes that no setting was chosen on. Writes
build/flow_methods.json, the second table of docs/methods/table.md and docs/images/flow/EDITOR.png.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from demo_world.methods import (
    EditedScene,
    Pair,
    SceneEdit,
    as_json,
    edit_all,
    invert_all,
    judge,
    markdown,
    tasks_of,
    write_between_marks,
)
from demo_world.methods_pictures import SHOWN, pictures_by_editor
from demo_world.methods_table import cells, row
from pipeline.editor import Editor
from pipeline.models.allocator import keep_freed_memory
from pipeline.recipe import Method, recipe_from

SEED = 4  # of the scenes; settings were chosen on those of seed 11
MARK = "<!-- written by `make flow-score` -->"
PLACES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    (
        {"method": "noise", "num_steps": 20},
        {"method": "flow_edit", "n_max": 18, "guidance_scale": 5.5, "source_guidance_scale": 1.5},
    ),
    (
        {"method": "uni_inv", "num_steps": 18, "skip_steps": 2},
        {"method": "uniedit_flow", "omega": 1.3, "inverts": "source"},
    ),
    (
        {"method": "ddim", "num_steps": 20},
        {"method": "direct_edit", "guidance_scale": 5.0, "attn_ratio": 0.0},
    ),
)
"""Inversion and editor, with the settings that they are compared with."""


def methods() -> list[Method]:
    """The pairs, checked as a recipe's are."""
    recipes = [
        recipe_from({"source": {"shards": "-"}, "inversion": inversion, "editing": editing, "sink": {"folder": "-"}})
        for inversion, editing in PLACES
    ]
    return [Method(inversion=one.inversion, editing=one.editing) for one in recipes]


def measure(editor: Editor, method: Method, tasks: Sequence[SceneEdit]) -> tuple[Pair, list[EditedScene]]:
    """One line of the table, and what was made."""
    inversion, editing = method.inversion.method, method.editing.method
    requests = [task.request(inversion, editing) for task in tasks]
    prompts = [method.editing.inverts_under(request).prompt for request in requests]
    made = edit_all(editor.engine, method, requests, invert_all(editor, method.inversion, tasks, prompts))
    return judge(inversion, editing, tasks, made), made


def main(
    scenes: Annotated[int, typer.Option(min=1, help="drawn images; each gets one edit")] = 64,
    model: Annotated[str, typer.Option(help="'demo_flow', or a folder with a model of the same world")] = "demo_flow",
    seed: Annotated[int, typer.Option(help="of the scenes; settings were chosen on others")] = SEED,
    out: Annotated[Path, typer.Option(help="where flow_methods.json goes")] = Path("build"),
    docs: Annotated[Path, typer.Option(help="whose methods/table.md and images/flow are written")] = Path("docs"),
) -> None:
    """Measure the editors that were made for flow matching on drawn scenes."""
    started = time.monotonic()
    torch.set_num_threads(1)
    keep_freed_memory()
    editor = Editor.load(model)
    tasks = tasks_of(editor, scenes, seed)
    table, made = [], {}
    for method in methods():
        line, outcomes = measure(editor, method, tasks)
        table.append(line)
        made[line.inversion, line.editor] = outcomes[:SHOWN]
        typer.echo(row(cells(line)))
    out.mkdir(parents=True, exist_ok=True)
    (out / "flow_methods.json").write_text(as_json(table))
    write_between_marks(docs / "methods" / "table.md", f"{scenes} scenes, 20 steps.\n\n{markdown(table)}", MARK)
    (docs / "images" / "flow").mkdir(parents=True, exist_ok=True)
    for name, strip in pictures_by_editor(tasks[:SHOWN], made).items():
        strip.save(docs / "images" / "flow" / f"{name}.png", optimize=True)
    typer.echo(f"{(time.monotonic() - started) / 60:.1f} minutes; wrote {out}/flow_methods.json and {docs}")


if __name__ == "__main__":
    typer.run(main)
