"""What `denoise_gain` compares, and which runs measure it: told by the recipe and the request, before any model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pipeline.engine.backbone import Offers
from pipeline.records import Concept, EditRequest

if TYPE_CHECKING:
    from pipeline.settings.best_of import BestOfConfig
    from pipeline.settings.gates import GatesConfig

GAIN = "denoise_gain"
"""The figure: see gating/gain.py."""


class ComparedTexts(NamedTuple):
    """What a picture shows before an edit and after it, in words."""

    source: str
    target: str


def compared_texts(request: EditRequest) -> ComparedTexts | None:
    """The texts that an edit is judged by; None: nothing that it asks for has words, or both are the same.

    They are the request's prompts, where it has a target prompt. Else they are made of its concepts: those that shall
    come are added to the source prompt after commas, those that shall go stand so in the source's text.
    """
    source, target = request.source_prompt, request.target_prompt
    if not target:
        acting = [one for one in request.concepts if one.guidance_scale and one.weight]
        if not acting:
            return None
        gone = [one.prompt for one in acting if _removes(one)]
        come = [one.prompt for one in acting if not _removes(one)]
        source, target = (", ".join(filter(None, (request.source_prompt, *some))) for some in (gone, come))
    return None if source == target else ComparedTexts(source, target)


def _removes(concept: Concept) -> bool:
    """A negative scale turns a concept's direction round."""
    return (concept.guidance_scale < 0) != (concept.direction == "remove")


def measures_gain(gates: GatesConfig | None, best_of: BestOfConfig | None) -> bool:
    """Whether a run pays for the figure: a gate judges it, or attempts are ranked by it."""
    if gates is None:
        return False
    return GAIN in gates.gates or (best_of is not None and best_of.ranked_by(gates) == GAIN)


def gain_problems(offers: Offers) -> Iterator[str]:
    """Why a model that offers this cannot tell two texts apart, and the way out."""
    way_out = "Set gates.denoise_gain to null and best_of.rank_by to another figure, or use another checkpoint"
    if offers.inputs:
        taken = ", ".join(sorted(offers.inputs))
        yield f"denoise_gain needs a network that reads latents and text alone; this one takes {taken} too. {way_out}"
    if offers.distilled:
        yield f"{offers.distilled}: what such a model predicts is no noise that errors could be taken of. {way_out}"
