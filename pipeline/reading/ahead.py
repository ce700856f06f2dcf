"""Rows made ready a few before they are wanted, so that no GPU waits for a decoder; of large images fewer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from pipeline.models.allocator import give_freed_memory_back
from pipeline.records import Asked, Decoded, Prepared, Rejected

PREPARED_AHEAD = 4  # rows
HELD_BYTES = 256 << 20  # of pixels, ready and at work: with so many or more, no further row is begun
LARGE_BYTES = 64 << 20  # of an image's pixels: what was needed for more is given back at once

Ready = Prepared | list[Decoded | Rejected]


class Ahead:
    """An iterator over rows made ready, in their order, which a thread of its own fills.

    It answers None where nothing is ready because those that were taken hold too much memory: `let_go` of one of them.

    Args:
        rows: what to make ready.
        prepare_one: does so.
    """

    def __init__(self, rows: Iterable[Asked], prepare_one: Callable[[Asked], Ready]) -> None:
        self._rows, self._prepare_one = rows, prepare_one
        self._changed = threading.Condition()
        self._ready: deque[Ready] = deque()
        self._taken: dict[int, int] = {}  # bytes of those that were taken, by their place
        self._places = 0
        self._held = 0  # bytes of what is ready or taken
        self._over = False  # nothing more will be ready
        self._failure: BaseException | None = None

    def fill(self) -> None:
        """Make every row ready; run in a thread."""
        try:
            for row in self._rows:
                with self._changed:
                    self._changed.wait_for(lambda: self._over or not (self._is_full or self._is_heavy))
                    if self._over:
                        return
                one = self._prepare_one(row)
                if pixel_bytes(one) > LARGE_BYTES:
                    give_freed_memory_back()
                with self._changed:
                    self._ready.append(one)
                    self._held += pixel_bytes(one)
                    self._changed.notify_all()
        except BaseException as failure:  # raised again where the rows are taken
            self._failure = failure
        finally:
            self.close()

    @property
    def _is_full(self) -> bool:
        return len(self._ready) > PREPARED_AHEAD

    @property
    def _is_heavy(self) -> bool:
        return self._held >= HELD_BYTES

    def __iter__(self) -> Iterator[Ready | None]:
        return self

    def __next__(self) -> Ready | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._over or self._is_heavy)
            if self._ready:
                one = self._ready.popleft()
                self._taken[self._places] = pixel_bytes(one)
                self._places += 1
                self._changed.notify_all()
                return one
            if self._failure is not None:
                raise self._failure
            if self._over:
                raise StopIteration
            return None

    def let_go(self, place: int) -> None:
        """Of the row that was taken as number `place`, from 0: nothing holds it any more."""
        with self._changed:
            self._held -= self._taken.pop(place)
            self._changed.notify_all()

    def close(self) -> None:
        """Make no further row ready."""
        with self._changed:
            self._over = True
            self._changed.notify_all()


def pixel_bytes(one: Ready | Decoded) -> int:
    """What a row takes besides its encoded bytes, about. Half of `HELD_BYTES` or more counts as all of it: what comes
    after such a row waits."""
    prepared = one.prepared if isinstance(one, Decoded) else one
    if not isinstance(prepared, Prepared):
        return 0
    size = prepared.original.nbytes + (0 if prepared.allowed is None else prepared.allowed.nbytes)
    return size if size < HELD_BYTES // 2 else HELD_BYTES
