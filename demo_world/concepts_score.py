"""The chain of sparse autoencoders on the drawn world: python -m demo_world.concepts_score (or: make concepts-score).

Collect, train, label, predict the layout, intervene: by the commands' own functions, seeds fixed. Writes
build/concepts.json and the picture of docs/methods/concepts.md. What is done stands in build/concepts and is not done
again: remove that folder to begin anew.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import typer
from PIL import Image, ImageDraw, ImageFont

from demo_world.oracle import VALUES, read
from pipeline.models.demo.networks import IMAGE_SIZE
from pipeline.models.demo.world import Attribute, Scene, object_phrases, with_article
from pipeline.recipe import Recipe, recipe_from
from pipeline.running.driver import run
from pipeline.studies.sae.config import LabelConfig, LayoutConfig, TrainConfig, config_from
from pipeline.studies.sae.labelling import label
from pipeline.studies.sae.layout import compare_layouts
from pipeline.studies.sae.training import train

STEPS = 20
GUIDANCE_SCALE = 4.0
BLOCKS = (
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
)
TIMES = (1.0, 0.5, 0.0)
LABELS = "demo_world.concept_labels:drawn_regions"
WINDOWS = {"early": (0.0, 0.3), "middle": (0.3, 0.7), "late": (0.7, 1.0), "all": (0.0, 1.0)}
CELL = 96  # pixels of the picture


def described(scene: Scene, without: Attribute | None = None) -> str:
    """A caption that leaves one attribute to the model."""
    words = [
        word for name, word in (("face_shape", scene.face_shape), ("face_color", scene.face_color)) if name != without
    ]
    text = with_article(" ".join([*words, "face"]))
    phrases = dict(zip(("mouth", *_objects(scene)), object_phrases(scene, bare_hat=False), strict=True))
    extras = [phrase for name, phrase in phrases.items() if name != without]
    if extras:
        text += f" with {' and '.join(extras)}"
    return text if without == "background" else f"{text} on a {scene.background} background"


def _objects(scene: Scene) -> list[str]:
    return [name for name in ("sunglasses", "hat", "beard") if getattr(scene, name)]


def scenes_of(count: int, seed: int) -> list[Scene]:
    """Scenes of one part of the study."""
    rng = np.random.default_rng([seed, 4_711])
    return [Scene.random(rng) for _ in range(count)]


def write_rows(folder: Path, edits: Sequence[Mapping[str, Any]]) -> Path:
    """A shard whose rows bring edits, over blank images."""
    folder.mkdir(parents=True, exist_ok=True)
    blank = io.BytesIO()
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (127, 127, 127)).save(blank, "PNG")
    with tarfile.open(folder / "scenes.tar", "w") as tar:
        for number, edit in enumerate(edits):
            for name, data in (("png", blank.getvalue()), ("json", json.dumps({"edits": edit}).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def recipe_of(source: Path, out: Path, **editing: Any) -> Recipe:
    """A run over rows with edits of their own."""
    return recipe_from(
        {
            "source": {"shards": str(source)},
            "edits": {"target_prompt": "a face"},
            "model": {"name": "demo"},
            "inversion": {"method": "noise", "num_steps": STEPS},
            "editing": {"method": "concepts", "guidance_scale": GUIDANCE_SCALE, **editing},
            "sink": {"folder": str(out), "round_trip": False},
            "run": {"unit_size": 16, "call_size": 16, "engine": "local"},
        },
        "concepts score",
    )


def collect(work: Path, name: str, scenes: Sequence[Scene], positions: int | None) -> Path:
    """Sample scenes and record; what is there is not done again."""
    rows = write_rows(work / f"{name}_rows", [{"plain": {"target_prompt": described(scene)}} for scene in scenes])
    record = {"blocks": list(BLOCKS), "times": list(TIMES), "positions": positions}
    run(recipe_of(rows, work / name, record=record), progress="off")
    return work / name


def images_of(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """Pixels by id and edit."""
    found = {}
    for path in sorted((folder / "data").glob("*.parquet")):
        for row in pq.read_table(path, columns=["id", "edit", "image"]).to_pylist():
            found[row["id"], row["edit"]] = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
    return found


def value_of(scene: Mapping[Attribute, Any], attribute: Attribute) -> str:
    """The name of the concept that a scene has of an attribute."""
    return f"{attribute}: {scene[attribute]}"


def other_value(attribute: Attribute, value: Any, number: int) -> Any:
    """Another value, in turn."""
    others = [one for one in VALUES[attribute] if one != value]
    return others[number % len(others)]


def swap(attribute: Attribute, before: Any, after: Any, window: Sequence[float], strength: float) -> dict[str, Any]:
    """The wanted value for the one that is there, where that is predicted."""
    return {
        "add": [f"{attribute}: {after}"],
        "remove": [f"{attribute}: {before}"],
        "region": "predicted",
        "strength": strength,
        "window": list(window),
    }


def place_sunglasses(window: Sequence[float], strength: float) -> dict[str, Any]:
    """Onto the eyes of a face in the middle."""
    return {"add": ["sunglasses"], "region": [0.22, 0.4, 0.78, 0.58], "strength": strength, "window": list(window)}


def judged(
    before: Mapping[Attribute, Any], after: Mapping[Attribute, Any], attribute: Attribute, wanted: Any
) -> tuple[bool, float]:
    """Whether the attribute became what was wanted, and the share of the others that changed."""
    others = [name for name in before if name != attribute]
    return after[attribute] == wanted, float(np.mean([before[name] != after[name] for name in others]))


def reach(work: Path, library: Path, scenes: Sequence[Scene], strengths: Mapping[str, float]) -> dict[str, Any]:
    """Place, style and colour in early, middle and late windows: success and collateral of each.

    The edited attribute is left out of the prompt: first every scene is sampled without an intervention, and read.
    """
    kinds: tuple[Attribute, ...] = ("background", "face_color", "sunglasses")
    found: dict[str, Any] = {}
    for kind in kinds:
        some = [Scene(**{**_fields(scene), "sunglasses": False}) if kind == "sunglasses" else scene for scene in scenes]
        prompts = [described(scene, kind) for scene in some]
        plain_rows = write_rows(work / f"{kind}_plain_rows", [{"plain": {"target_prompt": one}} for one in prompts])
        run(recipe_of(plain_rows, work / f"{kind}_plain"), progress="off")
        plain = [read(pixels) for _, pixels in sorted(images_of(work / f"{kind}_plain").items())]
        edits, wanted = [], []
        for number, (prompt, was) in enumerate(zip(prompts, plain, strict=True)):
            target = True if kind == "sunglasses" else other_value(kind, was[kind], number)
            wanted.append(target)
            edits.append(
                {
                    name: {
                        "target_prompt": prompt,
                        "interventions": [
                            place_sunglasses(window, strengths[kind])
                            if kind == "sunglasses"
                            else swap(kind, was[kind], target, window, strengths[kind])
                        ],
                    }
                    for name, window in WINDOWS.items()
                }
            )
        rows = write_rows(work / f"{kind}_rows", edits)
        run(recipe_of(rows, work / kind, autoencoders=str(library), reach=0.3), progress="off")
        images = images_of(work / kind)
        ids = sorted({name for name, _ in images})
        for window in WINDOWS:
            results = [
                judged(plain[int(name.rpartition("/")[2])], read(images[name, window]), kind, wanted[int(name[-4:])])
                for name in ids
                if (name, window) in images
            ]
            found[f"{kind}.{window}"] = {
                "success": float(np.mean([done for done, _ in results])) if results else None,
                "collateral": float(np.mean([share for _, share in results])) if results else None,
                "images": len(results),
            }
    return found


def _fields(scene: Scene) -> dict[str, Any]:
    return {name: getattr(scene, name) for name in scene.__dataclass_fields__}


def picture(work: Path) -> Image.Image:
    """Rows: without an intervention, and each window; for a background, a face colour and sunglasses."""
    kinds = ("background", "face_color", "sunglasses")
    columns = ("plain", *WINDOWS)
    sheet = Image.new("RGB", (CELL * len(columns), (CELL + 16) * len(kinds)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, kind in enumerate(kinds):
        plain, written = images_of(work / f"{kind}_plain"), images_of(work / kind)
        name = sorted({one for one, _ in written})[row]
        for column, window in enumerate(columns):
            pixels = plain[name, "plain"] if window == "plain" else written.get((name, window))
            if pixels is None:
                continue
            place = (column * CELL, row * (CELL + 16))
            sheet.paste(
                Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.LANCZOS), (place[0], place[1] + 16)
            )
            pen.text((place[0] + 3, place[1] + 2), f"{kind}: {window}" if not column else window, "black", font)
    return sheet


def main(
    scenes: Annotated[int, typer.Option(help="That are learnt from.")] = 160,
    labelled: Annotated[int, typer.Option(help="Whose features are named.")] = 80,
    fresh: Annotated[int, typer.Option(help="By which layouts are judged.")] = 40,
    edited: Annotated[int, typer.Option(help="That are intervened on.")] = 20,
    vectors: Annotated[int, typer.Option(help="Vectors that are learnt from.")] = 200_000,
    features: Annotated[int, typer.Option(help="Of an autoencoder.")] = 512,
    strength: Annotated[float, typer.Option(help="Of all interventions.")] = 1.0,
    out: Annotated[Path, typer.Option(help="Where work and figures go.")] = Path("build"),
) -> None:
    """Run the chain, print and write its figures."""
    work, began = out / "concepts", time.monotonic()
    took: dict[str, float] = {}

    def lap(name: str) -> None:
        took[name] = round(time.monotonic() - began - sum(took.values()), 1)
        print(f"{name}: {took[name]} s", flush=True)

    learnt = collect(work, "learnt", scenes_of(scenes, 1), 64)
    whole = collect(work, "labelled", scenes_of(labelled, 2), None)
    judged_by = collect(work, "fresh", scenes_of(fresh, 3), None)
    lap("collect")
    library = work / "library"
    trained = train(
        config_from(
            TrainConfig,
            {
                "recordings": {"folders": str(learnt)},
                "autoencoder": {"num_features": features, "k": 10},
                "training": {
                    "vectors": vectors,
                    "batch_size": 512,
                    "learning_rate": 1e-3,
                    "shuffle_vectors": 16_384,
                    "dead_after": 50_000,
                    "aux_k": 64,
                    "held_out": 0.1,
                    "checkpoint_every": 200,
                },
                "sink": {"folder": str(library)},
            },
        )
    )
    lap("train")
    named = {"library": {"folder": str(library)}, "labels": LABELS}
    labels = label(config_from(LabelConfig, {"recordings": {"folders": str(whole)}, "set_size": 8, **named}))
    lap("label")
    layout = compare_layouts(
        config_from(
            LayoutConfig, {"recordings": {"folders": str(judged_by)}, "sink": {"folder": str(work / "layout")}, **named}
        )
    )
    lap("layout")
    strengths = dict.fromkeys(("background", "face_color", "sunglasses"), strength)
    reached = reach(work, library, scenes_of(edited, 4), strengths)
    lap("interventions")
    first, last = layout.by_time[0], layout.by_time[-1]
    variance = [one.explained_variance for one in trained.figures.values()]
    figures = {
        "explained_variance_least": min(variance),
        "explained_variance_mean": float(np.mean(variance)),
        "features_found": labels.found_by_one,
        "sets_found": labels.found_by_set,
        "tags": labels.tags,
        "layout_iou_first": first["concepts_iou"],
        "layout_iou_constant": first["constant_iou"],
        "layout_iou_last": last["concepts_iou"],
        "style_success": reached["background.middle"]["success"],
        "style_collateral": reached["background.middle"]["collateral"],
        "object_placed": reached["sunglasses.all"]["success"],
        "reach": reached,
        "layout": layout.by_time,
        "autoencoders": {name: one.explained_variance for name, one in trained.figures.items()},
        "seconds": took,
    }
    (out / "concepts.json").write_text(json.dumps(figures, indent=1) + "\n")
    picture(work).save(out / "concepts.png")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)
