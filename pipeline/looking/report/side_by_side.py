"""Input, mask and edit of one result in a row, as HTML for notebooks."""

from __future__ import annotations

from html import escape

import numpy as np
from PIL import Image

from pipeline.looking.report.thumbnails import data_uri, mask_over
from pipeline.records import EditRequest

SIDE = 256  # pixels, at most, of a picture on the page


def html(before: Image.Image, mask: Image.Image | None, after: Image.Image, request: EditRequest) -> str:
    """Input, mask and edit in a row, under what was asked.

    Args:
        before, after: RGB, of one size.
        mask: mode "1", of that size; white where the edit acted. None: there is no picture of it.
        request: what was asked.
    """
    small, small_after = (_small(image) for image in (before, after))
    over = {} if mask is None else {"mask": mask_over(small, np.asarray(mask))}
    pictures = {"input": small, **over, "edit": small_after}
    cells = "".join(
        f'<figure style="margin:0 8px 0 0"><img src="{data_uri(image)}" width="{image.width}" height="{image.height}" '
        f'alt="{name}"><figcaption>{name}</figcaption></figure>'
        for name, image in pictures.items()
    )
    return f'<div>{escape(asked(request))}</div><div style="display:flex;flex-wrap:wrap">{cells}</div>'


def asked(request: EditRequest) -> str:
    """An edit in a few words."""
    concepts = []
    for concept in request.concepts:
        removes = (concept.guidance_scale < 0) != (concept.direction == "remove")
        concepts.append(f"{'−' if removes else '+'} {concept.prompt}")
    return ", ".join(concepts) or request.target_prompt


def _small(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)  # leaves what is smaller as it is
    return small
