"""One result becomes one output row: images and masks encoded, everything else as plain columns.

Cost: PNG of 512 x 512 takes about 40 ms of one core; masks, at one bit per pixel, next to nothing.
The same result gives the same bytes: no time, no host, fixed compression.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

import pipeline
from pipeline.errors import EncodeError
from pipeline.models.backbone import ModelRecord
from pipeline.recipe import Recipe, SinkConfig
from pipeline.records import Edited, Outcome, Rejected, Sample

Row = dict[str, Any]
"""One output row, ready for `schema`: {column: value}."""

FIGURES = (
    "reconstruction_psnr",
    "image_psnr",
    "background_psnr",
    "background_ssim",
    "mask_share",
    "edit_change",
    "rest_change",
)
PNG_LEVEL = 4  # of zlib, 0..9: a third of the time of the default 6, for 2 % more bytes
THUMBNAIL_SIDE = 256  # pixels of the longer side: about 12 kB
MAX_MESSAGE = 2000  # characters of a reason; a decoder may quote what it read

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_MEMBER = pa.struct([("name", pa.string()), ("bytes", pa.binary())])
_FEATURES: dict[Any, Any] = {  # how Hugging Face `datasets` spells these types
    pa.string(): {"dtype": "string", "_type": "Value"},
    pa.int64(): {"dtype": "int64", "_type": "Value"},
    pa.float64(): {"dtype": "float64", "_type": "Value"},
    _IMAGE: {"_type": "Image"},
    _MEMBER: {"name": {"dtype": "string", "_type": "Value"}, "bytes": {"dtype": "binary", "_type": "Value"}},
}


def schema(include_input: bool) -> pa.Schema:
    """Columns of `data/`, with the metadata by which `datasets.load_dataset("parquet")` sees images as images."""
    columns: dict[str, pa.DataType] = {
        "id": pa.string(),
        "shard": pa.string(),
        "key": pa.string(),
        "index": pa.int64(),
        "edit": pa.string(),
        "method": pa.string(),
        "image": _IMAGE,
        "mask": _IMAGE,
        "masks": pa.list_(_IMAGE),
        "concepts": pa.list_(pa.string()),
    }
    columns["input" if include_input else "input_thumbnail"] = _IMAGE
    columns |= dict.fromkeys(
        ("caption", "source_prompt", "target_prompt", "negative_prompt", "request"),
        pa.string(),
    )
    columns["seed"] = pa.int64()
    columns |= dict.fromkeys(
        ("model", "model_revision", "model_digest", "recipe_hash", "code_version"),
        pa.string(),
    )
    columns["call_size"] = pa.int64()
    columns |= dict.fromkeys(FIGURES, pa.float64())
    columns |= {"columns": pa.string(), "members": pa.list_(_MEMBER)}
    features = {name: _feature(kind) for name, kind in columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(list(columns.items()), metadata=metadata)


def shared_columns(sink: SinkConfig) -> list[str]:
    """Paths of the columns whose values repeat from row to row: an image has several results."""
    return ["input.bytes" if sink.include_input else "input_thumbnail.bytes"]


def _feature(kind: pa.DataType) -> Any:
    # `[...]` is a list to every version of `datasets`; the spelling "List" is unknown before version 4.
    return [_FEATURES[kind.value_type]] if pa.types.is_list(kind) else _FEATURES[kind]


def encode_outcome(outcome: Outcome, recipe: Recipe, model: ModelRecord, call_size: int) -> Row | Rejected:
    """Turn a result into a row. What was rejected stays so; what cannot be encoded is rejected in stage "encode".

    Args:
        outcome: what came out of the engine.
        recipe: decides the image format, and goes into the row as its hash.
        model: what made the result.
        call_size: rows of a UNet call; bits are equal within one.
    """
    if isinstance(outcome, Rejected):
        return dataclasses.replace(outcome, error=None)
    try:
        return _row(outcome, recipe, model, call_size)
    except Exception as error:
        return Rejected(
            sample=outcome.sample,
            edit=outcome.edit,
            method=outcome.method,
            stage=EncodeError.stage,
            error_class=type(error).__name__,
            message=str(error),
        )


def _row(edited: Edited, recipe: Recipe, model: ModelRecord, call_size: int) -> Row:
    sample, request, sink = edited.sample, edited.request, recipe.sink
    stem = stem_of(sample, edited.edit, edited.method)
    row: Row = {
        "id": clean(sample.id),
        "shard": clean(sample.shard),
        "key": clean(sample.key),
        "index": sample.index,
        "edit": edited.edit,
        "method": edited.method,
        "image": _named(encode_image(edited.image, sink), f"{stem}.edited.{sink.image_format}"),
        "mask": _mask(edited.mask, f"{stem}.mask.png"),
        "masks": [_mask(mask, f"{stem}.mask.{at}.png") for at, mask in enumerate(edited.masks)],
        "concepts": [clean(concept.prompt) for concept in request.concepts],
        "caption": clean(sample.caption),
        "source_prompt": clean(request.source_prompt),
        "target_prompt": clean(request.target_prompt),
        "negative_prompt": clean(request.negative_prompt),
        "request": json_text(request.model_dump(mode="json")),
        "seed": edited.seed,
        "model": model.name,
        "model_revision": model.revision,
        "model_digest": model.digest,
        "recipe_hash": recipe.hash,
        "code_version": pipeline.__version__,
        "call_size": call_size,
        **{name: edited.figures.get(name) for name in FIGURES},
        "columns": json_text(dict(sample.columns)),
        "members": [{"name": clean(name), "bytes": bytes(data)} for name, data in sorted(sample.members.items())],
    }
    if sink.include_input:
        row["input"] = _named(encode_png(edited.original), f"{stem}.input.png")
    else:
        row["input_thumbnail"] = _named(encode_thumbnail(edited.original), f"{stem}.thumbnail.jpg")
    return row


def _named(data: bytes, path: str) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def _mask(mask: np.ndarray | None, path: str) -> dict[str, Any] | None:
    return None if mask is None else _named(encode_mask(mask), path)


def encode_image(pixels: np.ndarray, sink: SinkConfig) -> bytes:
    """Encode (H, W, 3) uint8 in the sink's format.

    Raises:
        EncodeError: the pixels are no image that the format can hold.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise EncodeError(f"the result is {pixels.dtype} of shape {pixels.shape}, not uint8 of shape (H, W, 3)")
    if sink.image_format == "png":
        return encode_png(pixels)
    if sink.image_format == "jpg":  # without chroma subsampling: an edit may be one thin red line
        return _encode(Image.fromarray(pixels), format="JPEG", quality=sink.quality, subsampling=0)
    return _encode(Image.fromarray(pixels), format="WEBP", quality=sink.quality, method=4)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode (H, W, 3) uint8 without loss."""
    return _encode(Image.fromarray(pixels), format="PNG", compress_level=PNG_LEVEL)


def encode_thumbnail(pixels: np.ndarray) -> bytes:
    """A small JPEG of the input: where the input is not kept, a report must still show what was edited."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return _encode(image, format="JPEG", quality=85)


