"""Calls that a server answers and no device: begun, and taken in as they come, while the device works on other rows."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from typing import Any, Protocol

from pipeline.engine.calls import AskServer
from pipeline.engine.tasks import Session, Task
from pipeline.errors import RowError, ShardeditError
from pipeline.remote.pictures import PictureAnswer, PictureQuestion

SECONDS_BETWEEN_CHECKS = 0.1  # for a signal, while there is nothing to do but wait


class Asker(Protocol):
    """Who asks servers, in threads of its own."""

    def begin(self, question: PictureQuestion) -> Future[PictureAnswer]:
        """Ask for a picture, which is there later."""


class Outside:
    """What an engine has asked of servers. Answers come from any thread, and are taken by the engine's.

    Args:
        asker: who asks; None: nobody does.
    """

    def __init__(self, asker: Asker | None) -> None:
        self._asker = asker
        self._changed = threading.Condition()
        self._arrived: deque[tuple[Task, Future[PictureAnswer]]] = deque()
        self._asked: dict[Future[PictureAnswer], Task] = {}  # and not answered yet

    def ask(self, task: Task, call: AskServer) -> None:
        """Begin a call.

        Raises:
            TypeError: nobody asks servers here.
        """
        if self._asker is None:
            raise TypeError("a method asks a server, and this engine was given nobody who does: a fault of ours")
        future = self._asker.begin(call.question)
        with self._changed:
            self._asked[future] = task
        future.add_done_callback(self._note)

    def _note(self, future: Future[PictureAnswer]) -> None:
        with self._changed:
            self._arrived.append((self._asked.pop(future), future))
            self._changed.notify_all()

    def drop(self, session: Session) -> None:
        """Take back what nobody waits for any more, as far as it is not on its way: answers are paid for."""
        with self._changed:
            unwanted = [future for future, task in self._asked.items() if task.session is session]
        for future in unwanted:
            future.cancel()

    def take(self) -> list[tuple[Task, Any, Exception | None]]:
        """What has arrived, as answers or exceptions of those who wait for it.

        Raises:
            ShardeditError: a server cannot be asked at all, which is no row's fault.
        """
        with self._changed:
            arrived, self._arrived = self._arrived, deque()
        answers: list[tuple[Task, Any, Exception | None]] = []
        for task, future in arrived:
            if future.cancelled():
                continue
            error = future.exception()
            if isinstance(error, ShardeditError) and not isinstance(error, RowError):
                raise error
            if error is not None and not isinstance(error, Exception):
                raise error
            if task.is_wanted:
                answers.append((task, None if error else future.result(), error))
        return answers

    def wait(self, session: Session) -> None:
        """Sleep until something has arrived, or another thread has finished something of this session; not for long."""
        with self._changed:
            if not self._arrived and not session.finished:
                self._changed.wait(SECONDS_BETWEEN_CHECKS)

    def tell(self) -> None:
        """Wake who waits: a generator has finished."""
        with self._changed:
            self._changed.notify_all()
