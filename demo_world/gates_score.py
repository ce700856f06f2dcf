"""What gates and several attempts do on drawn faces: python -m demo_world.gates_score (or: make gates-score).

Drawn scenes in ten kinds of edits are edited as a job does it, gates included; the oracle, which gates do not see, says
which results are correct: every attribute that the edit should change did, and every other one stayed. Of the
kind that is hardest four attempts are made, of which `denoise_gain` keeps one; what other figures would have kept is
told beside it. Bounds and attempts were chosen by `--choose`, on scenes of another seed.

Cost: about two seconds of one core per edit, its reading included, and half as much again where `denoise_gain` is
measured.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from demo_world.oracle import read
from pipeline.best_of import best_of
from pipeline.engine.engine import Engine
from pipeline.evaluation.benchmarks.drawn import KINDS, items_of
from pipeline.evaluation.items import Item
from pipeline.flow import edit_rows
from pipeline.gating.gate import Gates
from pipeline.gating.inverting import KeptInversions
from pipeline.models.allocator import keep_freed_memory
from pipeline.models.demo.world import Scene
from pipeline.models.loading import load_backbone
from pipeline.reading.prepare import HERE
from pipeline.recipe import Recipe, recipe_from
from pipeline.records import Asked, Decoded, Rejected
from pipeline.samples import Sample
from pipeline.writing.restoring import outcome_of
from pipeline.writing.rows import REASONS, OutputRow, encode_outcome

# Of the scenes that are scored, of those that are tried several times, and of those that bounds were chosen on. 120
# scenes of one seed tell a share to 4 points.
SEEDS, TRIED, CHOSEN_ON = (12, 14, 15), 13, 11
VARY: tuple[dict[str, Any], ...] = (  # a method without a mask, that reads both prompts; other noise; both
    {"inversion": {"skip": 0.1}, "editing": {"method": "cfg", "guidance_scale": 4.0}},
    {},
    {"inversion": {"skip": 0.1}, "editing": {"method": "cfg", "guidance_scale": 6.0}},
)
BEST_OF: dict[str, Any] = {  # ranked by the default: denoise_gain
    "attempts": 4,
    "until": "budget",
    "vary": VARY,
}
RANKS = ("denoise_gain", "background_psnr", "change_inside", "edit_change")
"""Figures that could choose among attempts without another model."""
CALL_SIZE = 16
GATES: dict[str, Any] = {"preset": "pixels"}
# Without a mask, what edits a background cannot be told from what moves it: the alignment calls both unrelated.
GATES_OF_ATTEMPTS: dict[str, Any] = {"preset": "pixels", "align_corner_px": None}
MOST_FIGURES = ("mask_share", "change_inside", "edit_change", "rest_change", "background_psnr", "background_ssim")


def recipe_of(gates: dict[str, Any], best: dict[str, Any] | None = None) -> Recipe:
    """The demo's method on scenes that bring their edits, in one attempt or several."""
    several = {} if best is None else {"best_of": best}
    return recipe_from(
        several
        | {
            "source": {"shards": "-"},
            "model": {"name": "demo"},
            "inversion": {"method": "ddpm", "num_steps": 20, "skip": 0.25},
            "editing": {"method": "ledits_pp", "mask": "steady", "keep_background": True},
            "gates": gates,
            "sink": {"folder": "-"},
        },
        "gates-score",
    )


class Maker:
    """Edits scenes as a unit of a job does: edited, restored, judged by gates, encoded."""

    def __init__(self, recipe: Recipe, engine: Engine) -> None:
        assert recipe.gates is not None, "the recipe above has gates"
        self.recipe, self.gate_seconds, self.seconds = recipe, 0.0, 0.0  # of the processor; the second of all
        self._gates, self._engine, self._kept = Gates(recipe.gates), engine, KeptInversions(recipe)

    def __call__(self, asked: Sequence[Asked]) -> list[OutputRow | Rejected]:
        """Rows of everything that is asked."""
        began = time.process_time()
        results = edit_rows(asked, self.recipe, self._engine, HERE, kept=self._kept)
        rows = [self._row(result) for result in results]
        self.seconds += time.process_time() - began
        return rows

    @property
    def gates_share(self) -> float:
        """Processor time of the gates over that of editing, restoring and encoding without them."""
        return self.gate_seconds / (self.seconds - self.gate_seconds)

    def _row(self, result: Decoded | Rejected) -> OutputRow | Rejected:
        outcome = outcome_of(result)
        if not isinstance(outcome, Rejected):
            began = time.process_time()
            outcome = self._gates(outcome)
            self.gate_seconds += time.process_time() - began
        return encode_outcome(outcome, self.recipe, self._engine.backbone.record, CALL_SIZE)


def asked_of_items(items: Sequence[Item]) -> list[Asked]:
    """Scenes as rows of a job."""
    return [asked_of_item(item, index) for index, item in enumerate(items)]


def asked_of_item(item: Item, index: int) -> Asked:
    """A scene as the row of that index."""
    assert item.image is not None, "drawn scenes are pictures"
    sample = Sample(id=item.key, shard="", key=item.key, index=index, image=item.image)
    return Asked(sample=sample, edits=("edit",), requests={"edit": item.request})


