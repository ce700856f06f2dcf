"""The page of an audit: counts, and examples of each finding with their pictures; opens from disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pipeline
from pipeline.common.showing import public_url
from pipeline.errors import DecodeError
from pipeline.looking.report.templates import page_template
from pipeline.looking.report.thumbnails import data_uri, small_mask, small_rgb, thumbnail
from pipeline.pairs.records import Finding, Pair

if TYPE_CHECKING:
    from pipeline.pairs.audit import Audit

SIDE = 192  # pixels of a picture


@dataclass(frozen=True, slots=True)
class Example:
    """A finding with its pair."""

    finding: Finding
    pair: Pair


def page_of(found: Audit, url: str, examples: Sequence[Example]) -> str:
    """The page as HTML."""
    data = found.as_dict()
    kinds = [
        {
            "name": kind,
            **counted,
            "examples": [_card(one) for one in examples if one.finding.finding == kind],
            "details": [one for one in found.findings if one.finding == kind and one.index < 0],
        }
        for kind, counted in data["findings"].items()
    ]
    return page_template("audit.html.j2", "pipeline.pairs").render(
        url=public_url(url), found=found, data=data, kinds=kinds, version=pipeline.__version__
    )


def _card(example: Example) -> dict[str, Any]:
    pair = example.pair
    return {
        "finding": example.finding,
        "prompt": pair.prompt or "",
        "pictures": [_picture(data) for data in (pair.source, pair.edited)],
        "mask": _picture(pair.mask, is_mask=True) if pair.mask else None,
    }


def _picture(data: bytes | None, *, is_mask: bool = False) -> str | None:
    """As a data URI; None where there is no picture to show."""
    if not data:
        return None
    try:
        return data_uri(thumbnail(small_mask(data, SIDE) if is_mask else small_rgb(data, SIDE), SIDE))
    except (DecodeError, OSError, ValueError):
        return None
