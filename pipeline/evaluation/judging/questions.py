"""What a judge is asked: a text and one or two pictures, as a protocol has it.

    viescore    two questions of two scores, 0..10 (Ku et al., arXiv 2312.14867, task "tie")
    editscore   the same, 0..25, the reasoning first (Luo et al., arXiv 2509.23909)
    imgedit     one question of three scores, 1..5, by the type of edit
    pairwise    which of two edits is better, asked in both orders: judges favour one place

The texts are ours, in prompts/. `judge.prompts` reads others, so that published numbers can be compared with.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pipeline.common.showing import describe
from pipeline.common.special_files import is_special
from pipeline.errors import RecipeError
from pipeline.evaluation.benchmarks.imgedit_bench import CRITERIA
from pipeline.evaluation.judging.answers import Read, read_imgedit, read_preference, read_viescore
from pipeline.records import EditRequest

Protocol = Literal["viescore", "editscore", "imgedit", "pairwise"]
PARTS: dict[str, tuple[str, ...]] = {
    "viescore": ("sc", "pq"),
    "editscore": ("sc", "pq"),
    "imgedit": ("edit",),
    "pairwise": ("ab", "ba"),
}
"""Questions of a protocol: SC how the instruction was carried out, PQ how good the picture is; AB and BA which of two
edits is better, the first shown first or second."""
WHOLE = ("imgedit", "pairwise")  # protocols with one text for all of their questions
BEST = {"viescore": 10.0, "editscore": 25.0}
SHOWN_TYPES = {
    "style": "the picture before and after a change of style",
    "extract": "a picture and the object that was cut out of it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question about one result."""

    row: str  # what it is about: item, edit and method
    part: str  # of the protocol
    text: str
    pictures: tuple[bytes, ...] = field(repr=False)  # encoded, the source before the result
    prompt_hash: str  # SHA-256 of the template
    run: int = 0  # which pass


class Prompts:
    """The templates of a protocol.

    Args:
        protocol: which.
        folder: `NAME.txt` of one's own; None: ours.

    Raises:
        RecipeError: a file is missing or has no place for the instruction.
    """

    def __init__(self, protocol: Protocol, folder: str | None = None) -> None:
        self.protocol = protocol
        self.origin = "own" if folder is None else "folder"
        names = (protocol,) if protocol in WHOLE else tuple(f"{protocol}_{part}" for part in PARTS[protocol])
        if protocol == "imgedit" and folder is not None:
            names = tuple(f"imgedit_{kind}" for kind in CRITERIA)
        self._texts = {name: _text_of(name, folder) for name in names}
        for name, text in self._texts.items():
            if not name.endswith("_pq") and "<instruction>" not in text:
                problem = f"{name}.txt has no <instruction>, in whose place each row's own is put"
                raise RecipeError("judge", [("judge.prompts", problem)])

    def ask(
        self, row: str, request: EditRequest, edit_type: str, source: bytes, result: bytes, run: int = 0
    ) -> list[Question]:
        """The questions about a result.

        Args:
            row: names it.
            request: gives the instruction, see `asked_for`.
            edit_type: of the item.
            source, result: encoded.
            run: which pass.
        """
        return [
            # Of the quality one judges without having seen what it was made of.
            self._question(row, request, edit_type, part, (result,) if part == "pq" else (source, result), run)
            for part in PARTS[self.protocol]
        ]

    def ask_which(
        self, row: str, request: EditRequest, edit_type: str, source: bytes, results: tuple[bytes, bytes], run: int = 0
    ) -> list[Question]:
        """The questions about two results of one edit: the first shown first, then second.

        Args:
            row: names the pair.
            request, edit_type, source, run: as in `ask`.
            results: encoded.
        """
        orders = dict(zip(PARTS["pairwise"], (results, results[::-1]), strict=True))
        return [self._question(row, request, edit_type, part, (source, *shown), run) for part, shown in orders.items()]

    def _question(
        self, row: str, request: EditRequest, edit_type: str, part: str, pictures: tuple[bytes, ...], run: int
    ) -> Question:
        template = self._template(part, edit_type)
        return Question(
            row=row,
            part=part,
            text=_filled(template, asked_for(request), edit_type),
            pictures=pictures,
            prompt_hash=hashlib.sha256(template.encode()).hexdigest(),
            run=run,
        )

    def _template(self, part: str, edit_type: str) -> str:
        if self.protocol == "pairwise":
            return self._texts["pairwise"]
        if self.protocol != "imgedit":
            return self._texts[f"{self.protocol}_{part}"]
        return self._texts["imgedit" if self.origin == "own" else f"imgedit_{edit_type}"]

    def read(self, answer: str, edit_type: str, finish_reason: str) -> Read:
        """An answer's scores."""
        if self.protocol == "imgedit":
            return read_imgedit(answer, edit_type, finish_reason)
        if self.protocol == "pairwise":
            return read_preference(answer, finish_reason)
        return read_viescore(answer, finish_reason, BEST[self.protocol])


