"""The gallery of a library's concepts, as one page of HTML: which images have most of each, for the eye to judge."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Concepts</title><style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h2 { margin: 1.6rem 0 .2rem; font-size: 1.1rem; } p { margin: .1rem 0 .4rem; color: #666; }
figure { display: inline-block; margin: 0 .4rem .4rem 0; } figcaption { font-size: .75rem; color: #666; }
</style></head><body>
<h1>Concepts</h1>
<p>Each with the images that have most of it: mean strength of its features over all places.</p>
{% for one in entries %}<h2>{{ one.concept }}</h2>
<p>{{ one.block }}, time {{ one.time }}, features {{ one.features | join(", ") }},
IoU {{ "%.2f" | format(one.iou) }}</p>
{% for name, strength, image in one.images %}<figure><img src="data:image/jpeg;base64,{{ image | data }}"
 alt="{{ name }}" title="{{ name }}"><figcaption>{{ "%.3g" | format(strength) }}</figcaption></figure>
{% endfor %}{% endfor %}</body></html>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GalleryEntry:
    """One concept."""

    concept: str
    block: str
    time: float
    features: tuple[int, ...]
    iou: float
    images: tuple[tuple[str, float, bytes], ...]  # id, strength, JPEG; most first


def page_of(entries: Sequence[GalleryEntry]) -> str:
    """The page; names are escaped, nothing is fetched."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["data"] = lambda image: base64.b64encode(image).decode()
    return environment.from_string(PAGE).render(entries=entries)
