"""What an exported row is called, per trainer that reads it (columns in the trainer's own order)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from pipeline.writing.rows import feature_of, format_of, with_features
from pipeline.writing.webdataset import json_member

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Row = Mapping[str, Any]
"""A result under the run's own names, pictures as {bytes, path}."""
PresetName = Literal["instructpix2pix", "ip2p_original", "magicbrush", "x2edit"]
NEEDED = ("id", "edit", "method", "image", "mask", "input", "instruction", "source_prompt", "target_prompt", "model")
"""Columns of a run that presets read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One trainer's columns."""

    columns: Mapping[str, pa.DataType]
    made: Callable[[Row], dict[str, Any]]  # of a result
    texts: tuple[str, ...] = ("instruction",)  # of the run, which must not be empty
    splits: tuple[str, str] = ("train", "validation")
    suffix: Literal["parquet", "tar"] = "parquet"

    @property
    def schema(self) -> pa.Schema:
        """Of its files, with what tells `datasets` that images are images."""
        features = {
            name: {"dtype": "int32", "_type": "Value"} if kind == pa.int32() else feature_of(kind)
            for name, kind in self.columns.items()
        }
        return with_features(list(self.columns.items()), features)


def _instructpix2pix(row: Row) -> dict[str, Any]:
    return {"input_image": row["input"], "edit_prompt": row["instruction"], "edited_image": row["image"]}


def _ip2p_original(row: Row) -> dict[str, Any]:
    return {
        "original_prompt": row["source_prompt"],
        "original_image": row["input"],
        "edit_prompt": row["instruction"],
        "edited_prompt": row["target_prompt"],
        "edited_image": row["image"],
    }


def _magicbrush(row: Row) -> dict[str, Any]:
    return {
        "img_id": name_of(row),
        "turn_index": 1,  # each result is an edit of its input, none goes on from another
        "source_img": row["input"],
        "mask_img": row["mask"],
        "instruction": row["instruction"],
        "target_img": row["image"],
    }


def _x2edit(row: Row) -> dict[str, Any]:
    source, edited = row["input"]["bytes"], row["image"]["bytes"]
    known = {"task": row["edit"], "instruction": row["instruction"], "method": row["method"], "model": row["model"]}
    return {
        "__key__": row["image"]["path"].partition(".")[0],
        f"1.0.{format_of(source)}": source,
        f"2.{format_of(edited)}": edited,
        "txt": row["instruction"].encode(),
        "json": json_member(known),
    }


def name_of(row: Row) -> str:
    """Tells a result from all others of its run."""
    return f"{row['id']}~{row['edit']}~{row['method']}"


PRESETS: dict[PresetName, Preset] = {
    "instructpix2pix": Preset(  # examples/instruct_pix2pix of diffusers: by default, and by place, in this order
        columns={"input_image": IMAGE, "edit_prompt": pa.string(), "edited_image": IMAGE}, made=_instructpix2pix
    ),
    "ip2p_original": Preset(
        columns={
            "original_prompt": pa.string(),
            "original_image": IMAGE,
            "edit_prompt": pa.string(),
            "edited_prompt": pa.string(),
            "edited_image": IMAGE,
        },
        made=_ip2p_original,
        texts=("instruction", "source_prompt", "target_prompt"),
    ),
    "magicbrush": Preset(
        columns={
            "img_id": pa.string(),
            "turn_index": pa.int32(),
            "source_img": IMAGE,
            "mask_img": IMAGE,
            "instruction": pa.string(),
            "target_img": IMAGE,
        },
        made=_magicbrush,
        splits=("train", "dev"),
    ),
    "x2edit": Preset(columns={}, made=_x2edit, suffix="tar"),
}
