"""What an attempt asks for, and by which methods: the recipe's own, varied as `best_of.vary` says."""

from __future__ import annotations

from pipeline.records import EditRequest
from pipeline.settings.best_of import Variation


def varied_request(request: EditRequest, variation: Variation | None) -> EditRequest:
    """A request with its concepts' scales and thresholds varied."""
    if variation is None:
        return request
    concepts = tuple(
        concept.model_copy(
            update={
                "guidance_scale": concept.guidance_scale * variation.scale,
                "threshold": concept.threshold if variation.threshold is None else variation.threshold,
            }
        )
        for concept in request.concepts
    )
    return request.model_copy(update={"concepts": concepts})
