"""An evaluation's unit of account: one image, one edit that every method is asked for, and what came of it.

Sets of such items (benchmarks/) are written as Parquet once, and read from there like any other source: what a method
needs becomes a row's image and edit request, what only the measures need travels in columns and members beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.records import EditRequest
from pipeline.writing.rows import json_text, utf8_text

REGION, TRUTH = "region", "truth"  # members of a row
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.binary()),
        ("edit", pa.string()),
        (REGION, pa.binary()),
        (TRUTH, pa.binary()),
        ("edit_type", pa.string()),
        ("language", pa.string()),
        ("facts", pa.string()),
        ("problem", pa.string()),
        ("notes", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image and one edit of a set."""

    key: str  # unique in its set
    image: bytes | None  # encoded input; None: `problem` says why
    request: EditRequest
    edit_type: str = ""  # as the set names it
    language: str = ""  # of the instruction; "" where the set has one only
    region: bytes | None = None  # encoded mask at the image's size: white shall change. None: not known
    truth: bytes | None = None  # encoded picture of the perfect outcome; None: not known
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else the set says of it, JSON-able
    problem: str = ""  # "class: why", of an item that no method can be measured on
    notes: tuple[str, ...] = ()  # classes of oddities that exclude nothing

    @property
    def excluded(self) -> str:
        """Class of the problem, or ""."""
        return self.problem.partition(":")[0]

    def as_row(self) -> dict[str, Any]:
        """One row of `SCHEMA`."""
        request = self.request.model_dump(mode="json", exclude_defaults=True)
        return {
            "key": utf8_text(self.key),
            # A row without an image is one that the reading side refuses: nothing is spent on it.
            "image": None if self.problem else self.image,
            "edit": json_text(request) if request else None,
            REGION: self.region,
            TRUTH: self.truth,
            "edit_type": utf8_text(self.edit_type),
            "language": self.language,
            "facts": json_text(dict(self.facts)),
            "problem": utf8_text(self.problem),
            "notes": list(self.notes),
        }

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Item:
        """The item of a row of `SCHEMA`."""
        return cls(
            key=row["key"],
            image=row["image"],
            request=EditRequest.model_validate_json(row["edit"] or "{}"),
            edit_type=row["edit_type"],
            language=row["language"],
            region=row[REGION],
            truth=row[TRUTH],
            facts=json.loads(row["facts"]),
            problem=row["problem"],
            notes=tuple(row["notes"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one method made of one item: a picture, or a reason why there is none."""

    item: Item
    edit: str  # name of the edit; "" in sets that ask for one of each image
    method: str
    image: bytes | None = None  # encoded
    mask: bytes | None = None  # encoded, of the method's own region
    seed: int | None = None
    reason: str = ""  # class; "" where there is a picture
    message: str = ""  # the reason in words
    shown_source: bytes | None = None  # the input as a foreign run kept it for its judge

    @property
    def pictures(self) -> tuple[bytes, bytes]:
        """Input and result, of a row that has both."""
        assert self.item.image is not None, f"{self.item.key} has no input, and a problem"
        assert self.image is not None, f"{self.item.key} has no result, and a reason"
        return self.item.image, self.image
