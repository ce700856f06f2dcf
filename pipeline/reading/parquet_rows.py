"""Rows of a Parquet file, row group by row group: what runs in the guarded process (reading/parquet.py).

Columns without a setting:

    image      the first of IMAGE_COLUMNS that is binary or Hugging Face's struct{bytes, path}; else the only such one
    caption    source.caption; where that is the default "txt" and absent: "caption", then "text"
    mask       source.mask, else "mask" where it is binary
    edit       source.edit, else "edits": JSON text or a struct
    key        the first of KEY_COLUMNS that holds text or integers, else the row's index, zero-padded

Other binary columns become members, all others columns (as JSON: times and decimals as text, NaN as null).
Used instead of Ray's and Hugging Face's readers, which fail, or drop whole blocks, on one damaged page.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.common.showing import describe
from pipeline.reading.rows import Names, RowProblemError, listed, split_edits, unreadable
from pipeline.reading.rows_as_json import Labels
from pipeline.reading.shards import DamagedFileError, NoImageColumnError
from pipeline.samples import ReadRow, Sample
from pipeline.settings.sections import SourceConfig

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "img", "image_bytes", "input_image", "input")
KEY_COLUMNS = ("__key__", "id", "key")


@dataclass(frozen=True, slots=True)
class Layout:
    """Which column is what; "" where there is none."""

    image: str
    caption: str
    mask: str
    key: str
    row_groups: tuple[int, ...]  # rows of each
    row_bytes: int  # of a row on average, unpacked, in the row group where that is most
    labels: Labels


def is_damage(error: BaseException) -> bool:
    """Whether pyarrow complains about the data; also by an OSError without errno, which no storage raises."""
    if isinstance(error, MemoryError):  # pyarrow's own is an `ArrowException` as well
        return False
    known = (DamagedFileError, pa.ArrowException, UnicodeDecodeError)
    return isinstance(error, known) or (type(error) is OSError and error.errno is None)


def open_parquet(file: BinaryIO, size: int) -> pq.ParquetFile:
    """Open a file of `size` bytes so that pages are read as they are needed.

    Raises:
        DamagedFileError: it is no Parquet, is cut, or announces more rows than it has bytes.
    """
    try:
        opened = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    except Exception as error:
        if not is_damage(error):
            raise
        raise DamagedFileError(f"it is no Parquet file, or it is cut: {describe(error)}") from error
    if opened.metadata.num_rows > size:
        raise DamagedFileError(f"its footer announces {opened.metadata.num_rows} rows, in a file of {size} bytes")
    return opened


def layout_of(file: pq.ParquetFile, source: SourceConfig) -> Layout:
    """Which column of a file is what.

    Raises:
        NoImageColumnError: lists the columns that there are.
        DamagedFileError: the footer contradicts itself, or columns share a name.
    """
    try:
        schema, metadata = file.schema_arrow, file.metadata
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        row_groups = tuple(group.num_rows for group in groups)
        row_bytes = max((group.total_byte_size // group.num_rows for group in groups if group.num_rows > 0), default=0)
    except MemoryError:
        raise
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DamagedFileError(f"its footer is damaged: {describe(error)}") from error
    if min(row_groups, default=0) < 0 or sum(row_groups) != metadata.num_rows:
        raise DamagedFileError(f"its footer is damaged: {metadata.num_rows} rows, but {sum(row_groups)} in its groups")
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise DamagedFileError(f"several of its columns have one name: {listed(twice)}. Rename all but one")
    images = [field.name for field in schema if is_image_type(field.type)]
    texts = [field.name for field in schema if _is_text(field.type)]
    mask = source.mask or "mask"
    captions = (source.caption, "caption", "text") if source.caption == "txt" else (source.caption,)
    if source.image is not None:
        image = source.image if source.image in images else None
        missing = f"no binary column '{source.image}', which source.image asks for"
    else:
        candidates = [name for name in images if name != mask]
        known = [name for name in IMAGE_COLUMNS if name in candidates]
        image = known[0] if known else candidates[0] if len(candidates) == 1 else None
        missing = f"no column that is known to hold images (binary columns: {listed(candidates)})"
    if image is None:
        raise NoImageColumnError(
            f"it has {missing}; its columns: {listed(schema.names)}. Name the image's in source.image"
        )
    keys = [name for name in KEY_COLUMNS if name in schema.names and _is_key(schema.field(name).type)]
    return Layout(
        image=image,
        caption=next((name for name in captions if name in texts), ""),
        mask=mask if mask in images else "",
        key=keys[0] if keys else "",
        row_groups=row_groups,
        row_bytes=max(0, row_bytes),
        labels=_labels_of(schema),
    )


def _labels_of(schema: pa.Schema) -> Labels:
    """What the metadata of `datasets` says of columns that hold numbers of classes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: tuple(map(str, feature["names"]))
            for name, feature in features.items()
            if isinstance(feature, dict)
            and feature.get("_type") == "ClassLabel"
            and isinstance(feature.get("names"), list)
            and name in schema.names
            and pa.types.is_integer(schema.field(name).type)
        }
    except (KeyError, ValueError, TypeError, AttributeError):  # none, or not as `datasets` writes it
        return {}