def asked_for(request: EditRequest) -> str:
    """What a judge is told that was asked for: the instruction, or the target prompt, or the concepts in words; "" for
    an edit that no words name, such as a direction."""
    concepts = (
        f"{'Add' if (one.direction == 'add') == (one.guidance_scale > 0) else 'Remove'} {one.prompt}."
        for one in request.concepts
        if one.guidance_scale and one.weight
    )
    return request.instruction.strip() or request.target_prompt.strip() or " ".join(concepts)


@cache
def _text_of(name: str, folder: str | None) -> str:
    if folder is None:
        return (files("pipeline.evaluation.judging") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    place = Path(folder) / f"{name}.txt"
    try:
        if is_special(place):
            raise OSError("it is no file")
        return place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("judge", [("judge.prompts", f"{name}.txt cannot be read: {describe(error)}")]) from error


def _filled(template: str, instruction: str, edit_type: str) -> str:
    """The text with the row's own words, each put in once: instructions hold braces, marks and newlines."""
    text = template
    if names := CRITERIA.get(edit_type):
        pictures = SHOWN_TYPES.get(edit_type, "the picture before and after the edit")
        for mark, value in zip(("<first>", "<second>", "<third>"), names, strict=True):
            text = text.replace(mark, value)
        text = text.replace("<edit_type>", edit_type, 1).replace("<pictures>", pictures, 1)
    before, mark, after = text.partition("<instruction>")
    return f"{before}{instruction}{after}" if mark else text


def spread_of(protocol: Protocol, reads: Mapping[str, Sequence[Read]]) -> float | None:
    """Standard deviation of a row's overall score between passes; None for one pass, or where a pass has no score."""
    passes = len(next(iter(reads.values())))
    single = [
        scores_of(protocol, {part: [some[at]] for part, some in reads.items()})["overall"] for at in range(passes)
    ]
    numbers = [one for one in single if one is not None]
    return statistics.stdev(numbers) if len(numbers) == passes > 1 else None


def preference_of(reads: Mapping[str, Sequence[Read]]) -> float | None:
    """How much the first of two results is preferred, -1..1: the mean over both orders and all passes. None where an
    answer has no choice: one order alone would be another figure."""
    choices = [
        sign * one.scores[0] if one.scores else None for sign, part in ((1, "ab"), (-1, "ba")) for one in reads[part]
    ]
    return _mean(choices)


def scores_of(protocol: Protocol, reads: Mapping[str, Sequence[Read]]) -> dict[str, float | None]:
    """The scores of a row from its answers, by part and pass.

    A part's score is the least of its numbers, the mean over passes; `overall` the root of the product of both parts',
    by pass, or of ImgEdit the mean of three, rounded as its official script does. None where an answer has no score.
    """
    if protocol == "imgedit":
        means = [round(sum(one.scores) / len(one.scores), 2) if one.scores else None for one in reads["edit"]]
        return {"overall": _mean(means)}
    scale = BEST[protocol] / 10.0
    parts = {part: [min(one.scores) / scale if one.scores else None for one in reads[part]] for part in ("sc", "pq")}
    roots = [
        None if sc is None or pq is None else math.sqrt(sc * pq)
        for sc, pq in zip(parts["sc"], parts["pq"], strict=True)
    ]
    return {"sc": _mean(parts["sc"]), "pq": _mean(parts["pq"]), "overall": _mean(roots)}


def _mean(values: Sequence[float | None]) -> float | None:
    """Of all passes, or None: some passes alone would be another mean."""
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None
