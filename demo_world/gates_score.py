"""What gates and several attempts do on drawn faces: python -m demo_world.gates_score (or: make gates-score).

Drawn scenes in ten kinds of edits are edited as a job does it, gates included; the oracle, which gates do not see, says
which results are correct: every attribute that the edit should change did, and every other one stayed. Of the
kind that is hardest four attempts are made. Bounds were chosen by `--choose`, on scenes of another seed.

Cost: about two seconds of one core per edit, its reading included.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
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
from pipeline.models.allocator import keep_freed_memory
from pipeline.models.demo.world import Scene
from pipeline.models.loading import load_backbone
from pipeline.reading.prepare import HERE
from pipeline.recipe import Recipe, recipe_from
from pipeline.records import Asked, Decoded, Rejected
from pipeline.samples import Sample
from pipeline.writing.restoring import outcome_of
from pipeline.writing.rows import REASONS, OutputRow, encode_outcome

SEED, CHOSEN_ON = 12, 11  # of the scenes that are scored, and of those that bounds were chosen on
BEST_OF: dict[str, Any] = {  # other noise, another mask, another method; the one that changed most is kept
    "attempts": 4,
    "until": "budget",
    "rank_by": "edit_change",
    "vary": [
        {},
        {"editing": {"mask": "intersect", "keep_background": False}},
        {"editing": {"method": "cfg", "guidance_scale": 4.0}},
    ],
}
CALL_SIZE = 16
GATES: dict[str, Any] = {"preset": "pixels"}
MOST_FIGURES = ("mask_share", "change_inside", "edit_change", "rest_change", "background_psnr", "background_ssim")


def recipe_of(gates: dict[str, Any]) -> Recipe:
    """The demo's method on scenes that bring their edits."""
    return recipe_from(
        {
            "source": {"shards": "-"},
            "model": {"name": "demo"},
            "inversion": {"method": "ddpm", "num_steps": 20, "skip": 0.25},
            "editing": {"method": "ledits_pp", "mask": "steady", "keep_background": True},
            "gates": gates,
            "best_of": BEST_OF,
            "sink": {"folder": "-"},
        },
        "gates-score",
    )


class Maker:
    """Edits scenes as a unit of a job does: edited, restored, judged by gates, encoded."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.gates is not None, "the recipe above has gates"
        self.recipe, self.gate_seconds, self.seconds = recipe, 0.0, 0.0  # of the processor; the second of all
        self._gates = Gates(recipe.gates)
        self._engine = Engine(load_backbone(recipe.model, device="cpu"), call_size=CALL_SIZE)

    def __call__(self, asked: Sequence[Asked]) -> list[OutputRow | Rejected]:
        """Rows of everything that is asked."""
        began = time.process_time()
        rows = [self._row(result) for result in edit_rows(asked, self.recipe, self._engine, HERE)]
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


def best_of_some(maker: Maker, items: Sequence[Item]) -> tuple[float, float]:
    """Shares of scenes whose kept attempt is correct, and of those that have one."""
    kept = [
        row
        for row in best_of(asked_of_items(items), maker.recipe, maker)
        if not isinstance(row, Rejected) and row["chosen"]
    ]
    return sum(is_correct(row, items[row["index"]]) for row in kept) / len(items), len(kept) / len(items)


def of_kind(kind: str, count: int, seed: int) -> list[Item]:
    """Scenes of one kind."""
    return [item for item in items_of(count * len(KINDS), seed) if item.edit_type == kind]


def main(
    scenes: Annotated[int, typer.Option(min=10, help="Scenes of all kinds, edited once.")] = 120,
    tries: Annotated[int, typer.Option(min=1, help="Scenes of the hardest kind, tried four times.")] = 24,
    choose: Annotated[bool, typer.Option(help="Print figures of the scenes that bounds are chosen on.")] = False,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("build/gates.json"),
) -> None:
    """Print what gates keep, and write it as JSON."""
    torch.set_num_threads(1)
    keep_freed_memory()
    maker = Maker(recipe_of(GATES))
    made = made_once(maker, [*items_of(scenes, CHOSEN_ON if choose else SEED)])
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
    again = of_kind(kind, tries, SEED + 1)
    before = share([correct for _, _, correct in made_once(maker, again)])
    after, kept = best_of_some(maker, again)
    found = {
        "scenes": scenes,
        "seed": SEED,
        "correct_before": round(share([correct for _, _, correct in made]), 4),
        "correct_after": round(share([correct for _, _, correct in passed]), 4),
        "survival": round(len(passed) / len(made), 4),
        "hardest_kind": KINDS[kind].instruction,
        "hardest_scenes": len(again),
        "hardest_before": round(before, 4),
        "best_of_4": round(after, 4),
        "best_of_4_kept": round(kept, 4),
        "gates_share": round(maker.gates_share, 4),
    }
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    typer.run(main)
