"""Rows as JSON and blobs: how they travel between processes. No pickle: what comes from a data set stays data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.samples import ReadRow, Sample, Unreadable

Labels = Mapping[str, tuple[str, ...]]
"""Columns of the source that hold numbers of classes, and the classes' names."""


def pack_row(row: ReadRow, blobs: list[bytes]) -> dict[str, Any]:
    """A row but for its labels, as JSON has it; its bytes are added to `blobs`."""

    def blob(data: bytes) -> int:
        blobs.append(data)
        return len(blobs) - 1

    sample = row.sample if isinstance(row, Unreadable) else row
    packed: dict[str, Any] = {
        "id": sample.id,
        "shard": sample.shard,
        "key": sample.key,
        "index": sample.index,
        "image": blob(sample.image),
        "image_name": sample.image_name,
        "image_path": sample.image_path,
        "caption": sample.caption,
        "mask": None if sample.mask is None else blob(sample.mask),
        # Bytes are JSON text that nobody has parsed yet; they keep their kind, since errors speak of it.
        "edits": {"blob": blob(sample.edits)} if isinstance(sample.edits, bytes) else {"value": sample.edits},
        "columns": dict(sample.columns),
        "members": {name: blob(data) for name, data in sample.members.items()},
        "set_id": sample.set_id,
        "blank": sample.blank,
    }
    if isinstance(row, Unreadable):
        packed["unreadable"] = [row.error_class, row.message]
    return packed


def unpack_row(packed: Mapping[str, Any], blobs: Sequence[bytes], labels: Labels) -> ReadRow:
    """Inverse of `pack_row`."""
    edits: Mapping[str, Any] = packed["edits"]
    sample = Sample(
        id=packed["id"],
        shard=packed["shard"],
        key=packed["key"],
        index=packed["index"],
        image=blobs[packed["image"]],
        image_name=packed["image_name"],
        image_path=packed["image_path"],
        caption=packed["caption"],
        mask=None if packed["mask"] is None else blobs[packed["mask"]],
        edits=blobs[edits["blob"]] if "blob" in edits else edits["value"],
        columns=packed["columns"],
        members={name: blobs[at] for name, at in packed["members"].items()},
        labels=labels,
        set_id=packed["set_id"],
        blank=packed["blank"],
    )
    if "unreadable" in packed:
        error_class, message = packed["unreadable"]
        return Unreadable(sample=sample, error_class=error_class, message=message)
    return sample
