"""From a judge's words to scores, or to a reason why there are none: never a guess.

A class that is no score: empty, truncated, refusal, no_json, no_score, not_a_number, score_count, out_of_range.
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


def _why(reason: str, text: str, finish_reason: str) -> str:
    """The class of an answer without scores; a cut or a refusal says more than that JSON is missing."""
    if reason not in ("no_json", "no_score"):
        return reason
    if finish_reason == "length":
        return "truncated"
    said = _without_thoughts(text) or ""
    return "refusal" if reason == "no_json" and len(said) <= SHORT and APOLOGIES.search(said) else reason


def _document(text: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The object with a score that an answer holds, or is meant to hold, and how it was found."""
    if not text.strip():
        raise _NoScoreError("empty")
    said = _without_thoughts(text)
    if said is None:
        raise _NoScoreError("truncated")
    said = re.sub(r"```[a-zA-Z]*", " ", said).replace(MARKS, " ").strip()
    objects = list(_objects(said))
    if scored := [one for one in objects if "score" in one]:
        return scored[-1], ()
    if (repaired := _repaired(said)) is not None:
        return repaired, ("repaired",)
    if objects:
        raise _NoScoreError("no_score")
    if lists := re.findall(rf"\[\s*{NUMBER}\s*,\s*{NUMBER}\s*\]", said):
        return {"score": json.loads(lists[-1].replace("+", ""))}, ("bare_list",)
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


def _repaired(text: str) -> dict[str, Any] | None:
    """The last object with a score that almost is JSON; None where there is none.

    A list of scores that is cut inside is none: libraries read "[7, " as 7.
    """
    from json_repair import repair_json

    plain = unicodedata.normalize("NFKC", text).translate({0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'"})
    for begin in reversed([found.start() for found in re.finditer(r"\{", plain)]):
        part = plain[begin:]
        if not (key := re.search(r"score['\"]?\s*:", part)):
            continue
        if re.match(r"\s*\[[^\]]*$", part[key.end() :]):
            raise _NoScoreError("truncated")
        found = repair_json(part, return_objects=True)
        while isinstance(found, list) and found:  # words behind the object make it a list
            found = found[0]
        if isinstance(found, dict) and "score" in found:
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
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
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
        if finish_reason == "length":
            return Read(reason="truncated")
        is_refusal = not scores and len(said) <= SHORT and APOLOGIES.search(said)
        return Read(reason="refusal" if is_refusal else "score_count")
    if max(scores[1:]) > scores[0]:
        flags = (*flags, CAPPED)
    return Read(scores=scores, flags=flags, reasoning=_reasoning(said))


def _last_named(text: str, name: str) -> float | None:
    """The number that follows a criterion's name, where it stands last."""
    words = [r"\s+".join(re.escape(word) for word in part.split()) for part in name.casefold().split("&")]
    spelled = r"\s*(?:&|\band\b)\s*".join(words)
    # "Physical Consistency" begins another criterion's name, and "Naturalness" may end one: the colon decides.
    found = re.findall(
        rf"{spelled}[\s\"'*_`]*[:：][\s\"'*_`]*({NUMBER})(?:\s*/\s*5\b)?", unicodedata.normalize("NFC", text.casefold())
    )
    return float(found[-1]) if found else None


def _is_official(text: str, names: Sequence[str]) -> bool:
    """Whether the official script reads every criterion, and nothing else, of an answer."""
    lines = [line.strip() for line in text.splitlines() if re.search(r":\s*\d+$", line.strip())]
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
