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
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

import pipeline
from pipeline.engine.backbone import ModelRecord
from pipeline.errors import EncodeError
from pipeline.evaluation.metrics import NAMES as FIGURES
from pipeline.gating.gate import columns_of
from pipeline.reading.rows_as_json import Labels
from pipeline.recipe import Recipe, SinkConfig
from pipeline.recordings import RecordingKey
from pipeline.records import Edited, Outcome, Rejected
from pipeline.samples import Sample
from pipeline.seeds import seed_for
from pipeline.settings.gates import GatesConfig
from pipeline.writing.basis_columns import BASIS_COLUMNS, basis_columns
from pipeline.writing.instructions import drawn_instruction, instruction_of
from pipeline.writing.recorded_columns import recorded_columns, recorded_schema

OutputRow = dict[str, Any]
"""One output row under our own names, and `LABELS`; `as_written` makes it ready for `schema`."""
REASONS = "reject_reasons"
"""The column with the gates that rejected a row; an empty list of those that passed."""
ATTEMPT, CHOSEN, SETTINGS, ATTEMPTS_FAILED = "attempt", "chosen", "settings", "attempts_failed"
"""Columns of a run that makes several attempts; best_of.py fills the second and the last."""
ANSWER_COLUMNS: dict[str, pa.DataType] = {
    "server_model": pa.string(),
    "server_requests": pa.int64(),
    "server_input_tokens": pa.int64(),
    "server_output_tokens": pa.int64(),
    "server_cost": pa.float64(),
}
"""Columns of a run whose methods ask servers: which model answered, and what it took."""
REWRITTEN = ("instruction_given", "instruction_reason")
"""Columns where a judge rewrites instructions: what stood there before, and the class of why it gave none."""
LABELS = "labels of the source"  # in a row: {column of the source: number of the class}; no column's name
PNG_LEVEL = 4  # of zlib, 0..9: a third of the time of the default 6, for 2 % more bytes
THUMBNAIL_SIDE = 256  # pixels of the longer side: about 12 kB
MAX_MESSAGE = 2000  # characters of a reason; a decoder may quote what it read

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_MEMBER = pa.struct([("name", pa.string()), ("bytes", pa.binary())])
_FEATURES: dict[Any, Any] = {  # how Hugging Face `datasets` spells these types
    pa.string(): {"dtype": "string", "_type": "Value"},
    pa.bool_(): {"dtype": "bool", "_type": "Value"},
    pa.int64(): {"dtype": "int64", "_type": "Value"},
    pa.float64(): {"dtype": "float64", "_type": "Value"},
    pa.float32(): {"dtype": "float32", "_type": "Value"},
    pa.float16(): {"dtype": "float16", "_type": "Value"},
    _IMAGE: {"_type": "Image"},
    _MEMBER: {"name": {"dtype": "string", "_type": "Value"}, "bytes": {"dtype": "binary", "_type": "Value"}},
}


def schema(
    sink: SinkConfig,
    labels: Labels | None = None,
    *,
    bases: bool = False,
    recorded: Sequence[RecordingKey] = (),
    attention: bool = False,
    gates: GatesConfig | None = None,
    gain: bool = False,
    attempts: bool = False,
    drawn_instructions: bool = False,
    answers: bool = False,
    rewritten: bool = False,
) -> pa.Schema:
    """Columns of `data/`, with the metadata by which `datasets.load_dataset("parquet")` sees images as images.

    Args:
        sink: decides names, and whether the input is kept.
        labels: of the source; each becomes a column of its own.
        bases: the rows hold bases, too.
        recorded: what the rows hold of the network's blocks.
        attention: they hold where words were attended to, too.
        gates: of the run, whose figures and reasons they hold.
        gain: `denoise_gain` is among these.
        attempts: the run makes several of each.
        drawn_instructions: they say where their instructions come from.
        answers: they say which server made them, and what it took.
        rewritten: a judge puts them into its own words.
    """
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
    columns["input" if sink.keeps_input else "input_thumbnail"] = _IMAGE
    columns |= dict.fromkeys(
        ("input_path", "caption", "instruction", "source_prompt", "target_prompt", "negative_prompt", "request"),
        pa.string(),
    )
    columns |= dict.fromkeys(("instruction_source", "instruction_revision") if drawn_instructions else (), pa.string())
    columns |= dict.fromkeys(REWRITTEN if rewritten else (), pa.string())
    columns["seed"] = pa.int64()
    columns |= dict.fromkeys(
        ("model", "model_revision", "model_digest", "recipe_hash", "code_version"),
        pa.string(),
    )
    columns["call_size"] = pa.int64()
    columns |= ANSWER_COLUMNS if answers else {}
    columns |= dict.fromkeys(FIGURES, pa.float64())
    if gates is not None:
        kinds = {float: pa.float64(), str: pa.string()}
        columns |= {name: kinds[kind] for name, kind in columns_of(gates, gain=gain).items()} | {
            REASONS: pa.list_(pa.string())
        }
    if attempts:
        columns |= {ATTEMPT: pa.int64(), CHOSEN: pa.bool_(), SETTINGS: pa.string()}
        columns |= {ATTEMPTS_FAILED: pa.list_(pa.string())}
    columns |= BASIS_COLUMNS if bases else {}
    columns |= recorded_schema(recorded, attention=attention)
    columns |= {"columns": pa.string(), "members": pa.list_(_MEMBER)}
    columns = {sink.column_names.get(name, name): kind for name, kind in columns.items()}
    features = {name: feature_of(kind) for name, kind in columns.items()}
    for name, classes in sorted((labels or {}).items()):
        column = label_column(name, features)
        columns[column], features[column] = pa.int64(), {"names": list(classes), "_type": "ClassLabel"}
    return with_features(list(columns.items()), features)


