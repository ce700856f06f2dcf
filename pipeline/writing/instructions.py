"""What was asked for in one sentence: given, made of what the request holds, or drawn from templates."""

from __future__ import annotations

import re
from random import Random
from typing import Literal, NamedTuple

from pipeline.interventions import Intervention
from pipeline.records import Concept, EditRequest
from pipeline.settings.instructions import InstructionsConfig, Kind


class Instruction(NamedTuple):
    """A sentence, and where it comes from."""

    text: str
    source: Literal["given", "words", "templates"]
    revision: str  # of the templates; "" of others


def drawn_instruction(request: EditRequest, config: InstructionsConfig, seed: int) -> Instruction:
    """An instruction by templates and synonyms; the given one where there is one, and plain words for what no template
    is for: a direction, an intervention, several texts.

    Args:
        request: what was asked for.
        config: the sentences.
        seed: of the draw.
    """
    plain = instruction_of(request)
    if request.instruction:
        return Instruction(plain, "given", "")
    draw = Random(seed)
    concepts = [concept for concept in request.concepts if concept.guidance_scale]
    if request.direction is None and not request.interventions and not request.experts and request.subject is None:
        if concepts:
            clauses = [_drawn(_verb(one), {"what": one.prompt}, config, draw) for one in concepts]
            return Instruction(_joined(clauses), "templates", config.revision)
        before, after = request.source_prompt, request.target_prompt
        if before and after and before != after:
            words = {"before": f'"{before}"', "after": f'"{after}"'}
            return Instruction(_drawn("change", words, config, draw), "templates", config.revision)
    return Instruction(plain, "words", "")


def _drawn(kind: Kind, words: dict[str, str], config: InstructionsConfig, draw: Random) -> str:
    varied = {name: _with_synonyms(text, config, draw) for name, text in words.items()}
    return draw.choice(config.sentences(kind)).format(**varied)


def _with_synonyms(text: str, config: InstructionsConfig, draw: Random) -> str:
    def other(found: re.Match[str]) -> str:
        word = found[0]
        return draw.choice((word, *config.synonyms.get(word, ())))

    return re.sub(r"[^\W_]+", other, text)


def _joined(clauses: list[str]) -> str:
    *others, last = clauses
    return f"{', '.join(others)} and {last}" if others else last


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
        return _joined(clauses)
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


def _verb(concept: Concept) -> Literal["add", "remove"]:
    removes = (concept.guidance_scale < 0) != (concept.direction == "remove")
    return "remove" if removes else "add"


def _clause(concept: Concept) -> str:
    return f"{_verb(concept)} {concept.prompt}"
