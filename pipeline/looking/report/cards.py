"""What a report's page shows of an image: its input once, every result beside it, and what failed.

Pictures are 256 pixels on their longer side, as WebP inside the page; a mask is one bit per pixel. They are made small
as soon as they are read: of a page nothing else is held.
Cost: 15 ms of one core per result of 300 x 300, about 20 of 512 x 512, most of it decoding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline.evaluation.verdict import Verdict
from pipeline.looking.report.selection import Gains, ImageRow, ResultKey, Verdicts, key_of
from pipeline.looking.report.thumbnails import data_uri, mask_uri, small_mask, small_rgb
from pipeline.looking.results import ResultRef, StoredResult

MAX_CAPTION = 400  # characters of a caption or prompt that a page shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What is shown of a result: its words, and its pictures as a page holds them."""

    caption: str
    request: dict[str, Any]
    input: Markup | None
    ratio: str  # of the input
    mask: Markup | None
    image: Markup


def pictures_of(result: StoredResult, with_input: bool) -> Pictures:
    """Made from what is stored, one picture after the other."""
    before = small_rgb(result.input) if with_input else None
    return Pictures(
        caption=result.caption[:MAX_CAPTION],
        request=result.request,
        input=None if before is None else Markup(data_uri(before)),
        ratio=ratio_of(before.size) if before else "1",
        mask=None if result.mask is None else Markup(mask_uri(small_mask(result.mask))),
        image=Markup(data_uri(small_rgb(result.image))),
    )


def image_card(
    row: ImageRow, pictures: Mapping[ResultKey, Pictures], verdicts: Verdicts, gains: Gains
) -> dict[str, Any]:
    """One image with all that was made of it. Results stand in the order of edits and methods, as everywhere."""
    first = row.refs[0] if row.refs else None
    shown = pictures[key_of(first)] if first else None
    caption = shown.caption if shown else ""
    name = short_name(row.id)
    tiles = [
        result_tile(ref, pictures[key_of(ref)], verdicts[key_of(ref)], gains.get(key_of(ref)), name) for ref in row.refs
    ]
    tiles += [failed_tile(failure) for failure in row.failures]
    tiles.sort(key=lambda tile: (tile["edit"], tile["method"], tile.get("attempt") or 0))
    return {
        "id": row.id,
        "caption": caption,
        "tiles": tiles,
        "limit": first and first.figures.get("reconstruction_psnr"),
        "input": shown and shown.input,
        "ratio": shown.ratio if shown else "1",
        "input_alt": f"input: {name}" + (f", {caption}" if caption else ""),
    }


def short_name(id: str) -> str:
    """The last part of an id: what people call the image."""
    return id.rpartition("/")[2] or id


def ratio_of(size: tuple[int, int]) -> str:
    """Width to height, as CSS takes it. A strip is shown whole, with room beside it."""
    return f"{min(max(size[0] / size[1], 0.7), 1.8):.3g}"


def result_tile(ref: ResultRef, shown: Pictures, verdict: Verdict, gain: float | None, name: str) -> dict[str, Any]:
    """One result."""
    request = shown.request
    concepts = [concept_chip(concept) for concept in request.get("concepts") or []]
    target = (request.get("target_prompt") or "")[:MAX_CAPTION]
    share = ref.figures.get("mask_share")
    return {
        "failed": None,
        "edit": ref.edit,
        "method": ref.method,
        "concepts": concepts,
        "names": concept_names(concepts),
        "target_prompt": target,
        "prompts": " ".join(request.get(part) or "" for part in ("source_prompt", "negative_prompt")).strip(),
        "image": shown.image,
        "mask": shown.mask,
        "alt": f"edited: {asked(concepts, target) or ref.edit}, {name}",
        "mask_alt": ""
        if share is None
        else f"mask: {'less than 1' if share < 0.005 else f'{100 * share:.0f}'} % of the picture",
        "mask_percent": None if share is None else 100 * share,
        "figures": ref.figures,
        "verdict": verdict,
        "gain": gain,
        "outcomes": " ".join(filter(None, [outcomes(verdict), "rejected" if ref.is_rejected else ""])),
        "rejected": rejections(ref),
        "attempt": ref.attempt,
        "place": f"{ref.file}, row {ref.row_in_file}",
    }


def rejections(ref: ResultRef) -> list[str]:
    """The gates that rejected a result, and by which figures; or that another attempt was chosen."""
    values = {name: ref.figures.get(name) for name in ref.reasons}
    found = [name if value is None else f"{name} {value:.3g}" for name, value in values.items()]
    return found or (["another attempt was chosen"] if ref.is_rejected else [])


def failed_tile(failure: Mapping[str, str]) -> dict[str, Any]:
    """One result that could not be made."""
    return {
        "failed": failure,
        "edit": failure["edit"],
        "method": failure["method"],
        "names": "[]",
        "outcomes": "failed",
    }


def outcomes(verdict: Verdict) -> str:
    """The filter's words for a result, apart by spaces."""
    found = []
    if verdict.edit == "done" and verdict.rest in (None, "kept"):
        found.append("good")
    if verdict.edit in ("nothing changed", "faint", "off target"):
        found.append(verdict.edit.replace(" ", "-"))
    if verdict.rest in ("drifted", "changed"):
        found.append("drifted")
    return " ".join(found)


def concept_chip(concept: Mapping[str, Any]) -> dict[str, Any]:
    """A concept's prompt, and whether it is taken away."""
    removes = (concept.get("guidance_scale", 0) < 0) != (concept.get("direction") == "remove")
    return {"prompt": concept.get("prompt", ""), "minus": removes}


def concept_names(concepts: Sequence[Mapping[str, Any]]) -> str:
    """The concepts as JSON, for the filter: one prompt may hold whatever would part them otherwise."""
    return json.dumps([f"{'−' if concept['minus'] else '+'} {concept['prompt']}" for concept in concepts])


def asked(concepts: Sequence[Mapping[str, Any]], target: str) -> str:
    """What an edit was to do, in words: "sunglasses added, a smile removed"."""
    words = [f"{concept['prompt']} {'removed' if concept['minus'] else 'added'}" for concept in concepts]
    return ", ".join(words) or target
