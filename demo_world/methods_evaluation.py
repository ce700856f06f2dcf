"""All pairs of inversion and editor on drawn scenes, by `shardedit evaluate`: do measures rank them as the truth does?

    python -m demo_world.methods_evaluation --scenes 20

methods_table.py gives each editor the edit in its favourite words; here all methods get one request, as of a benchmark:
both prompts, the concepts and the blend words of ten kinds of edits. Writes docs/methods/evaluated.md; the run's folder
stays under build/ and goes on where it was ended. Cost: the network rows of the methods, and a tenth of a second per
result for reading it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy.stats import spearmanr

from demo_world.methods import (
    H_EDIT_SCALES,
    NUM_STEPS,
    h_edit_strength,
    method_of,
    valid_pairs,
    write_between_marks,
)
from pipeline.common.wording import count
from pipeline.evaluation.config import EvaluateConfig, evaluation_from
from pipeline.evaluation.job.run import evaluate
from pipeline.evaluation.tables import Tables, cell
from pipeline.recipe import Method

BEGIN = "<!-- written by `make methods-evaluation` -->"
TRUTH = ("success", "unchanged")  # what the oracle reads of a result
SHOWN = (*TRUTH, "truth_psnr", "psnr_unedit_part_area_normalised", "ssim_unedit_part", "mask_iou")
FEWEST = 5  # methods with a number from which ranks are compared


def evaluated(inversion: str, editor: str, steps: int) -> Method:
    """A pair as in methods_table.py; but h-Edit, which finds its place by itself there, gets a benchmark's words here.
    They act on attention, and say where the image may change."""
    method = method_of(inversion, editor, steps)
    if editor != "h_edit":
        return method
    scale = h_edit_strength(inversion) * max(H_EDIT_SCALES.values())
    changed = {**method.editing.model_dump(), "control": "prompt_to_prompt", "mask": "none", "guidance_scale": scale}
    return Method(inversion=method.inversion, editing=type(method.editing).model_validate(changed))


def configuration(pairs: Sequence[tuple[str, str]], scenes: int, steps: int, folder: Path) -> EvaluateConfig:
    """The evaluation of some pairs, in the order in which their names sort."""
    return evaluation_from(
        {
            "set": {"kind": "drawn", "count": scenes},
            "model": {"name": "demo"},
            "methods": {f"{pair[0]}+{pair[1]}": evaluated(*pair, steps) for pair in sorted(pairs)},
            "metrics": {"own": ["demo_world.figures:drawn"]},
            "statistics": {"measures": list(SHOWN)},
            "sink": {"folder": str(folder)},
            "run": {"unit_size": 5, "call_size": 16, "engine": "local"},
        }
    )


def agreements(tables: Tables) -> list[tuple[str, dict[str, float | None]]]:
    """Spearman's rank correlation, over methods, of every measure's mean with those of the truth's; None: too few
    methods have both, or all have the same."""
    return [
        (tables.measures[name].title, {truth: _correlation(tables, name, truth) for truth in TRUTH})
        for name in tables.measures
        if name not in TRUTH
    ]


def _correlation(tables: Tables, name: str, truth: str) -> float | None:
    means = [
        (tables.lines[name][method].own.mean_of_items, tables.lines[truth][method].own.mean_of_items)
        for method in tables.methods
    ]
    both = [pair for pair in means if None not in pair]
    if len(both) < FEWEST or any(len(set(some)) < 2 for some in zip(*both, strict=True)):
        return None
    found = float(spearmanr(np.array(both, dtype=float)).statistic)
    return found if tables.measures[name].higher_is_better is not False else -found


def page(tables: Tables) -> str:
    """The tables as the page shows them."""
    heads = ["method", "n", *(tables.measures[name].title for name in SHOWN if name in tables.measures)]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for method in tables.methods:
        cells = [cell(tables.lines[name][method].own, tables.measures[name]) for name in SHOWN if name in tables.lines]
        n = max(line[method].own.n for line in tables.lines.values())
        lines.append(f"| `{method}` | {n} of {tables.asked[method]} | {' | '.join(cells)} |")
    ranks = ["| measure | with success | with unchanged |", "|---|---:|---:|"]
    for title, found in agreements(tables):
        ranks.append(f"| {title} | {' | '.join(_shown(found[truth]) for truth in TRUTH)} |")
    return "\n".join([f"{tables.title}.", "", *lines, "", "Rank correlation over methods (Spearman):", "", *ranks, ""])


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main(
    scenes: Annotated[int, typer.Option(min=1, help="drawn images; ten kinds of edits take turns")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="sampling steps of every method")] = NUM_STEPS,
    pairs: Annotated[str, typer.Option(help="only these, as inversion+editor, separated by commas")] = "",
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("build/methods-evaluation"),
    docs: Annotated[Path, typer.Option(help="whose methods/evaluated.md is rewritten")] = Path("docs"),
) -> None:
    """Evaluate every pair of inversion and editor on drawn scenes."""
    named = [name.strip().partition("+") for name in pairs.split(",") if name.strip()]
    chosen = [(inversion, editor) for inversion, _, editor in named] or valid_pairs()
    if unknown := set(chosen) - set(valid_pairs()):
        raise typer.BadParameter(f"{', '.join('+'.join(pair) for pair in sorted(unknown))}: not among the valid pairs")
    done = evaluate(configuration(chosen, scenes, steps, out))
    path = docs / "methods" / "evaluated.md"
    write_between_marks(path, f"{count(steps, 'step')}. {page(done.tables)}", BEGIN)
    typer.echo(f"wrote {path} and {out}/evaluate/index.html")


if __name__ == "__main__":
    typer.run(main)
