"""What an exported row is called, per trainer that reads it (columns in the trainer's own order)."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.pairs.results import Row, of_attempt
from pipeline.pairs.rle import rle_of
from pipeline.writing.rows import feature_of, format_of, with_features
from pipeline.writing.webdataset import json_member

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
STRINGS = pa.list_(pa.string())
RLE = pa.struct([("size", pa.list_(pa.int64())), ("counts", pa.string())])
PresetName = Literal[
    "instructpix2pix",
    "ip2p_original",
    "ultraedit",
    "ultraedit_region",
    "magicbrush",
    "imgedit",
    "x2edit",
    "webdataset",
    "preference",
    "diffusion_dpo",
]
Columns = Mapping[str, pa.DataType]
OF_GATES: Columns = {"accepted": pa.bool_(), "reject_reasons": STRINGS}
"""Columns that are added where what gates rejected is exported, too."""
OF_MASKS: Columns = {"mask_rle": RLE}
"""The column that is added where masks are asked for as run lengths."""
SIMILARITIES = {  # UltraEdit's names: those of our figures
    "clip_sim_source": "clip_sim_0",
    "clip_sim_target": "clip_sim_1",
    "clip_sim_dir": "clip_sim_dir",
    "clip_sim_image": "clip_sim_image",
    "dinov2_sim": "dinov2_sim",
    "ssim": "ssim",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row to be written."""

    row: Row  # the result; of a pair of preference the better one
    key: str  # tells it from all others of the set; letters, digits, "_", "-" and "~"
    name: str  # the same for people: id, edit and method
    number: int  # in the set, from 0
    captions: str = "instruction"  # which text describes the result
    worse: Row | None = None
    score: float | None = None
    worse_score: float | None = None
    score_name: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)  # more columns


Made = Callable[[Entry], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One trainer's files: rows of Parquet, members of tars, or both side by side."""

    columns: Columns = field(default_factory=dict)  # of Parquet
    row: Made | None = None
    members: Made | None = None  # of a sample in a tar
    texts: tuple[str, ...] = ("instruction",)  # of the run, which must not be empty
    needs_mask: bool = False
    pairs: bool = False  # rows are pairs of a better and a worse result
    splits: tuple[str, str] = ("train", "validation")

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of its files. Of two, the first is written first."""
        return (*(["tar"] if self.members else []), *(["parquet"] if self.row else []))

    def schema(self, extras: Columns) -> pa.Schema:
        """Of its Parquet files, with what tells `datasets` that images are images."""
        columns = {**self.columns, **extras}
        return with_features(list(columns.items()), {name: _feature(kind) for name, kind in columns.items()})


def _feature(kind: pa.DataType) -> Any:
    if kind == RLE:
        return {"size": [{"dtype": "int64", "_type": "Value"}], "counts": {"dtype": "string", "_type": "Value"}}
    simple = {pa.int32(): "int32", pa.bool_(): "bool", pa.binary(): "binary"}
    return {"dtype": simple[kind], "_type": "Value"} if kind in simple else feature_of(kind)


def extras_of(row: Row, *, accepted: bool | None, with_rle: bool) -> dict[str, Any]:
    """Values of the columns that were asked for beside the preset's; `accepted` None: those of gates were not."""
    extras: dict[str, Any] = {}
    if with_rle:
        extras["mask_rle"] = None if row["mask"] is None else rle_of(_mask(row["mask"]["bytes"]))
    if accepted is not None:
        extras |= {"accepted": accepted, "reject_reasons": row["reject_reasons"] or []}
    return extras


def _mask(data: bytes) -> np.ndarray:
    """(H, W) bool, of a mask of ours: white is inside."""
    with Image.open(io.BytesIO(data)) as opened:
        return np.asarray(opened.convert("L")) > 127


def _instructpix2pix(entry: Entry) -> dict[str, Any]:
    row = entry.row
    return {"input_image": row["input"], "edit_prompt": row["instruction"], "edited_image": row["image"]}


def _ip2p_original(entry: Entry) -> dict[str, Any]:
    row = entry.row
    return {
        "original_prompt": row["source_prompt"],
        "original_image": row["input"],
        "edit_prompt": row["instruction"],
        "edited_prompt": row["target_prompt"],
        "edited_image": row["image"],
    }


def _ultraedit(entry: Entry) -> dict[str, Any]:
    row = entry.row
    return {
        **{name: row["figures"].get(figure) for name, figure in SIMILARITIES.items()},
        "source_caption": row["source_prompt"],
        "target_caption": row["target_prompt"],
        "idx": entry.number,
        "edit_prompt": row["instruction"],
        "source_image": row["input"],
        "edited_image": row["image"],
    }


def _ultraedit_region(entry: Entry) -> dict[str, Any]:
    row = entry.row
    return {
        **_ultraedit(entry),
        "edit_object": ", ".join(row["concepts"] or ()) or None,
        "mask_image": row["mask"],
    }


def _magicbrush(entry: Entry) -> dict[str, Any]:
    row = entry.row
    return {
        "img_id": entry.name,
        "turn_index": 1,  # each result is an edit of its input, none goes on from another
        "source_img": row["input"],
        "mask_img": row["mask"],
        "instruction": row["instruction"],
        "target_img": row["image"],
    }


def _imgedit(entry: Entry) -> dict[str, Any]:
    source, edited = (f"{entry.key}.{name}" for name in _pictures(entry, "input", "edited"))
    return {"input_images": [source], "output_images": [edited], "prompt": entry.row["instruction"]}


def _imgedit_members(entry: Entry) -> dict[str, Any]:
    return {"__key__": entry.key, **_pictures(entry, "input", "edited")}


def _x2edit(entry: Entry) -> dict[str, Any]:
    row = entry.row
    known = {"task": row["edit"], "instruction": row["instruction"], "method": row["method"], "model": row["model"]}
    return {
        "__key__": entry.key,
        **_pictures(entry, "1.0", "2"),
        "txt": row["instruction"].encode(),
        "json": json_member(known | dict(entry.extras)),
    }


def _webdataset(entry: Entry) -> dict[str, Any]:
    row = entry.row
    texts = ("id", "edit", "method", "caption", "instruction", "source_prompt", "target_prompt")
    made_by = ("seed", "model", "model_revision", "recipe_hash")
    figures = {name: value if _is_finite(value) else None for name, value in row["figures"].items()}
    masks = {"mask.png": row["mask"]["bytes"]} if row["mask"] is not None else {}
    return {
        "__key__": entry.key,
        **_pictures(entry, "input", "edited"),
        **masks,
        "txt": row["instruction"].encode(),
        "json": json_member({name: row[name] for name in (*texts, *made_by)} | figures | dict(entry.extras)),
    }


def _pictures(entry: Entry, source: str, edited: str) -> dict[str, bytes]:
    """Both pictures as members, each with the extension of what it is."""
    pictures = {source: entry.row["input"]["bytes"], edited: entry.row["image"]["bytes"]}
    return {f"{name}.{format_of(data)}": data for name, data in pictures.items()}


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)  # JSON knows no NaN


