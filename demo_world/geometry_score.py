"""What the latent basis does on drawn scenes: python -m demo_world.geometry_score (or: make geometry-score).

Two questions. Do directions near pure noise change one attribute of a face, as the oracle reads it, and later ones
less? And how does the geometry of the bases compare with what the paper finds (arXiv 2307.12868, section 5)? Writes
build/geometry.json, the figures beside it, and the pictures of docs/methods/riemannian.md.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from demo_world.oracle import read
from demo_world.scoring import Pixels, fresh_scenes
from pipeline.editor import Editor
from pipeline.models.demo.networks import IMAGE_SIZE
from pipeline.models.demo.world import Attribute, Scene, draw
from pipeline.recipe import Recipe, recipe_from
from pipeline.running.driver import run
from pipeline.settings.configuration import config_from
from pipeline.studies.config import GeometryConfig
from pipeline.studies.geometry import compare

SEED = 5  # of the scenes; strengths were chosen on others
STEPS = 20
VECTORS = 4
STRENGTHS = (4, 8)  # moves, in both ways
TOLERANCE = 1e-2  # of the bases, in radians; distances between them are of the order of 1
TIMES = (0.9, 0.5)  # of the edits
LEVELS = (0.9, 0.7, 0.5, 0.3)  # of the bases
PROMPTED = 4  # scenes whose bases are found under prompts, too
PROMPTS = {"red_hat": "a face with a red hat", "black_hat": "a face with a black hat"}
FIGURES = ("distance_by_timestep", "distance_by_gap", "distance_by_prompt", "spectrum_by_timestep")
CELL, MARGIN = 64, 4  # pixels of the picture


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedScene:
    """What came of one scene at one level."""

    changed: Mapping[str, Sequence[Attribute]]  # attributes that differ from the unmoved image, by result

    @property
    def single(self) -> list[str]:
        """Results in which exactly one attribute differs."""
        return [name for name, found in self.changed.items() if len(found) == 1]


def editing(edit_time: float) -> dict[str, Any]:
    """The editor's settings, of edits and bases."""
    return {"method": "riemannian", "num_vectors": VECTORS, "tolerance": TOLERANCE, "edit_time": edit_time}


def edit_recipe(edit_time: float) -> Recipe:
    """Every vector, both ways, at several strengths, and the unmoved image; under the empty prompt, as in the paper."""
    strengths = [0, *(sign * count for count in STRENGTHS for sign in (1, -1))]
    return recipe_from(
        {
            "source": {"shards": "-"},
            "edits": {"d": {"direction": {"vectors": list(range(VECTORS)), "strengths": strengths}}},
            "inversion": {"method": "ddim", "num_steps": STEPS},
            "editing": editing(edit_time),
            "sink": {"folder": "-"},
        },
        "geometry score",
    )


def move(editor: Editor, scenes: Sequence[Scene], edit_time: float) -> tuple[list[MovedScene], list[dict[str, Pixels]]]:
    """All scenes at one level: what changed, and the images by result."""
    recipe = edit_recipe(edit_time)
    judged, images = [], []
    for number, scene in enumerate(scenes):
        results = editor.edit_many(draw(scene, IMAGE_SIZE), recipe, name=str(number))
        made = {name: np.asarray(one.image.convert("RGB")) for name, one in zip(recipe.edits, results, strict=True)}
        found = {name: read(pixels) for name, pixels in made.items()}
        unmoved = found["d-v0+0"]
        changed = {
            name: [attribute for attribute in unmoved if one[attribute] != unmoved[attribute]]
            for name, one in found.items()
            if not name.endswith("+0")
        }
        judged.append(MovedScene(changed=changed))
        images.append(made)
        print(f"  {edit_time:g} T, scene {number}: {', '.join(judged[-1].single) or 'no single attribute'}")
    return judged, images


