"""Questions to a judge: again where that may help, and no answered one a second time.

What a judge is to do is one function, `Judge.answer`. Around it stand the number of requests per question, and how an
answer is written to the journal and read back; how many are asked at once, and what waits, is remote/interview.py's.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pipeline.errors import ServerError
from pipeline.evaluation.judging.answers import Read
from pipeline.evaluation.judging.questions import Question
from pipeline.remote.interview import Interview
from pipeline.remote.journal import Journal, Store
from pipeline.remote.server import Server
from pipeline.remote.tries import PassingError, RowFailedError, retried
from pipeline.settings.judge import JudgeConfig
from pipeline.writing.files import from_json

MOST_TEXT = 16_384  # characters that are kept of an answer


class JudgeError(ServerError):
    """The judge cannot be asked: wrong key, model or address, or the quota is spent."""


def server_of(config: JudgeConfig) -> Server:
    """The endpoint of a judge, with its key.

    Raises:
        JudgeError: the key is missing.
    """
    try:
        key = config.key()
    except ValueError as error:
        raise JudgeError(f"judge: {error}. Set it, and start again") from None
    return Server(
        base_url=config.base_url,
        key=key,
        key_env=config.key_env,
        section="judge",
        concurrency=config.concurrency,
        timeout_s=config.timeout_s,
        error=JudgeError,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a judge said to one question."""

    text: str
    finish_reason: str = "stop"
    model_reported: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_ms: float | None = None


class Judge(Protocol):
    """Answers questions, one at a time, in many threads at once."""

    def answer(self, question: Question) -> Answer:
        """What it says.

        Raises:
            PassingError: nothing, this time.
            RowFailedError: nothing to this question.
            JudgeError: nothing to any.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a question."""

    read: Read  # its scores, or the class of why there are none
    answer: Answer | None  # the one that counted, else the last; None: there was none
    tries: int  # requests

    @property
    def is_paid(self) -> bool:
        """Whether the judge said anything."""
        return self.answer is not None


class _MalformedError(Exception):
    """An answer without scores."""

    def __init__(self, read: Read, answer: Answer) -> None:
        super().__init__(read.reason)
        self.read, self.answer = read, answer


@dataclass(slots=True)
class Asking:
    """One question on its way to an answer.

    An answer that cannot be read is asked for again, with the same words; given up at once is what a judge without
    chance says twice, or what it refuses twice.
    """

    judge: Judge
    question: Question
    read: Callable[[Answer], Read]
    config: JudgeConfig
    sleep: Callable[[float], None]
    tries: int = 0
    last: _MalformedError | None = None
    final: bool = False

    def outcome(self) -> Outcome:
        """Ask until there are scores, or no more requests."""
        try:
            answer, read = retried(self._attempt, tries=self.config.tries, sleep=self.sleep, may_help=self._may_help)
            return Outcome(read=read, answer=answer, tries=self.tries)
        except _MalformedError as error:
            return Outcome(read=error.read, answer=error.answer, tries=self.tries)
        except (PassingError, RowFailedError) as error:
            last = None if self.last is None else self.last.answer
            return Outcome(read=Read(reason=str(error)), answer=last, tries=self.tries)

    def _attempt(self) -> tuple[Answer, Read]:
        self.tries += 1
        answer = self.judge.answer(self.question)
        read = self.read(answer)
        if read.reason:
            error, before = _MalformedError(read, answer), self.last
            said_again = before is not None and before.answer.text == answer.text and self.config.temperature == 0
            refused_again = before is not None and read.reason == before.read.reason == "refusal"
            self.last, self.final = error, said_again or refused_again
            raise error
        return answer, read

    def _may_help(self, error: BaseException) -> bool:
        return isinstance(error, PassingError) or (isinstance(error, _MalformedError) and not self.final)


def journal_of(store: Store, config: JudgeConfig) -> Journal[Question, Outcome]:
    """What a judge has answered: another model, revision or text is another question."""
    # As JSON has it: a default of 0 and a 0 that was read back are one number.
    judge = config.model_dump(
        mode="json",
        include={"kind", "model", "revision", "protocol", "temperature", "max_tokens", "seed", "image", "max_side"},
    )

    def stem(question: Question) -> str:
        pictures = [hashlib.sha256(one).hexdigest() for one in question.pictures]
        told = [judge, question.row, question.part, question.run, question.prompt_hash, question.text, pictures]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    return Journal(
        store,
        stem=stem,
        write=lambda outcome: json.dumps(asdict(outcome)).encode(),
        read=lambda data: _outcome_of(from_json(data)),
    )


def _outcome_of(data: Any) -> Outcome:
    read, answer = data["read"], data["answer"]
    return Outcome(
        read=Read(**read | {"scores": tuple(read["scores"]), "flags": tuple(read["flags"])}),
        answer=None if answer is None else Answer(**answer),
        tries=int(data["tries"]),
    )


class Questioning:
    """Asks a judge, and counts.

    Args:
        judge: who answers.
        config: of it.
        read: what an answer says, of a question.
        journal: of what was answered before.
        ask_failed_again: answers in the journal that had no scores do not count.
    """

    def __init__(
        self,
        judge: Judge,
        config: JudgeConfig,
        read: Callable[[Question, Answer], Read],
        journal: Journal[Question, Outcome],
        *,
        ask_failed_again: bool = False,
    ) -> None:
        self._judge, self._config, self._read = judge, config, read
        self.requests = 0  # that were made by this command
        self._lock = threading.Lock()
        interview = Interview(
            self._outcome_of,
            journal,
            config.concurrency,
            counts=lambda known: not (known.read.reason and ask_failed_again),
            is_kept=lambda outcome: outcome.is_paid,
            name="judge",
        )
        self.ask, self.sleep = interview.ask, interview.sleep

    def _outcome_of(self, question: Question) -> Outcome:
        asking = Asking(self._judge, question, lambda answer: self._read(question, answer), self._config, self.sleep)
        try:
            return asking.outcome()
        finally:
            with self._lock:
                self.requests += asking.tries
