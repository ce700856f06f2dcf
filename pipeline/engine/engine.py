"""The engine: many generators in flight, one model.

It holds the methods of many images at once, collects the rows of all their pending `Denoise` and `Product` calls, packs
these into network calls of one fixed shape, and hands the results back: continuous batching, as language-model servers
do it.

The device never waits for a generator: while it works on one call, the next one has been given to it already. What
shares a call does not show in a row's bits, so neither does which rows were there when it was packed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch

from pipeline.common import stopping
from pipeline.engine.arriving import Arriving, begin_copy
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import (
    AskServer,
    DecodeGradient,
    DecodeLatents,
    Denoise,
    EncodeImage,
    EncodeText,
    Fork,
    Product,
    Steps,
)
from pipeline.engine.control_checks import check_call
from pipeline.engine.faults import device_error, is_of_the_device, is_out_of_memory
from pipeline.engine.outside import Asker, Outside
from pipeline.engine.packing import Batch, CallRow, RowQueue
from pipeline.engine.pending import PendingCall, does_not_fit, pending_call, rows_per_call
from pipeline.engine.pictures import Picture, PictureBatch, PictureQueue, pictures_per_call
from pipeline.engine.tasks import EngineStats, Finished, Session, Task
from pipeline.engine.texts import Texts
from pipeline.errors import DeviceError, EditError

GIVEN_CALLS = 2  # that the device has at a time: the one that it works on, and the one that it finds when that is done


class Engine:
    """Runs generators on one backbone. Several threads may call `run` at once: their rows share network calls.

    Args:
        backbone: the model.
        call_size: rows of a network call. Part of a run's record, since bits are equal within one call size.
        images_in_flight: generators held at once; bounds memory. None: as many as keep calls full, one after the other.
        pad: fill short calls up to `call_size`, so that a row's bits do not depend on what else is in flight. Without
            padding calls are as short as what is pending: less work where a single image is edited.
        asker: who asks servers, for methods that do.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        call_size: int = 16,
        images_in_flight: int | None = None,
        pad: bool = True,
        asker: Asker | None = None,
    ) -> None:
        if call_size < 1 or (images_in_flight is not None and images_in_flight < 1):
            raise ValueError(f"call_size {call_size} and images_in_flight {images_in_flight} should be at least 1")
        self.backbone = backbone
        self.call_size = call_size
        self.pictures_per_call = pictures_per_call(call_size, backbone.device)
        self.images_in_flight = images_in_flight or max(4, GIVEN_CALLS * call_size)
        self.pad = pad
        self.stats = EngineStats()
        self._texts = Texts(backbone, pad=pad)
        self._queue = RowQueue()
        self._pictures = PictureQueue()
        self._outside = Outside(asker)
        self._given: deque[tuple[Batch | PictureBatch, Arriving]] = deque()  # to the device, oldest first
        self._given_since = 0.0  # how far `busy_seconds` has counted
        self._broken: Exception | None = None  # what every `run` raises from now on
        self._ready: deque[tuple[Task, Any, Exception | None]] = deque()
        self._sessions: list[Session] = []
        self._lock = threading.Lock()

    def run(
        self,
        generators: Iterable[Steps[Any] | None],
        *,
        on_rows: Callable[[int], None] | None = None,
        rank: int = 0,
    ) -> Generator[Finished]:
        """Run generators to their end, and yield each as it finishes, in whatever order.

        The iterable is drawn from as places become free; it may answer None, "none at present", while generators of its
        own are running or have finished and were not fetched. A generator that raises ends alone, with its exception in
        its `Finished`; KeyboardInterrupt and other non-errors end everything, a signal between two network calls.

        Args:
            generators: of any number.
            on_rows: called after each network call with the number of answered rows, of all that these generators asked
                for; a row counts as its `Denoise` costs.
            rank: who of several callers starts generators first: the lowest; equals take turns.

        Raises:
            DeviceError: the device has failed, for good; no generator is to blame.
            ServerError: a server that methods ask cannot be asked.
        """
        session = Session(iter(generators), rank)
        told = 0
        with self._lock:
            self._sessions.append(session)
        try:
            while not session.is_over:
                stopping.check()
                with self._lock:
                    if self._broken is not None:
                        raise self._broken
                    idle = not session.finished and not self._advance()
                if idle:
                    self._outside.wait(session)
                if on_rows is not None and session.answered_rows > told:
                    told = session.answered_rows
                    on_rows(told)
                while session.finished:
                    yield session.finished.popleft()
                if session.failure is not None:
                    raise session.failure
        finally:
            with self._lock:
                self._sessions.remove(session)
                if session.running:
                    self._abandon(session)

    def give_up(self, reason: Exception) -> None:
        """Let every `run` raise, at its next call. From any thread."""
        self._broken = reason

    def run_one(self, generator: Steps[Any], *, on_rows: Callable[[int], None] | None = None) -> Any:
        """Run one generator and return its value, or raise what it raised."""
        (finished,) = self.run([generator], on_rows=on_rows)
        if finished.error is not None:
            raise finished.error
        return finished.value

    def _abandon(self, session: Session) -> None:
        """Its caller has gone, by Ctrl-C or an error of its own: what it asked for would only delay the next one."""
        session.is_left = True
        self._ready = deque(item for item in self._ready if item[0].session is not session)
        self._outside.drop(session)
        self._texts.drop(lambda owner: owner.session is session)
        self._pictures.drop(lambda owner: owner.session is session)
        for pending in self._queue.calls():
            if pending.owner.session is session:
                self._queue.drop(pending)

    def _advance(self) -> bool:
        """One unit of progress: resume whoever has an answer, let images in, then give the device a call or take one.
        It is given full calls ahead; a short one only where nothing else can come. False: all wait for servers."""
        resumed = False
        while True:
            self._take_from_outside()
            while self._ready:
                self._resume(*self._ready.popleft())
                resumed = True
            # A full call goes first: it lets the oldest images finish before new ones are held in memory.
            if self._has_full() or not self._admit():
                if not len(self._texts):
                    break
                self._encode_texts()
        given = sum(isinstance(batch, Batch) for batch, _ in self._given)  # pictures are over before a call is packed
        if not self._given or (given < GIVEN_CALLS and self._has_full()):
            return self._give_next() or resumed
        self._take(*self._given.popleft())
        return True

    def _take_from_outside(self) -> None:
        try:
            self._ready += self._outside.take()
        except Exception as error:  # a server that cannot be asked: no row is to blame, and every later one fails, too
            self.give_up(error)
            raise

    def _has_full(self) -> bool:
        return (
            self._texts.has_full
            or self._queue.has_full(self.call_size)
            or self._pictures.has_full(self.pictures_per_call)
        )

    def _admit(self) -> bool:
        """Start one more generator, of the session whose turn it is; whether there was one."""
        if sum(session.running for session in self._sessions) >= self.images_in_flight:
            return False
        for session in sorted(self._sessions, key=lambda session: (session.rank, session.running)):
            if session.exhausted:
                continue
            try:
                generator = next(session.source)
            except StopIteration:
                session.exhausted = True
                continue
            except BaseException as failure:  # the caller's iterable, raised again in the caller's own thread
                session.exhausted, session.failure = True, failure
                continue
            if generator is None:
                continue
            self._sessions.remove(session)  # to the end: of equals the one that was served longest ago is next
            self._sessions.append(session)
            self._ready.append((Task(generator, session, session.admitted), None, None))
            session.admitted += 1
            session.running += 1
            return True
        return False

    def _resume(self, task: Task, answer: Any, error: Exception | None) -> None:
        """Give a generator its answer, and answer at once whatever needs no network call."""
        while True:
            try:
                call = task.generator.throw(error) if error is not None else task.generator.send(answer)
            except StopIteration as stop:
                self._finish(task, stop.value, None)
                return
            except Exception as failure:
                self._finish(task, None, failure)
                return
            answer, error = None, None
            if isinstance(call, Fork) and call.children:
                self._fork(task, call)
                return
            if isinstance(call, EncodeText):
                if (answer := self._texts.push(task, call.prompts, call.picture)) is None:
                    return
                continue
            if isinstance(call, EncodeImage | DecodeLatents | DecodeGradient):
                self._pictures.push(Picture.of(task, call))
                return
            try:
                if isinstance(call, Denoise | Product):
                    self._enqueue(task, call)
                    return
                if isinstance(call, AskServer):
                    self._outside.ask(task, call)
                    return
                if not isinstance(call, Fork):
                    raise TypeError(f"a method yielded {type(call).__name__}, which is no model call (engine/calls.py)")
                answer = []  # of no children
            except Exception as failure:
                error = self._no_fault_of_the_device(failure)

    def _fork(self, task: Task, call: Fork) -> None:
        task.children = [None] * len(call.children)
        task.unfinished_children = len(call.children)
        for place, child in enumerate(call.children):
            self._ready.append((Task(child, task.session, place, parent=task), None, None))

    def _finish(self, task: Task, value: Any, error: Exception | None) -> None:
        parent = task.parent
        if parent is None:
            task.session.running -= 1
            task.session.finished.append(Finished(task.index, value, error, task.network_rows))
            self._outside.tell()
            return
        parent.children[task.index] = value if error is None else error
        parent.network_rows += task.network_rows
        parent.unfinished_children -= 1
        if parent.unfinished_children == 0:
            self._ready.append((parent, parent.children, None))

    def _encode_texts(self) -> None:
        """One call of the text encoder. Its answers stay on the device: nothing waits for them."""
        for owner, answer, error in self._texts.encode():
            self._ready.append((owner, answer, None if error is None else self._no_fault_of_the_device(error)))

    def _enqueue(self, task: Task, call: Denoise | Product) -> None:
        pending = pending_call(task, call)
        if isinstance(call, Denoise):
            check_call(call, self.backbone.offers)
        if rows_per_call(pending.kind, self.call_size) == 0:
            raise EditError(does_not_fit(pending.group, self.call_size))
        task.network_rows += call.cost
        self._queue.push(pending)

    def _give_next(self) -> bool:
        """Give the device the next call, if any. Pictures go before a short call: what is encoded may fill that up."""
        pictures = self._pictures
        if pictures.has_full(self.pictures_per_call) or (len(pictures) and not self._queue.has_full(self.call_size)):
            self._give(pictures.pop(self.pictures_per_call))
        elif len(self._queue):
            self._give(self._queue.pop(self.call_size))
        else:
            return False
        return True

    def _give(self, batch: Batch | PictureBatch) -> None:
        if not self._given:
            self._given_since = time.perf_counter()
        try:
            arriving = self._begin(batch)
        except Exception as error:
            if is_out_of_memory(self._no_fault_of_the_device(error)):
                self._shrink(batch, error)
            else:
                self._isolate(batch)
            self._count_busy()
        else:
            self._given.append((batch, arriving))

    def _begin(self, batch: Batch | PictureBatch) -> Arriving:
        if isinstance(batch, PictureBatch):
            pictures = batch.run(self.backbone, self.pictures_per_call if self.pad else 1)
            return Arriving(tuple(map(begin_copy, pictures)), self.backbone.mark())
        size = rows_per_call(batch.kind, self.call_size) if self.pad else len(batch.rows)
        answer = batch.ask(self.backbone, size)
        self.stats.padded_rows += size - len(batch.rows)
        return Arriving(answer, self.backbone.mark())

    def _take(self, batch: Batch | PictureBatch, arriving: Arriving) -> None:
        """Wait for the answer of a call, and hand it out."""
        try:
            arriving.wait()
        except Exception as error:
            raise self._breaks(error) from error
        self._count_busy()
        if isinstance(batch, PictureBatch):
            self._ready += [(owner, own, None) for owner, own in batch.deliver(arriving.answer) if owner.is_wanted]
            return
        self._queue.forget(batch)
        self.stats.network_rows += batch.asked_for
        self.stats.shared_rows += batch.asked_for - len(batch.rows)
        for pending in batch.deliver(arriving.answer):
            pending.owner.session.answered_rows += pending.call.cost
            if pending.owner.is_wanted:
                self._ready.append((pending.owner, pending.answer(), None))

    def _count_busy(self) -> None:
        now = time.perf_counter()
        self.stats.busy_seconds += now - self._given_since
        self._given_since = now

    def _no_fault_of_the_device(self, error: Exception) -> Exception:
        """The error; or, where the device itself has failed and every later call would, the end of everything."""
        if is_of_the_device(error):
            raise self._breaks(error) from error
        return error

    def _breaks(self, error: Exception) -> DeviceError:
        broken = device_error(self.backbone.device, error)
        self.give_up(broken)
        return broken

    def _shrink(self, batch: Batch | PictureBatch, error: Exception) -> None:
        """Out of memory: halve the size of such calls for good, and try again; give up at one."""
        torch.cuda.empty_cache()
        if isinstance(batch, PictureBatch):
            if self.pictures_per_call == 1 or batch.is_gradient:
                self._ready += [(picture.owner, None, error) for picture in batch.pictures]
                return
            self.pictures_per_call //= 2
            self._pictures.put_back(batch)
            return
        if self.call_size == 1:
            self._fail_askers(batch.rows[0], error)
            return
        self.call_size //= 2
        self._queue.put_back(batch)
        for pending in self._queue.too_large(self.call_size):
            self._fail(pending, error)

    def _isolate(self, batch: Batch | PictureBatch) -> None:
        """A call failed: repeat its groups or pictures one by one, so that only whoever is to blame fails."""
        for single in batch.singly():
            if isinstance(single, Batch) and all(pending.missing < 0 for pending, _ in single.rows[0].askers):
                self._queue.forget(single)
                continue  # another row of the same call has failed already
            try:
                arriving = self._begin(single)
            except Exception as failure:
                error = self._no_fault_of_the_device(failure)
                if isinstance(single, PictureBatch):
                    self._ready += [(picture.owner, None, error) for picture in single.pictures]
                else:
                    self._queue.forget(single)
                    self._fail_askers(single.rows[0], error)
                continue
            self._take(single, arriving)

    def _fail_askers(self, row: CallRow, error: Exception) -> None:
        for pending in dict.fromkeys(pending for pending, _ in row.askers):
            if pending.missing >= 0:  # it may have failed with another of its rows
                self._fail(pending, error)

    def _fail(self, pending: PendingCall, error: Exception) -> None:
        pending.missing = -1
        self._queue.drop(pending)
        self._ready.append((pending.owner, None, error))