def _preference(entry: Entry) -> dict[str, Any]:
    row, worse = entry.row, entry.worse
    assert worse is not None, "a plan of pairs has both results"
    has_scores = entry.score is not None and entry.worse_score is not None
    return {
        "source_image": row["input"],
        "prompt": row["instruction"],
        "chosen_image": row["image"],
        "rejected_image": worse["image"],
        "chosen_score": entry.score,
        "rejected_score": entry.worse_score,
        "score_name": entry.score_name,
        "margin": abs((entry.score or 0.0) - (entry.worse_score or 0.0)) if has_scores else None,
        "edit_type": row["edit"],
    }


def _diffusion_dpo(entry: Entry) -> dict[str, Any]:
    row, worse = entry.row, entry.worse
    assert worse is not None, "a plan of pairs has both results"
    better_is_first = entry.number % 2 == 0  # else who reads places alone would learn that the first one wins
    pictures = (row["image"]["bytes"], worse["image"]["bytes"])
    first, second = pictures if better_is_first else pictures[::-1]
    return {
        "jpg_0": first,
        "jpg_1": second,
        "label_0": int(better_is_first),
        "caption": row[entry.captions],
        "source_image": row["input"],
    }


_OF_ULTRAEDIT: dict[str, pa.DataType] = {
    **dict.fromkeys(SIMILARITIES, pa.float64()),
    "source_caption": pa.string(),
    "target_caption": pa.string(),
    "idx": pa.int64(),
    "edit_prompt": pa.string(),
}
_BOTH = {"source_image": IMAGE, "edited_image": IMAGE}
PRESETS: dict[PresetName, Preset] = {
    "instructpix2pix": Preset(  # examples/instruct_pix2pix of diffusers: by default, and by place, in this order
        columns={"input_image": IMAGE, "edit_prompt": pa.string(), "edited_image": IMAGE}, row=_instructpix2pix
    ),
    "ip2p_original": Preset(
        columns={
            "original_prompt": pa.string(),
            "original_image": IMAGE,
            "edit_prompt": pa.string(),
            "edited_prompt": pa.string(),
            "edited_image": IMAGE,
        },
        row=_ip2p_original,
        texts=("instruction", "source_prompt", "target_prompt"),
    ),
    "ultraedit": Preset(
        columns={**_OF_ULTRAEDIT, **_BOTH},
        row=_ultraedit,
        texts=("instruction", "source_prompt", "target_prompt"),
        splits=("FreeForm", "validation"),
    ),
    "ultraedit_region": Preset(
        columns={**_OF_ULTRAEDIT, "edit_object": pa.string(), **_BOTH, "mask_image": IMAGE},
        row=_ultraedit_region,
        texts=("instruction", "source_prompt", "target_prompt"),
        needs_mask=True,
        splits=("RegionBase", "validation"),
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
        row=_magicbrush,
        needs_mask=True,
        splits=("train", "dev"),
    ),
    "imgedit": Preset(
        columns={"input_images": STRINGS, "output_images": STRINGS, "prompt": pa.string()},
        row=_imgedit,
        members=_imgedit_members,
    ),
    "x2edit": Preset(members=_x2edit),
    "webdataset": Preset(members=_webdataset),
    "preference": Preset(
        columns={
            "source_image": IMAGE,
            "prompt": pa.string(),
            "chosen_image": IMAGE,
            "rejected_image": IMAGE,
            "chosen_score": pa.float64(),
            "rejected_score": pa.float64(),
            "score_name": pa.string(),
            "margin": pa.float64(),
            "edit_type": pa.string(),
        },
        row=_preference,
        pairs=True,
    ),
    "diffusion_dpo": Preset(  # research_projects/diffusion_dpo of diffusers: pictures as plain bytes
        columns={
            "jpg_0": pa.binary(),
            "jpg_1": pa.binary(),
            "label_0": pa.int64(),
            "caption": pa.string(),
            "source_image": IMAGE,
        },
        row=_diffusion_dpo,
        pairs=True,
    ),
}


def key_of(row: Row, run: int) -> str:
    """Tells a result from those of all other runs, as a file's name may."""
    stem = str(row["image"]["path"]).partition(".")[0]
    return f"{stem}{of_attempt(row)}{of_run(run)}"


def of_run(run: int) -> str:
    """What a name of a later run's row ends in: two runs may have edited the same image."""
    return f"~run{run}" if run else ""
