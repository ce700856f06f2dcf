"""Demo data: WebDataset shards of drawn faces. The same arguments give the same bytes, as long as Pillow is the same.

No face wears sunglasses or a hat, so both can be added to all of them. Every fourth row brings an edit request of its
own, to show that rows may; the others take the job's. Images are PNG, every third one JPEG.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.models.demo.world import Mouth, Scene, caption, draw, edited

OWN_EDITS: dict[Mouth, dict[str, Any]] = {
    "smile": {"concepts": [{"prompt": "a frown"}]},
    "frown": {"concepts": [{"prompt": "a smile"}]},
    "straight": {"concepts": [{"prompt": "an open mouth"}]},
    "open": {"concepts": [{"prompt": "a smile"}]},
}


def write_demo_shards(folder: Path, count: int, seed: int = 0, shard_size: int = 16, size: int = 128) -> list[Path]:
    """Write `count` samples as tars of up to `shard_size` samples, and return their paths.

    A sample is `KEY.png` or `KEY.jpg`, its caption `KEY.txt`, and `KEY.json` with the drawn attributes under "scene"
    and, where the row has one, its edit request under "edit". Shards of the same names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard, start in enumerate(range(0, count, shard_size)):
        path = folder / f"faces-{shard:05d}.tar"
        # Plain members without owner and time: a tar of the same samples has the same bytes.
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(start, min(start + shard_size, count)):
                for name, data in demo_sample(index, seed, size).items():
                    member = tarfile.TarInfo(f"face-{index:06d}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        paths.append(path)
    return paths


def demo_scene(index: int, seed: int = 0) -> Scene:
    """The scene of one sample: a random face with neither sunglasses nor hat."""
    # A generator of its own for each sample: neither their number nor the shards' size changes one.
    return edited(Scene.random(np.random.default_rng([seed, index])), sunglasses=False, hat=None)


def demo_sample(index: int, seed: int = 0, size: int = 128) -> dict[str, bytes]:
    """The members of one sample, by the ending of their names."""
    scene = demo_scene(index, seed)
    picture = io.BytesIO()
    image_format = "jpg" if index % 3 == 2 else "png"
    if image_format == "jpg":
        Image.fromarray(draw(scene, size)).save(picture, "JPEG", quality=95, subsampling=0)
    else:
        Image.fromarray(draw(scene, size)).save(picture, "PNG")
    columns: dict[str, Any] = {"scene": scene.attributes()}
    if index % 4 == 3:
        columns["edit"] = OWN_EDITS[scene.mouth]
    return {
        image_format: picture.getvalue(),
        "txt": caption(scene, np.random.default_rng([seed, index, 1])).encode(),
        "json": json.dumps(columns).encode(),
    }
