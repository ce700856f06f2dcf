"""The engine: many generators in flight, one model.

It holds the methods of many images at once, answers their small calls, collects the rows of all their pending
`Denoise` calls, packs these into network calls of one fixed shape, and hands the results back: continuous batching, as
language-model servers do it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch

from pipeline.common import stopping
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import (
    Call,
    Conditioning,
    DecodeGradient,
    DecodeLatents,
    Denoise,
    EncodeImage,
    EncodeText,
    Fork,
    NetworkAnswer,
    Steps,
)
from pipeline.engine.control_checks import check
from pipeline.engine.packing import Batch, CallRow, PendingCall, RowQueue, rows_per_call
from pipeline.errors import EditError

CACHED_PROMPTS = 1024  # kept per worker beside those in use; of Stable Diffusion 1 that is 240 MB


@dataclass(slots=True)
class EngineStats:
    """What an engine has done since it was made."""

    network_rows: int = 0  # rows that somebody asked for
    shared_rows: int = 0  # of these, rows that another row's answer served
    padded_rows: int = 0  # rows that only filled a call up
    busy_seconds: float = 0.0  # in which the model computed


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one generator."""

    index: int  # its place in what `run` was given
    value: Any  # what it returned; None where it failed
    error: Exception | None
    network_rows: int  # that it, and what it forked, asked for


@dataclass(slots=True, eq=False)
class _Task:
    generator: Generator[Call, Any, Any]
    session: _Session
    index: int
    parent: _Task | None = None
    children: list[Any] = field(default_factory=list)  # results of a fork, by place
    unfinished_children: int = 0
    network_rows: int = 0


@dataclass(slots=True, eq=False)
class _Session:
    """One call of `run`: where its generators come from and where its results go."""

    source: Iterator[Steps[Any] | None]
    admitted: int = 0
    running: int = 0
    answered_rows: int = 0
    exhausted: bool = False
    finished: deque[Finished] = field(default_factory=deque)
    failure: BaseException | None = None  # raised by the source itself

    @property
    def is_over(self) -> bool:
        return self.exhausted and self.running == 0 and not self.finished


