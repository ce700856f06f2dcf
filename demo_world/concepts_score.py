"""The chain of sparse autoencoders on the drawn world: python -m demo_world.concepts_score (or: make concepts-score).

Collect, train, label, predict the layout, intervene: by the commands' own functions, seeds fixed. Writes
build/concepts.json, build/concepts.png (the picture of docs/methods/concepts.md) and build/concepts_layout.png. What is
done stands in build/concepts and is not done again: remove that folder to begin anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, ImageDraw, ImageFont

from demo_world.concepts_reach import WINDOWS, Kind, Reached, write_kind
from demo_world.concepts_scenes import described, images_of, recipe_of, scenes_of, write_rows
from pipeline.models.demo.world import Attribute
from pipeline.running.driver import run
from pipeline.settings.configuration import config_from
from pipeline.studies.sae.config import LabelConfig, LayoutConfig, TrainConfig
from pipeline.studies.sae.labelling import Labelled, label
from pipeline.studies.sae.layout import Layout, compare_layouts
from pipeline.studies.sae.training import Trained, train

SEED = 1  # of the scenes; seeds from 11 on are for choosing settings by
BLOCKS = (
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
)
TIMES = (1.0, 0.5, 0.0)
LABELS = "demo_world.concept_labels:drawn_regions"
KINDS = (
    Kind(attribute="background", window="middle", strength=1.0),
    Kind(attribute="face_color", window="middle", strength=1.0, blocks=("up_blocks.1.attentions.0",)),
    Kind(attribute="sunglasses", window="first", strength=1.5, region=(0.1, 0.2, 0.9, 0.8), form="template"),
)
FACTORS = (0.5, 2.0)  # of a kind's own strength
STUDIED = 8  # scenes on which blocks and strengths are compared
CELL = 96  # pixels of the picture


def collect(work: Path, name: str, count: int, seed: int) -> Path:
    """Sample scenes and record whole maps; what is there is not done again."""
    edits = [{"plain": {"target_prompt": described(scene)}} for scene in scenes_of(count, seed)]
    rows = write_rows(work / f"{name}_rows", name, edits)
    record = {"blocks": list(BLOCKS), "times": list(TIMES), "positions": None}
    run(recipe_of(rows, work / name, record=record), progress="off")
    return work / name


def learn(recordings: Path, library: Path, vectors: int, features: int) -> Trained:
    """An autoencoder for each block and time."""
    return train(
        config_from(
            TrainConfig,
            {
                "recordings": {"folders": str(recordings)},
                "autoencoder": {"num_features": features, "k": 10},
                "training": {
                    "vectors": vectors,
                    "batch_size": 512,
                    "learning_rate": 1e-3,
                    "shuffle_vectors": 16_384,
                    "dead_after": 50_000,
                    "aux_k": 64,
                    "held_out": 0.2,
                    "checkpoint_every": 200,
                },
                "sink": {"folder": str(library)},
            },
        )
    )


def figures_of(
    trained: Trained, labelled: Labelled, layout: Layout, reached: Mapping[Attribute, Mapping[str, Reached]]
) -> dict[str, Any]:
    """What is reported."""
    first, last = layout.by_time[0], layout.by_time[-1]
    variance = {name: one.explained_variance for name, one in trained.figures.items()}
    own = {kind.attribute: reached[kind.attribute][f"window-{kind.window}"] for kind in KINDS}
    return {
        "explained_variance": min(variance.values()),
        "features_found": labelled.found_by_one,
        "sets_found": labelled.found_by_set,
        "tags": labelled.tags,
        "layout_iou_first": first["concepts_iou"],
        "layout_iou_constant": first["constant_iou"],
        "layout_iou_last": last["concepts_iou"],
        "layout_shown_iou_first": first["shown_iou"],
        "layout_shown_iou_constant": first["shown_constant_iou"],
        "layout_shown_iou_last": last["shown_iou"],
        "style_success": own["background"].success,
        "face_color_success": own["face_color"].success,
        "style_collateral": max(own["background"].worst, own["face_color"].worst),
        "object_placed": own["sunglasses"].success,
        "object_collateral": own["sunglasses"].worst,
        "explained_variance_of": variance,
        "layout": layout.by_time,
        "reach": {
            name: {variant: one.as_json() for variant, one in variants.items()} for name, variants in reached.items()
        },
    }


def picture(work: Path) -> Image.Image:
    """A row for each kind: without an intervention, then every window."""
    columns = ("plain", *WINDOWS)
    sheet = Image.new("RGB", (CELL * len(columns), (CELL + 16) * len(KINDS)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, kind in enumerate(KINDS):
        name = kind.attribute
        plain, written = images_of(work / f"{name}_plain"), images_of(work / name)
        number = min(written)
        cells = {"plain": plain[number]["plain"], **{one: written[number].get(f"window-{one}") for one in WINDOWS}}
        for column, window in enumerate(columns):
            pixels, left, top = cells[window], column * CELL, row * (CELL + 16)
            pen.text((left + 3, top + 2), window if column else name.replace("_", " "), "black", font)
            if pixels is not None:
                small = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.LANCZOS)
                sheet.paste(small, (left, top + 16))
    return sheet


def table(reached: Mapping[Attribute, Mapping[str, Reached]]) -> str:
    """Success, and the collateral of the attribute that has most, of every way to write every kind."""
    lines = ["| written | how | success | worst collateral | scenes |", "|---|---|---:|---:|---:|"]
    for name, variants in reached.items():
        for variant, one in variants.items():
            worst = max(one.collateral, key=lambda other: one.collateral[other])
            lines.append(f"| {name} | {variant} | {one.success:.0%} | {one.worst:.0%} ({worst}) | {one.scenes} |")
    return "\n".join(lines)


def main(
    scenes: Annotated[int, typer.Option(help="That are learnt from.")] = 160,
    labelled: Annotated[int, typer.Option(help="Whose features are named.")] = 100,
    fresh: Annotated[int, typer.Option(help="By which layouts are judged.")] = 40,
    edited: Annotated[int, typer.Option(help="That are intervened on.")] = 20,
    vectors: Annotated[int, typer.Option(help="Vectors that are learnt from.")] = 400_000,
    features: Annotated[int, typer.Option(help="Of an autoencoder.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the scenes.")] = SEED,
    out: Annotated[Path, typer.Option(help="Where work and figures go.")] = Path("build"),
) -> None:
    """Run the chain, print and write its figures."""
    work, began = out / "concepts", time.monotonic()
    took: dict[str, float] = {}

    def lap(name: str) -> None:
        took[name] = round(time.monotonic() - began - sum(took.values()), 1)
        print(f"{name}: {took[name]} s", flush=True)

    learnt, whole, judged_by = (
        collect(work, name, count, seed + number)
        for number, (name, count) in enumerate((("learnt", scenes), ("labelled", labelled), ("fresh", fresh)))
    )
    lap("collect")
    library = work / "library"
    trained = learn(learnt, library, vectors, features)
    lap("train")
    named = {"library": {"folder": str(library)}, "labels": LABELS}
    sizes = {"set_size": 8, "template_size": 32}
    labels = label(config_from(LabelConfig, {"recordings": {"folders": str(whole)}, **sizes, **named}))
    lap("label")
    sink = {"folder": str(work / "layout")}
    layout = compare_layouts(
        config_from(LayoutConfig, {"recordings": {"folders": str(judged_by)}, "sink": sink, **named})
    )
    lap("layout")
    some = scenes_of(edited, seed + 3)
    reached = {kind.attribute: write_kind(work, library, kind, some, STUDIED, BLOCKS, FACTORS) for kind in KINDS}
    lap("interventions")
    figures = {**figures_of(trained, labels, layout, reached), "seconds": took}
    (out / "concepts.json").write_text(json.dumps(figures, indent=1) + "\n")
    picture(work).save(out / "concepts.png")
    (out / "concepts_layout.png").write_bytes((work / "layout" / "layout.png").read_bytes())
    print(table(reached))
    print(json.dumps({name: one for name, one in figures.items() if name != "reach"}, indent=1))


if __name__ == "__main__":
    typer.run(main)