def is_correct(row: OutputRow, item: Item) -> bool:
    """Whether the oracle reads the drawn outcome, attribute by attribute."""
    pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
    return read(pixels) == Scene(**item.facts["after"]).attributes()


def made_once(maker: Maker, items: Sequence[Item]) -> list[tuple[Item, OutputRow, bool]]:
    """Every scene's first attempt, and whether it is correct.

    Raises:
        RuntimeError: one could not be made; the demo model must edit all of them.
    """
    found = []
    for row in maker(asked_of_items(items)):
        if isinstance(row, Rejected):
            raise RuntimeError(f"{row.sample.key} could not be edited: {row.message}")
        item = items[row["index"]]
        found.append((item, row, is_correct(row, item)))
    return found


def share(values: Sequence[bool]) -> float:
    """Of those that are true; 0 of none."""
    return sum(values) / len(values) if values else 0.0


def hardest(made: Sequence[tuple[Item, OutputRow, bool]]) -> str:
    """The kind with the fewest correct results."""
    return min(KINDS, key=lambda kind: share([correct for item, _, correct in made if item.edit_type == kind]))


@dataclass(frozen=True, slots=True)
class Tried:
    """All attempts at one scene, and which are correct."""

    rows: Sequence[OutputRow]
    correct: Sequence[bool]

    def kept_by(self, figure: str) -> int | None:
        """The passing attempt with the most of a figure, the earlier of equal ones; None where none passes."""
        passing = [at for at, row in enumerate(self.rows) if not row[REASONS]]
        return max(
            passing, key=lambda at: -math.inf if (value := self.rows[at][figure]) is None else value, default=None
        )

    def is_correct_by(self, figure: str) -> bool:
        """Whether what that figure keeps is correct."""
        kept = self.kept_by(figure)
        return kept is not None and self.correct[kept]


def tried(maker: Maker, items: Sequence[Item]) -> list[Tried]:
    """Every scene in all attempts, in their order."""
    by_scene: dict[int, list[OutputRow]] = {}
    for row in best_of(asked_of_items(items), maker.recipe, maker):
        if not isinstance(row, Rejected):
            by_scene.setdefault(row["index"], []).append(row)
    found = []
    for index, rows in by_scene.items():
        rows.sort(key=lambda row: row["attempt"])
        found.append(Tried(rows, [is_correct(row, items[index]) for row in rows]))
    return found


def best_of_figures(some: Sequence[Tried]) -> dict[str, float]:
    """What several attempts come to: shares of scenes. `best_of_4` is what the recipe itself kept."""
    chosen = [one.correct[at] for one in some for at, row in enumerate(one.rows) if row["chosen"]]
    return {
        "hardest_before": share([one.correct[0] for one in some]),
        "hardest_possible": share([any(one.correct) for one in some]),
        "best_of_4": sum(chosen) / len(some),
        "best_of_4_kept": len(chosen) / len(some),
        **{f"best_of_4_by_{name}": share([one.is_correct_by(name) for one in some]) for name in RANKS},
    }


def of_kind(kind: str, count: int, seed: int) -> list[Item]:
    """Scenes of one kind."""
    return [item for item in items_of(count * len(KINDS), seed) if item.edit_type == kind]


def main(
    scenes: Annotated[int, typer.Option(min=10, help="Scenes of all kinds, edited once, of each seed.")] = 120,
    tries: Annotated[int, typer.Option(min=1, help="Scenes of the hardest kind, tried four times.")] = 24,
    choose: Annotated[bool, typer.Option(help="Print figures of the scenes that bounds are chosen on.")] = False,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("build/gates.json"),
) -> None:
    """Print what gates keep, and write it as JSON."""
    torch.set_num_threads(1)
    keep_freed_memory()
    engine = Engine(load_backbone(recipe_of(GATES).model, device="cpu"), call_size=CALL_SIZE)
    maker = Maker(recipe_of(GATES), engine)
    seeds = (CHOSEN_ON,) if choose else SEEDS
    made = [one for seed in seeds for one in made_once(maker, [*items_of(scenes, seed)])]
    out.parent.mkdir(parents=True, exist_ok=True)
    if choose:
        rows = [
            {"kind": item.edit_type, "correct": correct, "rejected": row[REASONS]}
            | {name: row[name] for name in (*MOST_FIGURES, "align_corner_px", "align_verdict")}
            for item, row, correct in made
        ]
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"figures of {len(rows)} scenes of seed {CHOSEN_ON} are in {out}")
        return
    passed = [one for one in made if not one[1][REASONS]]
    kind = hardest(made)
    again = tried(Maker(recipe_of(GATES_OF_ATTEMPTS, BEST_OF), engine), of_kind(kind, tries, TRIED))
    found = {
        "scenes": len(made),
        "seeds": SEEDS,
        "correct_before": round(share([correct for _, _, correct in made]), 4),
        "correct_after": round(share([correct for _, _, correct in passed]), 4),
        "survival": round(len(passed) / len(made), 4),
        "hardest_kind": KINDS[kind].instruction,
        "hardest_scenes": len(again),
        **{name: round(value, 4) for name, value in best_of_figures(again).items()},
        "gates_share": round(maker.gates_share, 4),
    }
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    typer.run(main)