def schema_of(recipe: Recipe, labels: Labels | None = None) -> pa.Schema:
    """Columns of a run's `data/` and `rejected/`."""
    return schema(
        recipe.sink,
        labels,
        bases=recipe.writes_bases,
        recorded=recipe.recorded,
        attention=recipe.records_attention,
        gates=recipe.gates,
        gain=recipe.measures_gain,
        attempts=recipe.best_of is not None,
        drawn_instructions=recipe.instructions is not None,
        answers=recipe.asks_servers,
        rewritten=recipe.instructions is not None and recipe.instructions.rewritten,
    )


def with_features(columns: Sequence[tuple[str, pa.DataType]], features: Mapping[str, Any]) -> pa.Schema:
    """A schema that says to `datasets` what its columns are."""
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def label_column(name: str, taken: Container[str]) -> str:
    """What a source's column of classes is called in the output."""
    while name in taken:
        name = f"source_{name}"
    return name


def as_written(row: OutputRow, sink: SinkConfig, labels: Labels | None = None) -> OutputRow:
    """A row under the names that `schema` gives its columns."""
    named = {sink.column_names.get(name, name): value for name, value in row.items() if name != LABELS}
    columns = {name: label_column(name, named) for name in sorted(labels or {})}
    return named | {column: row[LABELS].get(name) for name, column in columns.items()}


def shared_columns(sink: SinkConfig) -> list[str]:
    """Paths of the columns whose values repeat from row to row: an image has several results."""
    name = "input" if sink.keeps_input else "input_thumbnail"
    return [f"{sink.column_names.get(name, name)}.bytes"]


def feature_of(kind: pa.DataType) -> Any:
    """How `datasets` spells a type of ours."""
    # `[...]` is a list to every version of `datasets`; the spelling "List" is unknown before version 4.
    if pa.types.is_list(kind):
        return [feature_of(kind.value_type)]
    return _FEATURES[kind]


