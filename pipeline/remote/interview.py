"""Many questions to one server: so many at once, and no answered one a second time.

Threads of its own ask, and nobody waits for them where the run is told to end. An answer stands in the journal before
anybody gets it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, Generic, TypeVar

from pipeline.common import stopping
from pipeline.errors import RunAborted, ServerError
from pipeline.remote.journal import Journal, O, Q

T = TypeVar("T")
SECONDS_BETWEEN_CHECKS = 0.1  # for a signal
IDLE_S = 5.0  # after which a thread without work ends


class DaemonPool:
    """Threads that no process waits for at its end: an answer may take two minutes.

    Args:
        most: threads, which are begun as there is work for them.
        name: of them.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._changed = threading.Condition()
        self._todo: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads = self._idle = 0

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Do something as soon as a thread is free."""
        future: Future[T] = Future()
        with self._changed:
            self._todo.append((future, work))
            if self._idle < len(self._todo) and self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
            self._changed.notify()
        return future

    def _work(self) -> None:
        while (given := self._next()) is not None:
            future, work = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del given, future, work  # an answer may be large: not held until the next one comes

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._changed:
            if not self._todo:
                self._idle += 1
                self._changed.wait_for(lambda: bool(self._todo), IDLE_S)
                self._idle -= 1
            if self._todo:
                return self._todo.popleft()
            self._threads -= 1
            return None


class Interview(Generic[Q, O]):
    """Asks one server, so many questions at once.

    Args:
        ask: what comes of one question; makes what requests it takes.
        journal: of what was answered before.
        threads: that ask.
        counts: whether an outcome in the journal stands; else its question is asked again.
        is_kept: whether an outcome goes into the journal.
        name: of the threads.
    """

    def __init__(
        self,
        ask: Callable[[Q], O],
        journal: Journal[Q, O],
        threads: int,
        *,
        counts: Callable[[O], bool] = lambda outcome: True,
        is_kept: Callable[[O], bool] = lambda outcome: True,
        name: str,
    ) -> None:
        self._ask, self._journal, self._counts, self._is_kept = ask, journal, counts, is_kept
        self._pool = DaemonPool(threads, name)
        self._ending = threading.Event()
        self._cause: ServerError | None = None

    def sleep(self, seconds: float) -> None:
        """Wait, but no longer than the run lasts."""
        if self._ending.wait(seconds):
            raise self._cause or RunAborted("the run has ended")

    def end(self) -> None:
        """Ask nothing any more: the run is over, and answers would be paid for in vain. From any thread."""
        self._ending.set()

    def begin(self, question: Q, then: Callable[[O], T]) -> Future[T]:
        """Ask a question; what `then` makes of its outcome, in the thread that asked, is there later.

        The future raises ServerError where the server cannot be asked: then no other question is asked, either.
        """
        return self._pool.submit(lambda: then(self._one(question)))

    def ask(self, questions: Sequence[Q]) -> list[O]:
        """What comes of all questions, in their order. A signal ends it within a second.

        Raises:
            ServerError: the server cannot be asked. What is answered by then is kept.
        """
        futures = [self.begin(question, lambda outcome: outcome) for question in questions]
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

    def _one(self, question: Q) -> O:
        known = self._journal.find(question)
        if known is not None and self._counts(known):
            return known
        if self._ending.is_set():
            raise self._cause or RunAborted("the run has ended")
        try:
            outcome = self._ask(question)
        except ServerError as error:  # at once: the next question would be asked in vain
            self._cause = self._cause or error
            self._ending.set()
            raise
        if self._is_kept(outcome):
            self._journal.keep(question, outcome)
        return outcome
