"""Hand-made results: what comes out of the engine, without one."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.engine.backbone import ModelRecord
from pipeline.reading.storage import open_fs
from pipeline.recipe import Recipe
from pipeline.records import Concept, Edited, EditRequest, Rejected
from pipeline.samples import Sample, Unit, UnitInput
from pipeline.writing.files import put
from pipeline.writing.flags import FOLDER, flags
from pipeline.writing.lock import Claim
from pipeline.writing.manifest import Measured
from pipeline.writing.rows import encode_png

MODEL = ModelRecord(name="analytic", revision="", digest="0123456789abcdef", dtype="float32", device="cpu")
MEASURED = Measured(worker_seconds=1.5, workers=1, network_rows=12)
NOW = {"generation": 1, "model_digest": MODEL.digest, "call_size": 8}


def make_sample(index: int, **fields: object) -> Sample:
    values: dict[str, object] = {
        "id": f"faces/0001.tar/im.{index}",
        "shard": "faces/0001.tar",
        "key": f"im.{index}",
        "index": index,
        "image": b"as stored",
        "caption": "a cat",
        "columns": {"score": 0.5, "tags": ["a", "b"]},
    }
    return Sample(**{**values, **fields})  # type: ignore[arg-type]


def make_edited(
    index: int = 0, edit: str = "edit", method: str = "ledits_pp", concepts: int = 2, **fields: object
) -> Edited:
    pixels = np.random.default_rng(index).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    masks = tuple(np.random.default_rng([index, at]).random((24, 32)) > 0.5 for at in range(concepts))
    original: Any = fields.get("original", 255 - pixels)
    values: dict[str, object] = {
        "sample": make_sample(index, image=encode_png(original)),
        "edit": edit,
        "method": method,
        "request": EditRequest(concepts=tuple(Concept(prompt=f"concept {at}") for at in range(concepts))),
        "image": pixels,
        "original": original,
        "masks": masks,
        "mask": np.logical_or.reduce(masks) if masks else None,
        "seed": 2**62 + index,
        "figures": {"reconstruction_psnr": 31.5, "background_psnr": None, "mask_share": 0.75 if masks else None},
    }
    return Edited(**{**values, **fields})  # type: ignore[arg-type]


def make_rejected(index: int = 0, edit: str = "edit", method: str = "ledits_pp", **fields: object) -> Rejected:
    values: dict[str, object] = {
        "sample": make_sample(index),
        "edit": edit,
        "method": method,
        "stage": "decode",
        "error_class": "DecodeError",
        "message": "the bytes are no image",
    }
    return Rejected(**{**values, **fields})  # type: ignore[arg-type]


def make_unit(*indexes: int, chunk: int = 0, is_last: bool = True) -> UnitInput:
    unit = Unit(
        id=f"faces-0001-3fa2b1c4-{chunk:05d}",
        shard="faces/0001.tar",
        chunk=chunk,
        start=min(indexes, default=0),
        stop=max(indexes, default=-1) + 1,
        is_last=is_last,
    )
    return UnitInput(unit=unit, shard_size=1000, shard_etag="v1", rows=tuple(make_sample(index) for index in indexes))


def unclaimed() -> None:
    """A look at the lock where nobody else is at work."""


def claim(recipe: Recipe, generation: int = 1) -> Claim:
    """What a driver of that generation holds: its flag is put up, and every other one taken down."""
    fs, root = open_fs(recipe.sink.folder, recipe.sink.storage_options)
    for name in flags(fs, root):
        fs.rm_file(f"{root}/{FOLDER}/{name}")
    name = f"{generation:08d}-{generation:016x}.json"
    put(fs, f"{root}/{FOLDER}/{name}", b"{}")
    return Claim(recipe.sink, name)
