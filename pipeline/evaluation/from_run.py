"""Results of the job, read back unit by unit: every row that was asked for, whether in data or in quarantine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.config import OwnSet
from pipeline.evaluation.items import REGION, TRUTH, Item, Result
from pipeline.looking.results import RunFolder
from pipeline.reading.rows import extension
from pipeline.reading.storage import FileSystem
from pipeline.records import EditRequest
from pipeline.writing.merged import Span
from pipeline.writing.spans import table_of

DATA = ("id", "key", "edit", "method", "image", "mask", "input", "request", "seed", "columns", "members")
FAILED = ("id", "key", "edit", "method", "stage", "error_class", "message", "columns", "image")


def units_of(run: RunFolder) -> dict[str, list[Span]]:
    """The files of every committed unit, by its id, in the order of the units."""
    units: dict[str, list[Span]] = {}
    for kind in ("data", "quarantine"):
        for span in run.spans(kind):
            units.setdefault(span.unit, []).append(span)
    return dict(sorted(units.items()))


def results_of(fs: FileSystem, root: str, spans: Sequence[Span], own: OwnSet | None) -> list[Result]:
    """A unit's results, those of one image together.

    Args:
        fs, root: the job's folder.
        spans: of the unit.
        own: says where a set of one's own keeps what is known of its rows; None: a benchmark.
    """
    found: list[tuple[tuple[str, str, str], Result]] = []
    for span in spans:
        columns = DATA if span.kind == "data" else FAILED
        for row in table_of(fs, root, span, columns).to_pylist():
            result = _made(row, own) if span.kind == "data" else _failed(row, own)
            found.append(((row["id"], row["edit"], row["method"]), result))
    return [result for _, result in sorted(found, key=lambda one: one[0])]


def _made(row: Mapping[str, Any], own: OwnSet | None) -> Result:
    members = {member["name"]: member["bytes"] for member in row["members"]}
    return Result(
        item=_item(row, EditRequest.model_validate_json(row["request"]), row["input"]["bytes"], members, own),
        edit="" if own is None else row["edit"],
        method=row["method"],
        image=row["image"]["bytes"],
        mask=row["mask"]["bytes"] if row["mask"] else None,
        seed=row["seed"],
    )


def _failed(row: Mapping[str, Any], own: OwnSet | None) -> Result:
    return Result(
        item=_item(row, EditRequest(), row["image"], {}, own),
        edit="" if own is None else row["edit"],
        method=row["method"],
        reason=f"failed_{row['stage']}",
        message=f"{row['error_class']}: {row['message']}",
    )


def _item(
    row: Mapping[str, Any], request: EditRequest, image: bytes | None, members: Mapping[str, bytes], own: OwnSet | None
) -> Item:
    columns = json.loads(row["columns"])
    if own is None:
        return Item(
            key=row["key"],
            image=image,
            request=request,
            edit_type=columns.get("edit_type") or "",
            language=columns.get("language") or "",
            region=members.get(REGION),
            truth=members.get(TRUTH),
            facts=json.loads(columns.get("facts") or "{}"),
            problem=columns.get("problem") or "",
            notes=tuple(columns.get("notes") or ()),
        )
    kind = columns.get(own.edit_type)
    return Item(
        key=row["id"],
        image=image,
        request=request,
        edit_type=row["edit"] if kind is None else str(kind),
        region=_member(members, own.region),
        truth=_member(members, own.truth),
        facts={"columns": columns},
    )


def _member(members: Mapping[str, bytes], name: str) -> bytes | None:
    """By its name as a column has it, or as an extension; "region" stands for region.png as well."""
    candidates = (name, extension(name), f"{extension(name)}.png")
    return next((members[one] for one in candidates if one in members), None)
