"""Score the demo model on fresh scenes: python -m demo_world.score [--scenes 256] (or: make demo-score)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from demo_world.scoring import TARGETS, load_recipes, measure, table
from pipeline.models.loading import DEMO_FOLDER


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = DEMO_FOLDER,
    recipes: Annotated[Path, typer.Option(help="Folder with a recipe per kind of edit.")] = Path("configs/demo_edits"),
    scenes: Annotated[int, typer.Option(min=1, help="Scenes per figure.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("build/demo_score.json"),
) -> None:
    """Print a table of what the model can do, and write it as JSON."""
    print(f"{scenes} scenes per figure; half an hour for 256 of them on two cores", flush=True)

    def tell(name: str, figures: Mapping[str, float]) -> None:
        print(f"{name}: {', '.join(f'{figure} {value:.3g}' for figure, value in figures.items())}", flush=True)

    scores = measure(model, load_recipes(recipes), scenes, seed, workers, tell)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"scenes": scenes, "seed": seed, **scores}, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(scores)}")
    missed = [name for name, target in TARGETS.items() if scores[name] < target.at_least]
    print(f"below its target: {', '.join(missed)}" if missed else "every target is reached")


if __name__ == "__main__":
    typer.run(main)
