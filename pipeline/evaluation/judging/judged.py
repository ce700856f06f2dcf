"""A unit's results before a judge: what it is shown, and its answers as columns."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from pipeline.common.showing import describe
from pipeline.errors import RecipeError
from pipeline.evaluation.items import Result
from pipeline.evaluation.judging.answers import Read
from pipeline.evaluation.judging.asking import MOST_TEXT, Answer, Interview, Journal, Judge, Outcome
from pipeline.evaluation.judging.config import JudgeConfig
from pipeline.evaluation.judging.endpoint import Endpoint
from pipeline.evaluation.judging.questions import PARTS, Prompts, Question, scores_of
from pipeline.evaluation.scoring import JPEG_QUALITY, MAX_PIXELS
from pipeline.reading.decode import decode
from pipeline.reading.storage import FileSystem
from pipeline.writing.rows import encode_png, utf8_text


class Judging:
    """Asks a judge about results, unit by unit.

    Args:
        config: of the judge.
        fs, journal: the folder that keeps answers.
        ask_failed_again: those in it that had no scores do not count.

    Raises:
        RecipeError: its prompts or its factory cannot be had.
        JudgeError: its key is missing.
    """

    def __init__(self, config: JudgeConfig, fs: FileSystem, journal: str, *, ask_failed_again: bool = False) -> None:
        self._config = config
        self._prompts = Prompts(config.protocol, config.prompts)
        self._types: dict[str, str] = {}  # of the rows that are asked about
        waiting: list[Callable[[float], None]] = []
        judge: Judge = (
            Endpoint(config, lambda seconds: waiting[0](seconds)) if config.kind == "openai" else plugged_in(config)
        )
        self._interview = Interview(
            judge, config, self._read, Journal(fs, journal, config), ask_failed_again=ask_failed_again
        )
        waiting.append(self._interview.sleep)

    @property
    def requests(self) -> int:
        """That were made so far by this command."""
        return self._interview.requests

    def _read(self, question: Question, answer: Answer) -> Read:
        return self._prompts.read(answer.text, self._types[question.row], answer.finish_reason)

    def columns(self, results: Sequence[Result], reasons: Sequence[str]) -> list[dict[str, Any]]:
        """The judge's columns of every result; of one that could not be measured, why it was not asked about.

        Args:
            results: of a unit.
            reasons: why they could not be measured; "" where they were.
        """
        asked = [
            (at, self._questions(result))
            for at, (result, reason) in enumerate(zip(results, reasons, strict=True))
            if not reason
        ]
        outcomes = iter(self._interview.ask([question for _, questions in asked for question in questions]))
        found = [self._without_answers(reason) for reason in reasons]
        for at, questions in asked:
            found[at] = self._with_answers([(question, next(outcomes)) for question in questions])
        return found

    def _questions(self, result: Result) -> list[Question]:
        item = result.item
        given, edited = result.pictures
        row = "\x1f".join((item.key, result.edit, result.method))
        self._types[row] = item.edit_type
        source = decode(result.shown_source or given, MAX_PIXELS)[0]
        made = decode(edited, MAX_PIXELS)[0]
        if made.shape != source.shape:
            size = (source.shape[1], source.shape[0])
            made = np.asarray(Image.fromarray(made).resize(size, Image.Resampling.BICUBIC))
        pictures = (shown(source, self._config), shown(made, self._config))
        return [
            question
            for run in range(self._config.passes)
            for question in self._prompts.ask(row, item.request, item.edit_type, *pictures, run)
        ]

    def _without_answers(self, reason: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"judge_reason": reason, "judge_flags": [], "judge_prompt_hashes": []}
        return self._stated() | empty

    def _stated(self) -> dict[str, Any]:
        config = self._config
        return {
            "judge_protocol": config.protocol,
            "judge_model": config.model,
            "judge_revision": config.revision,
            "judge_host": config.host if config.kind == "openai" else config.kind,
            "judge_prompts": self._prompts.origin,
            "judge_image": config.image,
            "judge_temperature": config.temperature,
            "judge_seed": config.seed,
            "judge_passes": config.passes,
        }

    def _with_answers(self, asked: Sequence[tuple[Question, Outcome]]) -> dict[str, Any]:
        parts = PARTS[self._config.protocol]
        by_part = {part: [outcome for question, outcome in asked if question.part == part] for part in parts}
        reads = {part: [outcome.read for outcome in some] for part, some in by_part.items()}
        scores = scores_of(self._config.protocol, reads)
        answers = [outcome.answer for _, outcome in asked if outcome.answer is not None]
        columns = self._stated() | {
            "judge_reason": next((read.reason for some in reads.values() for read in some if read.reason), ""),
            "judge_flags": sorted({flag for some in reads.values() for read in some for flag in read.flags}),
            "judge_prompt_hashes": list(dict.fromkeys(question.prompt_hash for question, _ in asked)),
            "judge_model_reported": answers[-1].model_reported if answers else None,
            "judge_finish_reason": answers[-1].finish_reason if answers else None,
            "judge_prompt_tokens": _total([answer.prompt_tokens for answer in answers]),
            "judge_completion_tokens": _total([answer.completion_tokens for answer in answers]),
            **{f"judge_{name}": value for name, value in scores.items()},
        }
        for part, some in by_part.items():
            last = some[-1]
            suffix = "" if part == "edit" else f"{part}_"
            columns[f"judge_{suffix}raw"] = utf8_text(last.answer.text)[:MOST_TEXT] if last.answer else None
            columns[f"judge_{suffix}scores"] = list(last.read.scores)
            if suffix:
                columns[f"judge_reasoning_{part}"] = utf8_text(last.read.reasoning)[:MOST_TEXT]
        return columns


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if isinstance(count, int)]
    return sum(known) if known else None


def shown(pixels: np.ndarray, config: JudgeConfig) -> bytes:
    """A picture as the judge gets it."""
    image = Image.fromarray(pixels)
    if config.max_side and max(image.size) > config.max_side:
        image.thumbnail((config.max_side, config.max_side), Image.Resampling.LANCZOS)
    if config.image == "png":
        return encode_png(np.asarray(image))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def plugged_in(config: JudgeConfig) -> Judge:
    """What "package.module:factory" makes of the judge's section.

    Raises:
        RecipeError: it cannot be had.
    """
    module, _, factory = config.kind.partition(":")
    try:
        made: Judge = getattr(importlib.import_module(module), factory)(config)
        made.answer  # noqa: B018  told now, not by the first question
    except Exception as error:  # a stranger's code
        raise RecipeError("judge", [("judge.kind", f"{config.kind} gives no judge: {describe(error)}")]) from error
    return made


def remarks_of(config: JudgeConfig, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a table says of its judge: who, by which texts, how many rows have no score and why, how many were odd."""
    prompts = "our own prompts, with which no published table was made" if config.prompts is None else "other prompts"
    reported = sorted({row["judge_model_reported"] for row in rows if row["judge_model_reported"]})
    revision = f" ({config.revision})" if config.revision else ""
    answered = f", which answered as {', '.join(reported)}" if reported else ""
    said = [f"Judge: {config.model}{revision}{answered}; {config.protocol}, {prompts}; passes: {config.passes}."]
    reasons = Counter(row["judge_reason"] for row in rows if row["judge_reason"])
    flags = Counter(flag for row in rows for flag in row["judge_flags"])
    for what, counted in (("Rows without a judge's score", reasons), ("Rows with an odd answer that counts", flags)):
        if counted:
            listed = ", ".join(f"{name} {number}" for name, number in sorted(counted.items()))
            said.append(f"{what}, of {len(rows)}: {listed}.")
    return said
