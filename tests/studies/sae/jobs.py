"""What the tests of sparse autoencoders have in common: prompts, recipes and configurations of small runs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.settings.configuration import config_from
from pipeline.studies.sae.config import LabelConfig, TrainConfig
from tests.golden.replay import TINY_SD
from tests.runs import png

UP, DOWN = "up_blocks.1.attentions.0", "down_blocks.1.attentions.1"
RECORD = {"blocks": [UP, DOWN], "times": [1.0, 0.0], "positions": 3}
IMAGES = 6
LABELS = f"{__name__}:halves"


def halves(image: np.ndarray, prompt: str) -> dict[str, np.ndarray]:
    """What a labeller says: the left half, and where the image is bright."""
    left = np.zeros(image.shape[:2], dtype=bool)
    left[:, : image.shape[1] // 2] = True
    return {"left": left, "bright": image.mean(axis=-1) > image.mean()}


def write_prompts(folder: Path) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "p.tar", "w") as tar:
        for number in range(IMAGES):
            edit = {"edit": {"target_prompt": f"a cat number {number}"}}
            for name, data in (("png", png(0, 64, 64)), ("json", json.dumps(edit).encode())):
                member = tarfile.TarInfo(f"im{number}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def recipe_data(folder: Path, out: str, record: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return {
        "source": {"shards": str(folder / "in")},
        "edits": {"target_prompt": "a cat"},
        "model": {"name": str(TINY_SD), "size": 64},
        "inversion": {"method": "noise", "num_steps": 2},
        "editing": {"method": "concepts", "guidance_scale": 2.0, "record": record or RECORD},
        "sink": {"folder": str(folder / out), "round_trip": False},
        "run": {"unit_size": 2, "call_size": 8, "engine": "local"},
        **sections,
    }


def train_config(made: Path, out: Path, **settings: Any) -> TrainConfig:
    return config_from(
        TrainConfig,
        {
            "recordings": {"folders": str(made / "some")},
            "autoencoder": {"num_features": 24, "k": 3},
            "training": {
                "vectors": 48,
                "batch_size": 6,
                "shuffle_vectors": 12,
                "held_out": 0.3,
                "dead_after": 12,
                "aux_k": 4,
                "learning_rate": 1e-2,
                "checkpoint_every": 3,
                **settings,
            },
            "sink": {"folder": str(out)},
        },
    )


def label_config(made: Path, folder: Path, **settings: Any) -> LabelConfig:
    data = {"recordings": {"folders": str(made / "whole")}, "library": {"folder": str(folder)}, "labels": LABELS}
    return config_from(LabelConfig, {**data, **settings})


def table_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "data").glob("*.parquet")
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows
