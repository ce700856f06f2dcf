"""From a judge's words to scores, or to a reason why there are none: never a guess.

A class that is no score: empty, truncated, refusal, no_json, no_score, no_choice, not_a_number, score_count,
out_of_range; that is no sentence: no_sentence, long_sentence.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.benchmarks.imgedit_bench import CRITERIA

SHORT = 400  # characters of a text that may be a refusal
MARKS = "||V^=^V||"  # what the official prompt asks a judge to put around its JSON
APOLOGIES = re.compile(
    r"\b(sorry|apologi[sz]e|cannot|can't|can not|unable|not able to|won't|decline)\b|抱歉|无法|不能", re.IGNORECASE
)
NUMBER = r"[-+]?\d+(?:\.\d+)?"
WITHOUT_SCORES = {"length": "truncated", "refusal": "refusal"}
"""What an answer without scores is, by the endpoint's own reason of its end."""
CHOICES = {"a": 1.0, "b": -1.0, "tie": 0.0}
MOST_SENTENCE = 400  # characters of an instruction; more is a description
MOST_WHOLE = 1_000_000  # beyond any range
CAPPED = "cap_broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """An answer as it was read."""

    scores: tuple[float, ...] = ()
    flags: tuple[str, ...] = ()  # what was unusual of an answer that counts
    reason: str = ""  # class; "" where there are scores
    reasoning: str = ""  # the judge's own words


class _NoScoreError(Exception):
    """Carries the class."""


def read_viescore(text: str, finish_reason: str = "stop", most: float = 10.0) -> Read:
    """Two scores, each 0..`most`, as VIEScore and EditScore ask for them.

    Args:
        text: the answer.
        finish_reason: as the endpoint says it; "length" where the answer was cut.
        most: the best score.
    """
    try:
        document, flags = _document(text)
        scores, more = _two_scores(document["score"], most)
    except _NoScoreError as error:
        return Read(reason=_why(str(error), text, finish_reason))
    reasoning = document.get("reasoning", "")
    return Read(scores=scores, flags=(*flags, *more), reasoning=reasoning if isinstance(reasoning, str) else "")


def read_preference(text: str, finish_reason: str = "stop") -> Read:
    """Which of two edits is better: one score, 1 for A, -1 for B, 0 for neither.

    Args:
        text: the answer, a JSON object with `better`.
        finish_reason: as the endpoint says it; "length" where the answer was cut.
    """
    try:
        document, flags = _document(text, "better")
    except _NoScoreError as error:
        bare = CHOICES.get(text.strip().strip(".*\"' ").casefold())
        if bare is not None:
            return Read(scores=(bare,), flags=("repaired",))
        return Read(reason=_why(str(error), text, finish_reason))
    said = document["better"]
    choice = CHOICES.get(said.strip().casefold()) if isinstance(said, str) else None
    if choice is None:
        return Read(reason="no_choice")
    reasoning = document.get("reasoning", "")
    return Read(scores=(choice,), flags=flags, reasoning=reasoning if isinstance(reasoning, str) else "")


def read_sentence(text: str, finish_reason: str = "stop") -> Read:
    """An instruction, as `reasoning`: an answer without scores.

    Args:
        text: the answer, a JSON object with `instruction`: a sentence, or null where there is nothing to be said.
        finish_reason: as the endpoint says it; "length" where the answer was cut.
    """
    try:
        document, flags = _document(text, "instruction")
    except _NoScoreError as error:
        return Read(reason=_why(str(error), text, finish_reason))
    said = document["instruction"]
    sentence = " ".join(said.split()) if isinstance(said, str) else ""
    if not sentence:
        return Read(reason="no_sentence")
    if len(sentence) > MOST_SENTENCE:
        return Read(reason="long_sentence")
    return Read(flags=flags, reasoning=sentence)


def _why(reason: str, text: str, finish_reason: str) -> str:
    """The class of an answer without scores; a cut or a refusal says more than that JSON is missing."""
    if reason not in ("no_json", "no_score"):
        return reason
    if finish_reason in WITHOUT_SCORES:
        return WITHOUT_SCORES[finish_reason]
    said = _without_thoughts(text) or ""
    return "refusal" if reason == "no_json" and len(said) <= SHORT and APOLOGIES.search(said) else reason


def _document(text: str, key: str = "score") -> tuple[dict[str, Any], tuple[str, ...]]:
    """The object with a key that an answer holds, or is meant to hold, and how it was found."""
    if not text.strip():
        raise _NoScoreError("empty")
    said = _without_thoughts(text)
    if said is None:
        raise _NoScoreError("truncated")
    said = re.sub(r"```[a-zA-Z]*", " ", said).replace(MARKS, " ").strip()
    objects = list(_objects(said))
    if scored := [one for one in objects if key in one] or list(_inner(objects, key)):
        return scored[-1], ()
    if (repaired := _repaired(said, key)) is not None:
        return repaired, ("repaired",)
    if objects:
        raise _NoScoreError("no_score")
    if key != "score":
        raise _NoScoreError("no_json")
    for form, flags in ((said, ("bare_list",)), (_plain(said), ("repaired", "bare_list"))):
        if lists := re.findall(rf"\[\s*({NUMBER})\s*,\s*({NUMBER})\s*\]", form):
            return {"score": [float(one) for one in lists[-1]]}, flags
    if re.fullmatch(NUMBER, said):
        return {"score": [float(said)]}, ()
    raise _NoScoreError("no_json")


def _without_thoughts(text: str) -> str | None:
    """An answer without what a thinking model thought; None where it never stopped."""
    said = re.sub(r"<think>.*?</think>", " ", text, flags=re.DOTALL)
    return None if "<think>" in said else said


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Whole JSON objects in a text, those inside of others left out, in their order."""
    decoder, at = json.JSONDecoder(), 0
    while (at := text.find("{", at)) >= 0:
        try:
            found, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        if isinstance(found, dict):
            yield found