def write_scenes(folder: Path, scenes: Sequence[Scene]) -> None:
    """The scenes as a shard."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "scenes.tar", "w") as tar:
        for number, scene in enumerate(scenes):
            drawn = io.BytesIO()
            Image.fromarray(draw(scene, IMAGE_SIZE)).save(drawn, "PNG")
            member = tarfile.TarInfo(f"{number:03d}.png")
            member.size = drawn.tell()
            drawn.seek(0)
            tar.addfile(member, drawn)


def basis_recipe(place: Path, prompts: Mapping[str, str]) -> Recipe:
    """Bases of the scenes in a folder, at every level."""
    return recipe_from(
        {
            "job": "basis",
            "source": {"shards": str(place / "in")},
            "edits": {name: {"target_prompt": prompt} for name, prompt in prompts.items()},
            "methods": {
                f"t{level:g}".replace(".", "_"): {
                    "inversion": {"method": "ddim", "num_steps": STEPS},
                    "editing": editing(level),
                }
                for level in LEVELS
            },
            "sink": {"folder": str(place / "bases")},
            "run": {"engine": "local", "call_size": 32},
        },
        "geometry score",
    )


def compared(scenes: Sequence[Scene], out: Path) -> dict[str, Any]:
    """The geometry of their bases: by the commands' own functions, in a folder that goes when it is done."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for name, some, prompts in (("all", scenes, {"none": ""}), ("prompted", scenes[:PROMPTED], PROMPTS)):
            write_scenes(place / name / "in", some)
            recipe = basis_recipe(place / name, prompts)
            run(recipe, progress="off")
        directions = {
            f"v{vector}-{level}": {"id": "scenes.tar/000", "edit": "none", "method": level, "vector": vector}
            for level in recipe.methods
            for vector in range(VECTORS)
        }
        config = {
            "bases": [str(place / name / "bases") for name in ("all", "prompted")],
            "directions": directions,
            "sink": {"folder": str(place / "geometry")},
        }
        summary = compare(config_from(GeometryConfig, config)).summary
        assert summary is not None, "nothing is left to others"
        for figure in (place / "geometry").glob("*.png"):
            (out / figure.name).write_bytes(figure.read_bytes())
    return summary


def picture(scenes: Sequence[Scene], images: Sequence[Mapping[str, Pixels]]) -> Image.Image:
    """Of a few scenes: the input, the unmoved image, and every vector both ways at one strength."""
    strength = STRENGTHS[1]
    columns = ["d-v0+0", *(f"d-v{v}{sign * strength:+d}" for v in range(VECTORS) for sign in (-1, 1))]
    pitch = CELL + MARGIN
    sheet = Image.new("RGB", (MARGIN + pitch * (1 + len(columns)), 18 + pitch * len(scenes)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    heads = ["input", "unmoved", *(f"v{v} {'-' if sign < 0 else '+'}" for v in range(VECTORS) for sign in (-1, 1))]
    for column, head in enumerate(heads):
        pen.text((MARGIN + pitch * column, 2), head, "black", font)
    for line, (scene, made) in enumerate(zip(scenes, images, strict=True)):
        shown = [draw(scene, IMAGE_SIZE), *(made[name] for name in columns)]
        for column, pixels in enumerate(shown):
            cell = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(cell, (MARGIN + pitch * column, 18 + pitch * line))
    return sheet.quantize(256, dither=Image.Dither.NONE)


def figures(out: Path) -> Image.Image:
    """The plots of `shardedit geometry` in one picture, two by two."""
    plots = [Image.open(out / f"{name}.png").convert("RGB") for name in FIGURES]
    width, height = (max(sizes) for sizes in zip(*(plot.size for plot in plots), strict=True))
    sheet = Image.new("RGB", (2 * width, 2 * height), "white")
    for number, plot in enumerate(plots):
        sheet.paste(plot, (number % 2 * width, number // 2 * height))
    return sheet.quantize(256, dither=Image.Dither.NONE)


def write(found: Mapping[str, Any], out: Path) -> None:
    """What has been found so far."""
    (out / "geometry.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(
    scenes: Annotated[int, typer.Option(min=2, help="Drawn scenes.")] = 12,
    model: Annotated[str, typer.Option(help="'demo', or a folder with a model of the same world.")] = "demo",
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes.")] = SEED,
    out: Annotated[Path, typer.Option(help="Folder of geometry.json and the figures.")] = Path("build"),
    docs: Annotated[
        Path, typer.Option(help="Whose images/methods/riemannian.png and geometry.png are written.")
    ] = Path("docs"),
) -> None:
    """Move drawn scenes along their bases, compare these, and print what was found."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    drawn = fresh_scenes(scenes, seed)
    found: dict[str, Any] = {"scenes": scenes, "seed": seed, "edits": {}}
    with Editor.load(model) as editor:
        for edit_time in TIMES:
            judged, images = move(editor, drawn, edit_time)
            hits = [one.single for one in judged]
            found["edits"][f"{edit_time:g}"] = {
                "scenes_with_a_single_attribute": sum(map(bool, hits)),
                "scenes": [asdict(one) for one in judged],
            }
            write(found, out)
            print(
                f"at {edit_time:g} T: a result with exactly one attribute changed on {sum(map(bool, hits))} of {scenes}"
            )
            if edit_time == TIMES[0]:
                (docs / "images" / "methods").mkdir(parents=True, exist_ok=True)
                picture(drawn[:4], images[:4]).save(docs / "images" / "methods" / "riemannian.png")
    found["geometry"] = compared(drawn, out)
    write(found, out)
    figures(out).save(docs / "images" / "methods" / "geometry.png")
    for row in found["geometry"]["samples"]:
        print(f"t {row['timestep']:g}: distance {row['distance']:.3f} between samples, kept {row['kept']:.3f}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes; wrote {out}/geometry.json")


if __name__ == "__main__":
    typer.run(main)
