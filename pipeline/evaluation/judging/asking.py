"""Many questions to one judge: so many at once, again where that may help, and no answered one a second time.

What a judge is to do is one function, `Judge.answer`. Around it stand the number of requests per question, the waits
between them, and the journal: every answer is a small file before its row is written, so that a kill costs at most what
was in flight.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any, Protocol

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_random_exponential

from pipeline.common import stopping
from pipeline.errors import RunAborted, ShardeditError
from pipeline.evaluation.judging.answers import Read
from pipeline.evaluation.judging.questions import Question
from pipeline.reading.storage import FileSystem
from pipeline.settings.judge import JudgeConfig
from pipeline.writing.files import from_json, get, list_folder, put

LONGEST = 60.0  # seconds between two requests, where the judge names none
MOST_TEXT = 16_384  # characters that are kept of an answer
SECONDS_BETWEEN_CHECKS = 0.1  # for a signal


class JudgeError(ShardeditError):
    """The judge cannot be asked: wrong key, model or address, or the quota is spent."""


def key_of(config: JudgeConfig) -> str:
    """The key of an endpoint; "" where one on this machine needs none.

    Raises:
        JudgeError: it is missing.
    """
    try:
        return config.key()
    except ValueError as error:
        raise JudgeError(f"judge: {error}. Set it, and start again") from None


class RowFailedError(Exception):
    """A question that gets no answer; its text is the class."""


class PassingError(Exception):
    """What may be better the next time; its text is the class. `after`: seconds that the judge asks us to wait."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


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
        retrying = Retrying(
            stop=stop_after_attempt(self.config.tries),
            wait=_wait,
            retry=retry_if_exception(self._may_help),
            sleep=self.sleep,
            reraise=True,
        )
        try:
            answer, read = retrying(self._attempt)
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


_growing = wait_random_exponential(multiplier=1, max=LONGEST)


def _wait(state: RetryCallState) -> float:
    """What the judge asks for, else up to 1, 2, 4... seconds; an answer that cannot be read is no reason to wait."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, _MalformedError):
        return 0.0
    if isinstance(error, PassingError) and error.after is not None:
        return error.after
    return _growing(state)


class Journal:
    """Answers in a folder, a file for each, on any store.

    Args:
        fs: of the folder.
        root: its path.
        config: of the judge; another model, revision or text is another question.
    """

    def __init__(self, fs: FileSystem, root: str, config: JudgeConfig) -> None:
        self._fs, self._root = fs, root
        # As JSON has it: a default of 0 and a 0 that was read back are one number.
        self._judge = config.model_dump(
            mode="json",
            include={"kind", "model", "revision", "protocol", "temperature", "max_tokens", "seed", "image", "max_side"},
        )
        self._there = {path.rpartition("/")[2] for path in list_folder(fs, root)}

    @property
    def is_empty(self) -> bool:
        """Whether it held no answer when it was opened."""
        return not self._there

    def name(self, question: Question) -> str:
        """Of a question's file."""
        pictures = [hashlib.sha256(one).hexdigest() for one in question.pictures]
        told = [self._judge, question.row, question.part, question.run, question.prompt_hash, question.text, pictures]
        return f"{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}.json"

    def find(self, question: Question) -> Outcome | None:
        """What was answered before; None where nothing was, or the file is damaged."""
        name = self.name(question)
        data = get(self._fs, f"{self._root}/{name}") if name in self._there else None
        try:
            return None if data is None else _outcome_of(from_json(data))
        except (ValueError, KeyError, TypeError):
            return None

    def keep(self, question: Question, outcome: Outcome) -> None:
        """Remember what was answered. May be called by many threads."""
        put(self._fs, f"{self._root}/{self.name(question)}", json.dumps(_as_json(outcome)).encode(), durable=False)


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome)


def _outcome_of(data: Any) -> Outcome:
    read, answer = data["read"], data["answer"]
    return Outcome(
        read=Read(**read | {"scores": tuple(read["scores"]), "flags": tuple(read["flags"])}),
        answer=None if answer is None else Answer(**answer),
        tries=int(data["tries"]),
    )


class Interview:
    """Asks one judge, so many questions at once.

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
        journal: Journal,
        *,
        ask_failed_again: bool = False,
    ) -> None:
        self._judge, self._config, self._read, self._journal = judge, config, read, journal
        self._ask_failed_again = ask_failed_again
        self._ending = threading.Event()
        self._cause: JudgeError | None = None
        self.requests = 0  # that were made by this command
        self._lock = threading.Lock()

    def sleep(self, seconds: float) -> None:
        """Wait, but no longer than the run lasts."""
        if self._ending.wait(seconds):
            raise RunAborted("the run has ended")

    def ask(self, questions: Sequence[Question]) -> list[Outcome]:
        """What comes of all questions, in their order. A signal ends it within a second.

        Raises:
            JudgeError: the judge cannot be asked. What is answered by then is kept.
        """
        futures: list[Future[Outcome]] = [Future() for _ in questions]
        todo: SimpleQueue[tuple[Future[Outcome], Question] | None] = SimpleQueue()
        for pair in zip(futures, questions, strict=True):
            todo.put(pair)
        threads = min(self._config.concurrency, len(questions))
        for number in range(threads):
            todo.put(None)
            # Daemons: nobody waits for an answer that takes two minutes where the run is told to end.
            threading.Thread(target=self._answer, args=(todo,), name=f"judge-{number}", daemon=True).start()
        left = set(futures)
        try:
            while left:
                done, left = wait(left, SECONDS_BETWEEN_CHECKS, return_when=FIRST_EXCEPTION)
                stopping.check()
                for future in done:
                    future.result()
        except BaseException as error:
            self._ending.set()
            raise self._cause or error from None
        return [future.result() for future in futures]

    def _answer(self, todo: SimpleQueue[tuple[Future[Outcome], Question] | None]) -> None:
        while (given := todo.get()) is not None:
            future, question = given
            try:
                future.set_result(self._one(question))
            except BaseException as error:
                future.set_exception(error)

    def _one(self, question: Question) -> Outcome:
        known = self._journal.find(question)
        if known is not None and not (known.read.reason and self._ask_failed_again):
            return known
        if self._ending.is_set():
            raise RunAborted("the run has ended")
        asking = Asking(self._judge, question, lambda answer: self._read(question, answer), self._config, self.sleep)
        try:
            outcome = asking.outcome()
        except JudgeError as error:  # at once: the next question would be asked in vain
            self._cause = self._cause or error
            self._ending.set()
            raise
        finally:
            with self._lock:
                self.requests += asking.tries
        if outcome.is_paid:
            self._journal.keep(question, outcome)
        return outcome