def _inner(found: Sequence[Any], key: str) -> Iterator[dict[str, Any]]:
    """Objects with a key inside of objects."""
    for one in found:
        values = list(one.values()) if isinstance(one, dict) else one
        yield from (value for value in values if isinstance(value, dict) and key in value)
        yield from _inner([value for value in values if isinstance(value, (dict, list))], key)


def _plain(text: str) -> str:
    """Full-width forms and curly quotes as plain ones."""
    return unicodedata.normalize("NFKC", text).translate({0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'"})


def _repaired(text: str, name: str) -> dict[str, Any] | None:
    """The last object with a key that almost is JSON; None where there is none.

    A list of scores that is cut inside is none: libraries read "[7, " as 7.
    """
    from json_repair import repair_json

    plain = _plain(text)
    for begin in reversed([found.start() for found in re.finditer(r"\{", plain)]):
        part = plain[begin:]
        if not (key := re.search(rf"{name}['\"]?\s*:", part)):
            continue
        if re.match(r"\s*\[[^\]]*$", part[key.end() :]):
            raise _NoScoreError("truncated")
        try:
            found = repair_json(part, return_objects=True)
        except (ValueError, RecursionError):  # a number of thousands of digits, a thousand brackets
            continue
        while isinstance(found, list) and found:  # words behind the object make it a list
            found = found[0]
        if isinstance(found, dict) and name in found:
            return found
    return None


def _two_scores(value: Any, most: float) -> tuple[tuple[float, ...], tuple[str, ...]]:
    values = value if isinstance(value, list) else [value]
    if not 1 <= len(values) <= 2:
        raise _NoScoreError("score_count")
    flags = ("single_score",) if len(values) == 1 else ()
    if any(isinstance(one, str) for one in values):
        flags = ("repaired", *flags)
    scores = tuple(_number(one) for one in values)
    if not all(0 <= score <= most for score in scores):
        raise _NoScoreError("out_of_range")
    return scores, flags


def _number(value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(NUMBER, value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _NoScoreError("not_a_number")
    if isinstance(value, int) and abs(value) > MOST_WHOLE:  # which no float need hold
        raise _NoScoreError("out_of_range")
    if not math.isfinite(value):
        raise _NoScoreError("not_a_number")
    return float(value)


def read_imgedit(text: str, edit_type: str, finish_reason: str = "stop") -> Read:
    """Three scores, each 1..5, in the order of the type's criteria.

    Args:
        text: the answer.
        edit_type: a key of `CRITERIA`.
        finish_reason: as the endpoint says it; "length" where the answer was cut.
    """
    said = _without_thoughts(text)
    if not text.strip():
        return Read(reason="empty")
    if said is None:
        return Read(reason="truncated")
    names = CRITERIA[edit_type]
    found = [_last_named(said, name) for name in names]
    flags = () if _is_official(said, names) else ("repaired",)
    if not any(value is not None for value in found):
        lines = _named_lines(said)
        if len(lines) == len(names):
            found, flags = list(lines), ("unnamed",)
    scores = tuple(value for value in found if value is not None)
    if any(not 1 <= score <= 5 for score in scores):
        return Read(reason="out_of_range")
    if len(scores) < len(names):
        if finish_reason in WITHOUT_SCORES:
            return Read(reason=WITHOUT_SCORES[finish_reason])
        is_refusal = not scores and len(said) <= SHORT and APOLOGIES.search(said)
        return Read(reason="refusal" if is_refusal else "score_count")
    if max(scores[1:]) > scores[0]:
        flags = (*flags, CAPPED)
    return Read(scores=scores, flags=flags, reasoning=_reasoning(said))


def _last_named(text: str, name: str) -> float | None:
    """The number that follows a criterion's name, where it stands last."""
    words = [r"\s+".join(re.escape(word) for word in part.split()) for part in name.casefold().split("&")]
    spelled = r"\s*(?:&|＆|\band\b)\s*".join(words)
    # "Physical Consistency" begins another criterion's name, and "Naturalness" may end one: the colon decides.
    found = re.findall(
        rf"{spelled}[\s\"'*_`]*[:：][\s\"'*_`]*([-+]?\d[\d.]*(?:\s*/\s*\d+)?)",
        unicodedata.normalize("NFC", text.casefold()),
    )
    # A share of another number than 5 is no score, and neither is "4.5.6".
    read = re.fullmatch(rf"({NUMBER})\.?(?:\s*/\s*5)?", found[-1]) if found else None
    return float(read[1]) if read else None


def _is_official(text: str, names: Sequence[str]) -> bool:
    """Whether an answer has the form that was asked for: words, then one line with a whole number per criterion."""
    stripped = [line.strip() for line in text.splitlines()]
    lines = [line for line in stripped if re.search(r":\s*\d+$", line) and not line.startswith("Brief reasoning:")]
    return len(lines) == len(names) and all(
        re.fullmatch(rf"{re.escape(name)}: \d+", line) for name, line in zip(names, lines, strict=True)
    )


def _named_lines(text: str) -> list[float]:
    """Numbers of the lines `Name: number` other than the reasoning."""
    lines = [re.sub(r"[*_`#>-]+", " ", line).strip() for line in text.splitlines()]
    found = [re.fullmatch(rf"([^:：]+)[:：]\s*({NUMBER})(?:\s*/\s*5)?\.?", line) for line in lines]
    return [float(one[2]) for one in found if one and "reason" not in one[1].casefold()]


def _reasoning(text: str) -> str:
    found = re.search(r"reasoning\**\s*[:：]\s*(.*)", text, re.IGNORECASE)
    return found[1].strip() if found else ""
