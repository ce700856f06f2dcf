"""What the study of concepts (concepts_score.py) has in common: scenes, their prompts, its runs, their images."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from demo_world.scoring import Pixels
from pipeline.models.demo.networks import IMAGE_SIZE
from pipeline.models.demo.world import Attribute, Scene, object_phrases, with_article
from pipeline.recipe import Recipe, recipe_from

STEPS = 10
GUIDANCE_SCALE = 4.0


def scenes_of(count: int, seed: int) -> list[Scene]:
    """Scenes of one part of the study."""
    rng = np.random.default_rng([seed, 4_711])
    return [Scene.random(rng) for _ in range(count)]


def described(scene: Scene, without: Attribute | None = None) -> str:
    """A caption of everything that a scene shows, but one attribute, which is left to the model."""
    adjectives = {"face_shape": scene.face_shape, "face_color": scene.face_color}
    text = with_article(" ".join([*(word for name, word in adjectives.items() if name != without), "face"]))
    objects = [name for name in ("sunglasses", "hat", "beard") if getattr(scene, name)]
    phrases = dict(zip(("mouth", *objects), object_phrases(scene, bare_hat=False), strict=True))
    extras = [phrase for name, phrase in phrases.items() if name != without]
    if extras:
        text += f" with {' and '.join(extras)}"
    return text if without == "background" else f"{text} on a {scene.background} background"


def write_rows(folder: Path, name: str, edits: Sequence[Mapping[str, Any]]) -> Path:
    """A shard whose rows bring edits, over blank images.

    Noise follows from a row's id, which holds the shard's name: rows of one name and number start alike.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blank = io.BytesIO()
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (127, 127, 127)).save(blank, "PNG")
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for number, edit in enumerate(edits):
            for kind, data in (("png", blank.getvalue()), ("json", json.dumps({"edits": edit}).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{kind}")
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


def images_of(folder: Path) -> dict[int, dict[str, Pixels]]:
    """Results of a run, by number of the row and name of the edit; rows that failed are not there."""
    found: dict[int, dict[str, Pixels]] = {}
    for path in sorted((folder / "data").glob("*.parquet")):
        for row in pq.read_table(path, columns=["id", "edit", "image"]).to_pylist():
            pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
            found.setdefault(int(row["id"].rpartition("/")[2]), {})[row["edit"]] = pixels
    return found