def names_of_repeated_keys(file: pq.ParquetFile, layout: Layout) -> dict[int, str]:
    """What follows the shard in the id, for rows whose key is blank or repeated, by row index."""
    if not layout.key:
        return {}
    column = file.read(columns=[layout.key], use_threads=False).column(0)
    # Only blank or repeated keys reach Python: this runs once per task, over all rows of the file.
    is_blank = not pa.types.is_integer(column.type) and pc.any(pc.equal(column.cast(pa.string()), "")).as_py()
    if column.null_count == 0 and not is_blank and len(column.unique()) == len(column):
        return {}
    names = Names()
    given = {}
    for index, scalar in enumerate(column):
        key = _key(_python(scalar), index)
        name, _ = names.take(key, index)
        if name != key:
            given[index] = name
    return given


def rows_of(file: pq.ParquetFile, layout: Layout, rows: range, builder: Builder, batch_rows: int) -> Iterator[ReadRow]:
    """Rows in order, `batch_rows` decoded at a time.

    Raises:
        DamagedFileError: a row group ends early.
    """
    wanted, after = rows, 0
    for group, count in enumerate(layout.row_groups):
        first, after = after, after + count
        rows = range(max(wanted.start, first), min(wanted.stop, after))
        if not rows:
            continue
        # A group is always read from its first row, so that batches, and with them what a damage costs, are the same
        # whichever row was asked for.
        index = first
        for batch in file.iter_batches(batch_size=batch_rows, row_groups=[group], use_threads=False):
            for offset in range(batch.num_rows):
                if index + offset in rows:
                    yield builder.build(batch, offset, index + offset)
            index += batch.num_rows
            if index >= rows.stop:
                break
        if index < rows.stop:
            raise DamagedFileError(f"it ends after {index - first} of its {count} rows")


class Builder:
    """Makes rows out of record batches."""

    def __init__(self, shard: str, source: SourceConfig, layout: Layout, names: dict[int, str]) -> None:
        self.shard = shard
        self.source = source
        self.layout = layout
        self.names = names  # of rows whose key was there before

    def build(self, batch: pa.RecordBatch, offset: int, index: int) -> ReadRow:
        """One row."""
        layout = self.layout
        problems: list[str] = []
        most = self.source.max_member_bytes
        values = {
            name: _held(column[offset], most) for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        key = _key(values.pop(layout.key) if layout.key else None, index)
        held = values[layout.image]
        path = held.get("path") if isinstance(held, dict) else None
        image = self._binary(layout.image, values.pop(layout.image), problems)
        if image is None and not problems:
            problems.append(f"column {layout.image} is empty")
        # A column may be named "", which the layout takes for none.
        mask = self._binary(layout.mask, values.pop(layout.mask), problems) if layout.mask else None
        caption = (values.pop(layout.caption) or "") if layout.caption else ""
        try:
            values, edits = split_edits(values, self.source)
        except RowProblemError as error:
            problems.append(f"row {error}")
            edits = None
        members = {
            name: self._binary(name, values.pop(name), problems)
            for name in batch.schema.names
            if name in values and is_image_type(batch.schema.field(name).type)
        }
        columns = {name: plain(value) for name, value in values.items()}
        sample = Sample(
            id=f"{self.shard}/{self.names.get(index, key)}",
            shard=self.shard,
            key=key,
            index=index,
            image=image or b"",
            image_name=layout.image,
            image_path=path if isinstance(path, str) else "",
            caption=caption.strip(),
            mask=mask,
            edits=edits,
            columns=columns,
            members={name: content for name, content in members.items() if content is not None},
            labels={name: classes for name, classes in layout.labels.items() if name in values},
        )
        return unreadable(sample, problems[0]) if problems else sample

    def _binary(self, name: str, value: Any, problems: list[str]) -> bytes | None:
        """Bytes of a binary column or of a struct{bytes, path}; None where there are none."""
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                problems.append(f"column {name} holds only a path and no bytes: store the image in the file")
            value = value.get("bytes")
        if isinstance(value, _TooLarge):
            most = self.source.max_member_bytes
            problems.append(f"column {name} has {value.size} bytes, more than source.max_member_bytes ({most})")
            return None
        return value


def _key(value: Any, index: int) -> str:
    return f"{index:08d}" if value is None or value == "" else str(value)


@dataclass(frozen=True, slots=True)
class _TooLarge:
    """In place of a binary value that is too large to look at."""

    size: int


def _held(scalar: pa.Scalar, most: int) -> Any:
    """A scalar as a Python value; `_TooLarge` for more than `most` bytes, alone or in an image struct."""
    if pa.types.is_struct(scalar.type) and is_image_type(scalar.type) and scalar.is_valid:
        return {name: _held(value, most) for name, value in scalar.items()}
    if _is_binary(scalar.type) and scalar.is_valid and (size := scalar.as_buffer().size) > most:
        return _TooLarge(size)
    return _python(scalar)


def _python(scalar: pa.Scalar) -> Any:
    """A scalar as a Python value; as text where it is not UTF-8, or a time that Python cannot hold."""
    try:
        return scalar.as_py()
    except MemoryError:
        raise
    except (ValueError, OverflowError, pa.ArrowException):
        if _is_text(scalar.type):
            return scalar.cast(pa.binary()).as_py().decode("utf-8", "backslashreplace")
        try:
            return scalar.cast(pa.string()).as_py()
        except pa.ArrowException:
            return f"a {scalar.type} out of range"


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN as null, times and decimals as text, bytes as base64."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_image_type(kind: pa.DataType) -> bool:
    """Whether a column may hold encoded images: binary, or Hugging Face's struct{bytes, path}."""
    if pa.types.is_struct(kind):
        return any(kind.field(at).name == "bytes" and _is_binary(kind.field(at).type) for at in range(kind.num_fields))
    return bool(_is_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_key(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind))
