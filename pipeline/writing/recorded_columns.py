"""What blocks wrote, as columns of a row, and back.

A column for each block, time and branch: Parquet stores columns apart, so that who trains an autoencoder of one block
reads that block's bytes alone, as if it had files of its own; ids, prompts and images are stored once. Vectors are
float16: 32 places of a block of Stable Diffusion (1,280 numbers) take 82 kB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.recordings import ATTENDED, Attended, Recorded, RecordingKey

RECORDED = "recorded"
"""The column that says of each other one what it holds, as JSON."""
LARGEST = float(np.finfo(np.float16).max)


def recorded_schema(keys: Sequence[RecordingKey], *, attention: bool = False) -> dict[str, pa.DataType]:
    """The columns of a run that records, and where words were attended to."""
    if not keys:
        return {}
    attended = {ATTENDED: pa.list_(pa.float16())} if attention else {}  # (S, h', w'), flat, the mean over the steps
    vectors = {key.column: pa.list_(pa.float16()) for key in keys}  # (P, D), flat
    return {RECORDED: pa.string(), **vectors, **attended}


def recorded_columns(recorded: Sequence[Recorded | Attended]) -> dict[str, Any]:
    """What a row holds of its recordings.

    Raises:
        ValueError: a number does not fit into float16.
    """
    if not recorded:
        return {}
    said: dict[str, Any] = {}
    columns: dict[str, np.ndarray] = {}
    attended = [one for one in recorded if isinstance(one, Attended)]
    if attended:
        mean = torch.stack([one.maps for one in attended]).mean(dim=0)
        said[ATTENDED] = {"words": list(attended[0].words), "shape": list(mean.shape)}
        columns[ATTENDED] = mean.flatten().numpy().astype(np.float16)
    for one in recorded:
        if isinstance(one, Attended):
            continue
        numbers = one.vectors.flatten().numpy()
        if not np.abs(numbers).max() <= LARGEST:  # also where one is no number
            raise ValueError(
                f"what {one.key.block} wrote at timestep {one.timestep:g} has numbers beyond float16. Set model.dtype "
                "float32, or leave the block out of record.blocks"
            )
        columns[one.key.column] = numbers.astype(np.float16)
        said[one.key.column] = {
            "block": one.key.block,
            "time": one.key.time,
            "branch": one.key.branch,
            "step": one.step,
            "timestep": one.timestep,
            "shape": list(one.shape),
            "positions": list(one.positions),
        }
    return {RECORDED: json.dumps(said, sort_keys=True, separators=(",", ":")), **columns}


def attended_of(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Where each word of a row's prompt was attended to, (h', w') float32 by word; none where it was not recorded."""
    said = json.loads(row[RECORDED] or "{}").get(ATTENDED)
    if said is None:
        return {}
    maps = np.asarray(row[ATTENDED], dtype=np.float16).astype(np.float32).reshape(said["shape"])
    return dict(zip(said["words"], maps, strict=True))


def recorded_of(row: Mapping[str, Any], column: str) -> tuple[dict[str, Any], np.ndarray]:
    """What a row says of a recording, and its vectors (P, D) in float32.

    Raises:
        KeyError: the row has none.
    """
    said = json.loads(row[RECORDED])[column]
    numbers = np.asarray(row[column], dtype=np.float16).astype(np.float32)
    return said, numbers.reshape(len(said["positions"]), said["shape"][0])
