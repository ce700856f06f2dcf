"""Results before a judge: what it is shown, and its answers as columns of rows, or of pairs of methods."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from pipeline.common.showing import describe
from pipeline.errors import RecipeError
from pipeline.evaluation.benchmarks.imgedit_bench import CRITERIA
from pipeline.evaluation.items import Result
from pipeline.evaluation.judging import rewriting
from pipeline.evaluation.judging.answers import Read, read_sentence
from pipeline.evaluation.judging.asking import (
    MOST_TEXT,
    Answer,
    Judge,
    Outcome,
    Questioning,
    journal_of,
    server_of,
)
from pipeline.evaluation.judging.local import LocalJudge
from pipeline.evaluation.judging.questions import (
    PARTS,
    Prompts,
    Question,
    asked_for,
    preference_of,
    scores_of,
    spread_of,
)
from pipeline.evaluation.scoring import JPEG_QUALITY, MAX_PIXELS
from pipeline.models.vision_language import found_safe
from pipeline.reading.decode import decode
from pipeline.reading.storage import FileSystem
from pipeline.settings.judge import JudgeConfig
from pipeline.writing.answers import FolderStore
from pipeline.writing.rows import encode_png, utf8_text

NO_INSTRUCTION = "no_instruction"  # class of a row whose edit no words name: a judge cannot be asked about it
EDITS_AT_ONCE = 8  # whose pictures are held together while pairs of their results are asked about


class Judging:
    """Asks a judge about results, unit by unit.

    Args:
        config: of the judge.
        fs, journal: the folder that keeps answers.
        ask_failed_again: those in it that had no scores do not count.
        judge: who answers; None: whom the configuration names, here.

    Raises:
        RecipeError: its prompts or its factory cannot be had.
        JudgeError: its key is missing.
    """

    def __init__(
        self,
        config: JudgeConfig,
        fs: FileSystem,
        journal: str,
        *,
        ask_failed_again: bool = False,
        judge: Judge | None = None,
    ) -> None:
        self._config = config
        self._prompts = Prompts(config.protocol, config.prompts)
        self._types: dict[str, str] = {}  # of the rows that are asked about
        book = journal_of(FolderStore(fs, journal), config)
        waiting: list[Callable[[float], None]] = []
        if judge is None and config.kind == "openai":
            from pipeline.evaluation.judging.endpoint import Endpoint

            judge = Endpoint(config, lambda seconds: waiting[0](seconds), proven=not book.is_empty)
        elif judge is None:
            judge = LocalJudge(config) if config.kind == "transformers" else plugged_in(config)
        self._questioning = Questioning(judge, config, self._read, book, ask_failed_again=ask_failed_again)
        waiting.append(self._questioning.sleep)

    @property
    def requests(self) -> int:
        """That were made so far by this command."""
        return self._questioning.requests

    def _read(self, question: Question, answer: Answer) -> Read:
        if question.part == rewriting.PART:
            return read_sentence(answer.text, answer.finish_reason)
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
            if not reason and asked_for(result.item.request)
        ]
        outcomes = iter(self._questioning.ask([question for _, questions in asked for question in questions]))
        found = [self._without_answers(reason or NO_INSTRUCTION) for reason in reasons]
        for at, questions in asked:
            found[at] = self._with_answers([(question, next(outcomes)) for question in questions])
        return found

    def rewritten(self, result: Result, given: str) -> Outcome:
        """What the judge would have asked for, by input and result, as the `reasoning` of what was read.

        Args:
            result: that could be measured.
            given: the instruction that it was made by; may be "".
        """
        row = "\x1f".join((result.item.key, result.edit, result.method))
        (outcome,) = self._questioning.ask([rewriting.question(row, given, self._shown(result))])
        return outcome

    def preferences(self, results: Sequence[Result]) -> list[dict[str, Any]]:
        """Which is better of every two methods' results of one edit, as rows: `preference`, -1..1, is that of `first`.

        Args:
            results: that could be measured, of all methods; those of one edit need not stand together.
        """
        by_edit: dict[tuple[str, str], list[Result]] = {}
        for result in results:
            by_edit.setdefault((result.item.key, result.edit), []).append(result)
        edits, found = list(by_edit.values()), []
        for begin in range(0, len(edits), EDITS_AT_ONCE):
            pairs, asked = [], []
            for some in edits[begin : begin + EDITS_AT_ONCE]:
                # By name, so that a pair is one question in whatever order the methods are listed.
                ordered = sorted(some, key=lambda one: one.method)
                seen = {one.method: self._shown(one) for one in ordered}
                for pair in combinations(ordered, 2):
                    pairs.append(pair)
                    asked.append(self._which(*pair, seen))
            outcomes = iter(self._questioning.ask([question for questions in asked for question in questions]))
            found += [
                self._preferred(pair, [(question, next(outcomes)) for question in questions])
                for pair, questions in zip(pairs, asked, strict=True)
            ]
        return found

    def _which(self, first: Result, second: Result, seen: Mapping[str, tuple[bytes, bytes]]) -> list[Question]:
        item = first.item
        if not asked_for(item.request):
            return []
        row = "\x1f".join((item.key, first.edit, first.method, second.method))
        self._types[row] = item.edit_type
        (source, one), (_, other) = seen[first.method], seen[second.method]
        return [
            question
            for run in range(self._config.passes)
            for question in self._prompts.ask_which(row, item.request, item.edit_type, source, (one, other), run)
        ]

    def _preferred(self, pair: tuple[Result, Result], asked: Sequence[tuple[Question, Outcome]]) -> dict[str, Any]:
        first, second = pair
        item, reads = first.item, self._reads(asked)
        value = preference_of(reads)
        votes = {sign * one.scores[0] for sign, part in ((1, "ab"), (-1, "ba")) for one in reads[part] if one.scores}
        columns = {
            "item": utf8_text(item.key),
            "image": utf8_text(str(item.facts.get("image", item.key))),
            "edit": first.edit,
            "edit_type": item.edit_type,
            "first": first.method,
            "second": second.method,
            "preference": value,
            **(self._about(asked) if asked else self._without_answers(NO_INSTRUCTION)),
        }
        # A judge that takes whatever it is shown first has said nothing of the edits.
        changed = ["order_decides"] if {1.0, -1.0} <= votes else []
        return columns | {"judge_flags": [*columns["judge_flags"], *changed]}

    def _shown(self, result: Result) -> tuple[bytes, bytes]:
        """Input and result as the judge gets them, of one size."""
        given, edited = result.pictures
        source = decode(result.shown_source or given, MAX_PIXELS)[0]
        made = decode(edited, MAX_PIXELS)[0]
        if made.shape != source.shape:
            size = (source.shape[1], source.shape[0])
            made = np.asarray(Image.fromarray(made).resize(size, Image.Resampling.BICUBIC))
        return shown(source, self._config), shown(made, self._config)

    def _questions(self, result: Result) -> list[Question]:
        item = result.item
        row = "\x1f".join((item.key, result.edit, result.method))
        self._types[row] = item.edit_type
        pictures = self._shown(result)
        return [
            question
            for run in range(self._config.passes)
            for question in self._prompts.ask(row, item.request, item.edit_type, *pictures, run)
        ]

    def _without_answers(self, reason: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"judge_reason": reason or None, "judge_flags": [], "judge_prompt_hash": []}
        return self._stated() | empty

    def _stated(self) -> dict[str, Any]:
        config = self._config
        return {
            "judge_protocol": config.protocol,
            "judge_model": config.model,
            "judge_revision": config.revision,
            "judge_base_url_host": config.whereabouts,
            "judge_prompts": self._prompts.origin,
            "judge_image_format": config.image,
            "judge_temperature": config.temperature,
            "judge_seed": config.seed,
            "judge_passes": config.passes,
        }

    def _with_answers(self, asked: Sequence[tuple[Question, Outcome]]) -> dict[str, Any]:
        columns = self._about(asked)
        protocol, reads = self._config.protocol, self._reads(asked)
        scores = scores_of(protocol, reads)
        columns |= {f"judge_{name}": value for name, value in scores.items()}
        columns["judge_pass_sd"] = spread_of(protocol, reads)
        if self._config.protocol == "imgedit":
            names = CRITERIA[self._types[asked[0][0].row]]
            columns |= {"judge_score": scores["overall"], "judge_names": list(names)}
        return columns

    def _reads(self, asked: Sequence[tuple[Question, Outcome]]) -> dict[str, list[Read]]:
        """Answers by part, in the order of the passes."""
        parts = PARTS[self._config.protocol]
        return {part: [outcome.read for question, outcome in asked if question.part == part] for part in parts}

    def _about(self, asked: Sequence[tuple[Question, Outcome]]) -> dict[str, Any]:
        """Who was asked, and what was said."""
        reads = [outcome.read for _, outcome in asked]
        answers = [outcome.answer for _, outcome in asked if outcome.answer is not None]
        columns = self._stated() | {
            "judge_reason": next((read.reason for read in reads if read.reason), None),
            "judge_flags": sorted({flag for read in reads for flag in read.flags}),
            "judge_prompt_hash": list(dict.fromkeys(question.prompt_hash for question, _ in asked)),
            "judge_model_reported": utf8_text(answers[-1].model_reported) if answers else None,
            "judge_finish_reason": utf8_text(answers[-1].finish_reason) if answers else None,
            "judge_prompt_tokens": _total([answer.prompt_tokens for answer in answers]),
            "judge_completion_tokens": _total([answer.completion_tokens for answer in answers]),
        }
        for question, outcome in asked:  # of several passes the last stands in the row, the others in the journal
            part, answer, read = question.part, outcome.answer, outcome.read
            prefix = "judge_" if part == "edit" else f"judge_{part}_"
            columns[f"{prefix}raw"] = utf8_text(answer.text)[:MOST_TEXT] if answer else None
            columns[f"{prefix}scores"] = list(read.scores)
            if part != "edit":
                columns[f"judge_reasoning_{part}"] = utf8_text(read.reasoning)[:MOST_TEXT]
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


def refuse_unusable(config: JudgeConfig) -> None:
    """See that the judge can be asked, as far as that is known without asking: told before hours of edits, not after.

    Raises:
        RecipeError: its prompts or its factory cannot be had.
        JudgeError: its key is missing.
        ModelError: its checkpoint is missing or of no use.
    """
    Prompts(config.protocol, config.prompts)
    if config.kind == "openai":
        server_of(config)
    elif config.kind == "transformers":
        found_safe(config.model, config.revision)
    else:
        plugged_in(config)


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
    what = "Rows" if config.scores_rows else "Pairs of results"
    reasons = Counter(row["judge_reason"] for row in rows if row["judge_reason"])
    flags = Counter(flag for row in rows for flag in row["judge_flags"])
    for how, counted in (("without a judge's score", reasons), ("with an odd answer that counts", flags)):
        if counted:
            listed = ", ".join(f"{name} {number}" for name, number in sorted(counted.items()))
            said.append(f"{what} {how}, of {len(rows)}: {listed}.")
    spreads = [row["judge_pass_sd"] for row in rows if row.get("judge_pass_sd") is not None]
    if spreads:
        typical = math.sqrt(math.fsum(one * one for one in spreads) / len(spreads))
        said.append(f"Standard deviation of a row's overall score between passes: {typical:.2f} (n = {len(spreads)}).")
    return said
