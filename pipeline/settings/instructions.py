"""The recipe's section of instructions: how an edit that brings none is put into words."""

from __future__ import annotations

import hashlib
import json
import string
from typing import Literal

from pydantic import Field, field_validator

from pipeline.settings.sections import Section

Kind = Literal["add", "remove", "change"]
PLACES: dict[Kind, tuple[str, ...]] = {"add": ("what",), "remove": ("what",), "change": ("before", "after")}
TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "add": ("add {what}", "put {what} into the picture", "let there be {what}"),
    "remove": ("remove {what}", "take {what} away", "get rid of {what}"),
    "change": ("change {before} to {after}", "turn {before} into {after}", "make {before} become {after}"),
}


class InstructionsConfig(Section):
    """Sentences for what edits ask, drawn for every row: who trains on the results meets more than one wording."""

    templates: dict[Kind, tuple[str, ...]] = Field(default_factory=dict)
    """Sentences by kind of change, in place of the built-in ones: `add` and `remove` with {what}, which a concept
    fills, `change` with {before} and {after}, which the prompts fill."""
    synonyms: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Other words for a word of concepts and prompts; it stays itself as often as each of them takes its place."""

    rewritten: bool = False
    """The judge of the gates looks at each result that passes all of them, and says what would have been asked for: its
    sentence takes the place of the given one, which stays beside it."""

    @field_validator("templates")
    @classmethod
    def _have_their_places(cls, value: dict[Kind, tuple[str, ...]]) -> dict[Kind, tuple[str, ...]]:
        for kind, sentences in value.items():
            if not sentences:
                raise ValueError(f"{kind} has no sentence. Give one, or leave it out")
            for sentence in sentences:
                if places_of(sentence) != sorted(PLACES[kind]):
                    wanted = " and ".join(f"{{{name}}}" for name in PLACES[kind])
                    raise ValueError(f"{kind}: '{sentence}' must have {wanted}, once, and nothing else in braces")
        return value

    @field_validator("synonyms")
    @classmethod
    def _are_words(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for word, others in value.items():
            if not word.strip() or len(word.split()) > 1 or not others or not all(other.strip() for other in others):
                raise ValueError(f"'{word}' must be one word, with one or more others that are not empty")
        return value

    def sentences(self, kind: Kind) -> tuple[str, ...]:
        """Of a kind of change."""
        return self.templates.get(kind) or TEMPLATES[kind]

    @property
    def revision(self) -> str:
        """What tells these sentences and words from others: 16 hexadecimal digits of their SHA-256."""
        told = {"templates": {kind: self.sentences(kind) for kind in PLACES}, "synonyms": self.synonyms}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def places_of(sentence: str) -> list[str]:
    """Names in braces, sorted; [""] of a sentence whose braces do not match."""
    try:
        parts = list(string.Formatter().parse(sentence))
    except ValueError:
        return [""]
    return sorted(name if not (spec or conversion) else "" for _, name, spec, conversion in parts if name is not None)
