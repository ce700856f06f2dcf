"""The demonstration: draw a small dataset, edit it with the bundled model by the real job, and show what came out.

OUTPUT/input/*.tar      drawn faces, as WebDataset shards; some bring an edit of their own
OUTPUT/face.png         one of them, for the README's lines of Python
OUTPUT/data/*.parquet   the results, and beside them run.json, summary.json, report.html
OUTPUT/overview.png     input, mask and edit of a few images
"""

from __future__ import annotations

import io
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from pipeline.common.showing import about_path, describe
from pipeline.errors import SinkError
from pipeline.looking.report.cards import concept_chip
from pipeline.looking.report.thumbnails import SheetEntry, contact_sheet, small_mask, small_rgb
from pipeline.looking.results import ResultRef, RunFolder, StoredResult
from pipeline.models.demo.shards import demo_sample, write_demo_shards
from pipeline.recipe import Recipe, recipe_from
from pipeline.running.driver import run
from pipeline.settings import shipped
from pipeline.writing.files import put
from pipeline.writing.summary import Summary

SHARD_SIZE = 12  # images per tar: a small demonstration still has more than one
OVERVIEW_ENTRIES = 6
SETTINGS: dict[str, Any] = yaml.safe_load(shipped.text("demo"))


def demo_recipe(output: Path, engine: Literal["ray", "local"] = "ray") -> Recipe:
    """The demonstration's recipe, configs/demo.yaml, into a folder; both engines write the same bytes."""
    return recipe_from(
        {
            **SETTINGS,
            "source": {"shards": str(output / "input" / "*.tar")},
            "sink": {"folder": str(output)},
            "run": {**SETTINGS["run"], "engine": engine},
        },
        "demo",
    )


def run_demo(output: Path, images: int) -> Summary:
    """Draw, edit, report. Where the output is finished already there is nothing left to do, and that is no error.

    Raises:
        SinkError: the folder cannot be written, or holds a demonstration with another number of images.
    """
    try:
        draw_input(output, images)
    except (OSError, tarfile.TarError) as error:
        reason = (about_path(error) if isinstance(error, OSError) else None) or describe(error)
        raise SinkError(f"{output} cannot hold the demonstration: {reason}. Give another --output") from error
    recipe = demo_recipe(output, engine="ray" if find_spec("ray") else "local")
    summary = run(recipe)
    write_overview(recipe)
    return summary


def draw_input(output: Path, images: int) -> None:
    """Draw the shards, unless a run has begun on them: it must find what it began with."""
    folder = output / "input"
    if not (output / "run.json").exists():
        write_demo_shards(folder, images, shard_size=SHARD_SIZE)
        (output / "face.png").write_bytes(demo_sample(0)["png"])
        return
    there = sum(_captions_in(path) for path in folder.glob("*.tar"))
    if there != images:
        raise SinkError(
            f"{output} holds a demonstration of {there} images, and {images} are asked for. Give another --output, "
            f"--images {there}, or remove the folder"
        )


def _captions_in(path: Path) -> int:
    with tarfile.open(path) as tar:
        return sum(name.endswith(".txt") for name in tar.getnames())


def write_overview(recipe: Recipe) -> None:
    """Write overview.png beside the report."""
    folder = RunFolder(recipe.sink)
    results = folder.load(pick(folder.figures(folder.spans("data")), OVERVIEW_ENTRIES))
    out = io.BytesIO()
    contact_sheet([entry_of(result) for result in results]).save(out, "PNG", optimize=True)
    put(folder.fs, f"{folder.root}/overview.png", out.getvalue())


def pick(refs: list[ResultRef], number: int) -> list[ResultRef]:
    """A few results that show the variety: different edits by turns, of different images."""
    by_edit: dict[str, list[ResultRef]] = {}
    for ref in refs:
        by_edit.setdefault(ref.edit, []).append(ref)
    chosen: list[ResultRef] = []
    for turn in range(max(map(len, by_edit.values()), default=0)):
        for members in by_edit.values():
            fresh = [ref for ref in members if ref.id not in {one.id for one in chosen}]
            if turn < len(members) and fresh and len(chosen) < number:
                chosen.append(fresh[0])
    return chosen


def entry_of(result: StoredResult) -> SheetEntry:
    """One result as a row of the contact sheet."""
    chips = [concept_chip(concept) for concept in result.request["concepts"]]
    return SheetEntry(
        original=small_rgb(result.input),
        mask=None if result.mask is None else np.asarray(small_mask(result.mask)),
        edited=small_rgb(result.image),
        label=", ".join(f"{'−' if chip['minus'] else '+'} {chip['prompt']}" for chip in chips),
    )