def encode_mask(mask: np.ndarray) -> bytes:
    """Encode a mask (H, W) bool as a PNG of one bit per pixel: white is inside.

    Raises:
        EncodeError: it is no such mask.
    """
    if mask.dtype != np.bool_ or mask.ndim != 2 or 0 in mask.shape:
        raise EncodeError(f"the mask is {mask.dtype} of shape {mask.shape}, not bool of shape (H, W)")
    return _encode(Image.fromarray(mask), format="PNG", compress_level=PNG_LEVEL)


def _encode(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, **options)
    except (OSError, ValueError) as error:
        raise EncodeError(
            f"{image.width} x {image.height} pixels cannot be written as {options['format']}: {error}"
        ) from error
    return buffer.getvalue()


def stem_of(sample: Sample, edit: str, method: str) -> str:
    """Name of one result's files: ASCII, no dots (a WebDataset key ends at the first), unique in the whole run.

    Names of edits and methods hold no "~", so that the parts stay apart.
    """
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", sample.key)[:64]
    return f"{key}-{hashlib.sha256(clean(sample.id).encode()).hexdigest()[:10]}~{edit}~{method}"


def json_text(value: Mapping[str, Any]) -> str:
    """JSON in one fixed spelling; what JSON does not know is written as its text."""
    return clean(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str))


def clean(text: str) -> str:
    """Text that UTF-8 can hold: JSON from outside may bring lone surrogates, which no file format takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