class Engine:
    """Runs generators on one backbone. Several threads may call `run` at once: their rows share network calls.

    Args:
        backbone: the model.
        call_size: rows of a network call. Part of a run's record, since bits are equal within one call size.
        images_in_flight: generators held at once; bounds memory. None: as many as keep calls full.
        pad: fill short calls up to `call_size`, so that a row's bits do not depend on what else is in flight. Without
            padding calls are as short as what is pending: less work where a single image is edited.
    """

    def __init__(
        self, backbone: Backbone, *, call_size: int = 16, images_in_flight: int | None = None, pad: bool = True
    ) -> None:
        if call_size < 1 or (images_in_flight is not None and images_in_flight < 1):
            raise ValueError(f"call_size {call_size} and images_in_flight {images_in_flight} should be at least 1")
        self.backbone = backbone
        self.call_size = call_size
        self.images_in_flight = images_in_flight or max(4, call_size)
        self.pad = pad
        self.stats = EngineStats()
        # A prompt that somebody still holds is never encoded again: methods tell prompts by identity.
        self._prompts: WeakValueDictionary[str, Conditioning] = WeakValueDictionary()
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()
        self._queue = RowQueue()
        self._ready: deque[tuple[_Task, Any, Exception | None]] = deque()
        self._sessions: list[_Session] = []
        self._lock = threading.Lock()

    def run(
        self, generators: Iterable[Steps[Any] | None], *, on_rows: Callable[[int], None] | None = None
    ) -> Generator[Finished]:
        """Run generators to their end, and yield each as it finishes, in whatever order.

        The iterable is drawn from as places become free; it may answer None, "none at present", while generators of its
        own are running or have finished and were not fetched. A generator that raises ends alone, with its exception in
        its `Finished`; KeyboardInterrupt and other non-errors end everything, a signal between two network calls.

        Args:
            generators: of any number.
            on_rows: called after each network call with the number of answered rows, of all that these generators asked
                for; a row counts as its `Denoise` costs.
        """
        session = _Session(iter(generators))
        told = 0
        with self._lock:
            self._sessions.append(session)
        try:
            while not session.is_over:
                stopping.check()
                with self._lock:
                    if not session.finished:
                        self._advance()
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

    def run_one(self, generator: Steps[Any], *, on_rows: Callable[[int], None] | None = None) -> Any:
        """Run one generator and return its value, or raise what it raised."""
        (finished,) = self.run([generator], on_rows=on_rows)
        if finished.error is not None:
            raise finished.error
        return finished.value

    def _abandon(self, session: _Session) -> None:
        """Its caller has gone, by Ctrl-C or an error of its own: what it asked for would only delay the next one."""
        self._ready = deque(item for item in self._ready if item[0].session is not session)
        for pending in self._queue.calls():
            if pending.owner.session is session:
                self._queue.drop(pending)

    def _advance(self) -> None:
        """One unit of progress: resume whoever has an answer, let images in, then make one network call."""
        while True:
            while self._ready:
                self._resume(*self._ready.popleft())
            # A full call goes first: it lets the oldest images finish before new ones are held in memory.
            if self._queue.has_full(self.call_size) or not self._admit():
                break
        if len(self._queue):
            self._denoise(self._queue.pop(self.call_size))

    def _admit(self) -> bool:
        """Start one more generator, of the session that has fewest running; whether there was one."""
        if sum(session.running for session in self._sessions) >= self.images_in_flight:
            return False
        for session in sorted(self._sessions, key=lambda session: session.running):
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
            self._ready.append((_Task(generator, session, session.admitted), None, None))
            session.admitted += 1
            session.running += 1
            return True
        return False

    def _resume(self, task: _Task, answer: Any, error: Exception | None) -> None:
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
            if isinstance(call, Denoise):
                try:
                    self._enqueue(task, call)
                except Exception as failure:
                    error = failure
                    continue
                return
            try:
                with self._busy():
                    answer = self._answer(call)
            except Exception as failure:
                error = failure

    def _fork(self, task: _Task, call: Fork) -> None:
        task.children = [None] * len(call.children)
        task.unfinished_children = len(call.children)
        for place, child in enumerate(call.children):
            self._ready.append((_Task(child, task.session, place, parent=task), None, None))

    def _finish(self, task: _Task, value: Any, error: Exception | None) -> None:
        parent = task.parent
        if parent is None:
            task.session.running -= 1
            task.session.finished.append(Finished(task.index, value, error, task.network_rows))
            return
        parent.children[task.index] = value if error is None else error
        parent.network_rows += task.network_rows
        parent.unfinished_children -= 1
        if parent.unfinished_children == 0:
            self._ready.append((parent, parent.children, None))

    @contextmanager
    def _busy(self) -> Iterator[None]:
        since = time.perf_counter()
        try:
            yield
        finally:
            self.stats.busy_seconds += time.perf_counter() - since

    def _answer(self, call: Call) -> Any:
        match call:
            case EncodeText(prompts):
                return [self._encode_text(prompt) for prompt in prompts]
            case EncodeImage(pixels):
                return self.backbone.encode_image(pixels)
            case DecodeLatents(latents):
                return self.backbone.decode_latents(latents)
            case DecodeGradient(latents, function):
                return self.backbone.decode_gradient(latents, function)
            case Fork():
                return []
            case _:
                raise TypeError(f"a method yielded {type(call).__name__}, which is no model call (engine/calls.py)")

    def _encode_text(self, prompt: str) -> Conditioning:
        # One prompt per encoder call, so that the shape never varies and a prompt has the same bits wherever it occurs.
        conditioning = self._prompts.get(prompt)
        if conditioning is None:
            conditioning = self._prompts[prompt] = self.backbone.encode_text(prompt)
        self._kept[prompt] = conditioning
        self._kept.move_to_end(prompt)
        if len(self._kept) > CACHED_PROMPTS:
            self._kept.popitem(last=False)
        return conditioning

    def _enqueue(self, task: _Task, call: Denoise) -> None:
        pending = PendingCall(task, call)
        self._check(call)
        if rows_per_call(pending.kind, self.call_size) == 0:
            raise EditError(self._does_not_fit(pending))
        task.network_rows += call.cost
        self._queue.push(pending)

    def _check(self, call: Denoise) -> None:
        """Refuse what the model cannot do."""
        height, width = call.latents.shape[-2:]
        if call.watch is not None or (call.control is not None and call.control.watches):
            self.backbone.offers.check_watchable(height, width)
        if call.control is not None:
            length = call.conditioning[0].embedding.shape[0]
            check(call.control, len(call.levels), length, (height, width), self.backbone.offers.openings)

    def _does_not_fit(self, pending: PendingCall) -> str:
        return (
            f"{pending.group} rows read each other and must share a network call, which has {self.call_size} rows. Set "
            f"run.call_size to {pending.group} or more"
        )

    def _denoise(self, batch: Batch) -> None:
        try:
            with self._busy():
                answer = self._call(batch)
        except torch.OutOfMemoryError as error:
            self._shrink(batch, error)
            return
        except Exception:
            self._isolate(batch)
            return
        self._deliver(batch, answer)

    def _call(self, batch: Batch) -> NetworkAnswer:
        size = rows_per_call(batch.kind, self.call_size) if self.pad else len(batch.rows)
        answer = self.backbone.denoise(batch.as_call(size))
        self.stats.network_rows += batch.asked_for
        self.stats.shared_rows += batch.asked_for - len(batch.rows)
        self.stats.padded_rows += size - len(batch.rows)
        # Methods compute on the CPU in float32: cheap beside a network call, and the same bits on every kind of GPU.
        return NetworkAnswer(
            predictions=answer.predictions.both(torch.Tensor.cpu),
            attention=None if answer.attention is None else answer.attention.cpu(),
            recorded={where: written.cpu() for where, written in answer.recorded.items()},
            embedding_grads=None if answer.embedding_grads is None else answer.embedding_grads.cpu(),
        )

    def _deliver(self, batch: Batch, answer: NetworkAnswer) -> None:
        for pending in batch.deliver(answer):
            pending.owner.session.answered_rows += pending.call.cost
            self._ready.append((pending.owner, pending.answer(), None))

    def _shrink(self, batch: Batch, error: Exception) -> None:
        """Out of memory: halve the call size for good, and try the same rows again; give up at one row."""
        torch.cuda.empty_cache()
        if self.call_size == 1:
            self._fail_askers(batch.rows[0], error)
            return
        self.call_size //= 2
        self._queue.put_back(batch)
        for pending in self._queue.too_large(self.call_size):
            self._fail(pending, error)

    def _isolate(self, batch: Batch) -> None:
        """A call failed: repeat its groups one by one, so that only whoever is to blame fails."""
        for group in batch.groups:
            if all(pending.missing < 0 for pending, _ in group[0].askers):
                continue  # another row of the same call has failed already
            single = Batch(group)
            try:
                answer = self._call(single)
            except Exception as error:
                self._fail_askers(group[0], error)
                continue
            self._deliver(single, answer)

    def _fail_askers(self, row: CallRow, error: Exception) -> None:
        for pending in dict.fromkeys(pending for pending, _ in row.askers):
            if pending.missing >= 0:  # it may have failed with another of its rows
                self._fail(pending, error)

    def _fail(self, pending: PendingCall, error: Exception) -> None:
        pending.missing = -1
        self._queue.drop(pending)
        self._ready.append((pending.owner, None, error))
