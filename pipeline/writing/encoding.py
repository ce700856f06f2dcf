"""Threads that restore, compare and encode results while the model works on the next ones."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.models.allocator import give_freed_memory_back
from pipeline.reading.ahead import HELD_BYTES, LARGE_BYTES, pixel_bytes
from pipeline.records import Decoded, Rejected
from pipeline.writing.rows import OutputRow

WAITING = 32  # results per thread, at most

Encode = Callable[[Decoded | Rejected], OutputRow | Rejected]


class Encoders:
    """Shared by the units that are at work in a process.

    Args:
        threads: of them.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._one_large = threading.Lock()

    def map(self, encode: Encode, results: Iterable[Decoded | Rejected]) -> list[OutputRow | Rejected]:
        """Encode results as they come. Until then they wait as pixels, so only a bounded number does."""
        encoded: list[OutputRow | Rejected] = []
        pending: deque[Future[OutputRow | Rejected]] = deque()
        waiting: deque[int] = deque()  # bytes of their images
        for result in results:
            size = 0 if isinstance(result, Rejected) else pixel_bytes(result)
            pending.append(self._pool.submit(self._encode, encode, result, size > LARGE_BYTES))
            waiting.append(size)
            while len(pending) > WAITING * self._threads or sum(waiting) >= HELD_BYTES:
                encoded.append(pending.popleft().result())
                waiting.popleft()
        return encoded + [future.result() for future in pending]

    def _encode(self, encode: Encode, result: Decoded | Rejected, is_large: bool) -> OutputRow | Rejected:
        if not is_large:
            return encode(result)
        with self._one_large:  # encoding takes several times the memory of the image itself
            encoded = encode(result)
            give_freed_memory_back()
            return encoded

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)