def encode_outcome(outcome: Outcome, recipe: Recipe, model: ModelRecord, call_size: int) -> OutputRow | Rejected:
    """Turn a result into a row. What was rejected stays so; what cannot be encoded is rejected in stage "encode".

    Args:
        outcome: what came out of the engine.
        recipe: decides the image format, and goes into the row as its hash.
        model: what made the result.
        call_size: rows of a network call; bits are equal within one.
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


def _row(edited: Edited, recipe: Recipe, model: ModelRecord, call_size: int) -> OutputRow:
    sample, request, sink = edited.sample, edited.request, recipe.sink
    stem = stem_of(sample, edited.edit, edited.method, edited.attempt)
    row: OutputRow = {
        "id": utf8_text(sample.id),
        "shard": utf8_text(sample.shard),
        "key": utf8_text(sample.key),
        "index": sample.index,
        "edit": edited.edit,
        "method": edited.method,
        "image": _named(encode_image(edited.image, sink), f"{stem}.edited.{sink.image_format}"),
        "mask": _mask(edited.mask, f"{stem}.mask.png"),
        "masks": [_mask(mask, f"{stem}.mask.{at}.png") for at, mask in enumerate(edited.masks)],
        "concepts": [utf8_text(concept.prompt) for concept in request.concepts],
        "input_path": utf8_text(sample.image_path),
        "caption": utf8_text(sample.caption),
        **_instruction_columns(edited, recipe),
        "source_prompt": utf8_text(request.source_prompt),
        "target_prompt": utf8_text(request.target_prompt),
        "negative_prompt": utf8_text(request.negative_prompt),
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
        "members": [{"name": utf8_text(name), "bytes": bytes(data)} for name, data in sorted(sample.members.items())],
        **_gate_columns(edited, recipe),
        **_attempt_columns(edited, recipe),
        **_answer_columns(edited, recipe),
        LABELS: {name: sample.columns.get(name) for name in sample.labels},
    }
    if edited.basis is not None:
        row |= basis_columns(edited.basis)
    row |= recorded_columns(edited.recorded)
    if sink.keeps_input:  # its own bytes: encoded anew, they would be other pixels, or many times as many bytes
        image = encode_png(edited.original) if sample.blank else sample.image
        row["input"] = _named(image, utf8_text(sample.image_path) or f"{stem}.input.{format_of(image)}")
    else:
        row["input_thumbnail"] = _named(encode_thumbnail(edited.original), f"{stem}.thumbnail.jpg")
    return row


def _instruction_columns(edited: Edited, recipe: Recipe) -> OutputRow:
    if recipe.instructions is None:
        return {"instruction": utf8_text(instruction_of(edited.request))}
    seed = seed_for(recipe.run.seed, edited.sample.id, f"instruction of {edited.edit}")
    drawn = drawn_instruction(edited.request, recipe.instructions, seed)
    text = utf8_text(drawn.text)
    columns: OutputRow = {
        "instruction": text,
        "instruction_source": drawn.source,
        "instruction_revision": drawn.revision,
    }
    if not recipe.instructions.rewritten:
        return columns
    assert edited.gated is not None, "the judge that rewrites is the gates'"
    found, (given, why) = edited.gated.instruction, REWRITTEN
    columns |= {given: text, why: None if found is None else found.reason or None}
    if found is None or not found.text:
        return columns
    return columns | {
        "instruction": utf8_text(found.text),
        "instruction_source": "judge",
        "instruction_revision": found.revision,
    }


def _gate_columns(edited: Edited, recipe: Recipe) -> OutputRow:
    if recipe.gates is None:
        return {}
    assert edited.gated is not None, "a gated run's results have been before its gates"
    figures, reasons = edited.gated.figures, list(edited.gated.reasons)
    return {name: figures.get(name) for name in columns_of(recipe.gates, gain=recipe.measures_gain)} | {
        REASONS: reasons
    }


def _attempt_columns(edited: Edited, recipe: Recipe) -> OutputRow:
    if recipe.best_of is None:
        return {}
    method = recipe.methods_of(edited.attempt)[edited.method]
    settings = json_text(method.model_dump(mode="json"))
    return {ATTEMPT: edited.attempt, CHOSEN: False, SETTINGS: settings, ATTEMPTS_FAILED: []}


def _answer_columns(edited: Edited, recipe: Recipe) -> OutputRow:
    if not recipe.asks_servers:
        return {}
    if (answer := edited.answer) is None:  # of a method that asks nobody
        return dict.fromkeys(ANSWER_COLUMNS)
    spent = answer.spent
    tokens = (spent.requests, spent.input_tokens, spent.output_tokens)
    return dict(zip(ANSWER_COLUMNS, (utf8_text(answer.model), *tokens, spent.cost), strict=True))


def is_kept(row: OutputRow) -> bool:
    """Whether a row stands in data/: no gate rejected it and, of several attempts, it is the one that was chosen."""
    return not row.get(REASONS) and bool(row.get(CHOSEN, True))


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


def format_of(image: bytes) -> str:
    """Extension of an encoded image, by its bytes: names may be wrong, or those of columns."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            kind = str(opened.format).lower()
    except OSError:
        return "bin"
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif", "jpeg2000": "jp2", "dib": "bmp"}.get(kind, kind)


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


def stem_of(sample: Sample, edit: str, method: str, attempt: int = 0) -> str:
    """Name of one result's files: ASCII, no dots (a WebDataset key ends at the first), unique in the whole run.

    Names of edits and methods hold no "~", so that the parts stay apart.
    """
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", sample.key)[:64]
    return f"{key}-{hashlib.sha256(utf8_text(sample.id).encode()).hexdigest()[:10]}~{edit}~{method}" + (
        f"~{attempt}" if attempt else ""
    )


def json_text(value: Mapping[str, Any]) -> str:
    """JSON in one fixed spelling; what JSON does not know is written as its text."""
    return utf8_text(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str))


def utf8_text(text: str) -> str:
    """Text that UTF-8 can hold: JSON from outside may bring lone surrogates, which no file format takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
