"""Whether an edit brought its image nearer to what was asked for, by an image-text model."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from pipeline.looking.report.cards import concept_chip
from pipeline.looking.report.thumbnails import small_rgb
from pipeline.looking.results import StoredResult
from pipeline.models.image_text import ImageTextModel

SIDE = 1024  # pixels; a CLIP looks at about 224


def text_gain(result: StoredResult, model: ImageTextModel) -> float | None:
    """How much more an edit is like the words of its request than its input is, in points (100 times the cosine).

    The words are the target prompt or, where there is none, the concepts: the mean over these, with the sign reversed
    for a concept that was to be removed. None for a request without either.

    The edit is looked at in the size in which the run kept its input, at most `SIDE`: a thumbnail is judged beside a
    thumbnail.
    """
    wanted = signed_texts(result.request)
    if not wanted:
        return None
    before = small_rgb(result.input, SIDE)
    after = small_rgb(result.image, SIDE)
    if after.size != before.size:
        after = after.resize(before.size, Image.Resampling.LANCZOS)
    scores = model.scores([np.asarray(before), np.asarray(after)], [text for text, _ in wanted])
    signs = np.array([sign for _, sign in wanted])
    return float(((scores[1] - scores[0]) * signs).mean())


def signed_texts(request: dict[str, Any]) -> list[tuple[str, int]]:
    """What an edit asks for in words, with 1 for what shall be there and -1 for what shall not."""
    if request.get("target_prompt"):
        return [(request["target_prompt"], 1)]
    chips = [concept_chip(concept) for concept in request.get("concepts") or []]
    return [(chip["prompt"], -1 if chip["minus"] else 1) for chip in chips]
