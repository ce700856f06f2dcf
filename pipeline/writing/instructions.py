"""What was asked for in one sentence: given, or made of what the request holds."""

from __future__ import annotations

from pipeline.interventions import Intervention
from pipeline.records import Concept, EditRequest


def instruction_of(request: EditRequest) -> str:
    """The request as one would ask a person for it; "" where nothing in it says what is to change.

    A direction has no words: "move along vector 1 by +16", "move along smile by -8".
    Made of concepts in their order, "add sunglasses, add a hat and remove the beard"; without any, of the prompts,
    'change "a cat" to "a dog"'; several texts are joined. A concept of scale 0 changes nothing and is left out.
    """
    if request.instruction:
        return request.instruction
    if request.subject is not None and not request.source_prompt:  # a scene of no image that it could be made from
        return ""
    if (direction := request.direction) is not None:
        return f"move along {direction.stored or f'vector {direction.vector}'} by {direction.strength:+d}"
    clauses = [_clause(concept) for concept in request.concepts if concept.guidance_scale]
    clauses += [f"{verb} {name}" for one in request.interventions for verb, name in _verbs(one)]
    if clauses:
        *others, last = clauses
        return f"{', '.join(others)} and {last}" if others else last
    source = request.source_prompt
    prompts = (request.target_prompt, *(expert.prompt for expert in request.experts))
    targets = " and ".join(f'"{prompt}"' for prompt in prompts if prompt and prompt != source)
    if not targets:
        return ""
    return f'change "{source}" to {targets}' if source else f"change the image to {targets}"


def _verbs(intervention: Intervention) -> list[tuple[str, str]]:
    """What an intervention does to each concept; a negative strength turns it round, none is none."""
    adds, removes = ("remove", "add") if intervention.strength < 0 else ("add", "remove")
    if not intervention.strength:
        return []
    return [*((adds, name) for name in intervention.add), *((removes, name) for name in intervention.remove)]


def _clause(concept: Concept) -> str:
    removes = (concept.guidance_scale < 0) != (concept.direction == "remove")
    return f"{'remove' if removes else 'add'} {concept.prompt}"
