"""Messages between this process and one that may be killed: a line of JSON and some bytes. Nothing is unpickled.

8 bytes     length of the head, little-endian
head        JSON; its key "sizes" lists the lengths of what follows
blobs       bytes, one after the other
"""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Sequence
from typing import Any

MAX_HEAD = 64 << 20  # bytes; a row's columns stand in a head
Buffer = bytes | bytearray | memoryview
Message = tuple[dict[str, Any], list[bytearray]]
"""As received: head and blobs."""
Answer = tuple[dict[str, Any], Sequence[Buffer]]
"""What a guarded process is about to send: head and blobs."""


class ClosedError(Exception):
    """The other side is gone, or sends what is no message."""


class LateError(Exception):
    """The other side did not answer in time."""


class Channel:
    """One end of a conversation.

    Args:
        incoming: descriptor to read from.
        outgoing: descriptor to write to.
        max_bytes: of a message's blobs together, as received; more is no message.
    """

    def __init__(self, incoming: int, outgoing: int, max_bytes: int) -> None:
        self._incoming, self._outgoing, self._max_bytes = incoming, outgoing, max_bytes
        for descriptor in (incoming, outgoing):
            os.set_blocking(descriptor, False)

    def send(self, head: dict[str, Any], blobs: Sequence[Buffer] = (), *, seconds: float | None = None) -> None:
        """Send a message; `seconds` are what the other side may take to read it, None: any time.

        Raises:
            ClosedError: the other side is gone.
            LateError: it does not read.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        text = json.dumps({**head, "sizes": [len(blob) for blob in blobs]}).encode()
        for part in (len(text).to_bytes(8, "little") + text, *blobs):
            view = memoryview(part).cast("B") if len(part) else memoryview(b"")
            while view:
                _wait(self._outgoing, select.POLLOUT, deadline)
                try:
                    view = view[os.write(self._outgoing, view) :]
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise ClosedError from error

    def receive(self, *, seconds: float | None = None) -> Message:
        """The next message.

        Raises:
            ClosedError: the other side is gone, or sends what is no message.
            LateError: none came in time.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        length = int.from_bytes(self._read(8, deadline), "little")
        if length > MAX_HEAD:
            raise ClosedError
        try:
            head = json.loads(self._read(length, deadline))
            sizes = head.pop("sizes")
            is_sound = isinstance(head, dict) and all(type(size) is int and size >= 0 for size in sizes)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ClosedError from error
        if not is_sound or sum(sizes) > self._max_bytes:
            raise ClosedError
        return head, [self._read(size, deadline) for size in sizes]

    def _read(self, size: int, deadline: float | None) -> bytearray:
        data = bytearray(size)
        with memoryview(data) as view:
            done = 0
            while done < size:
                _wait(self._incoming, select.POLLIN, deadline)
                try:
                    count = os.readv(self._incoming, [view[done:]])
                except BlockingIOError:
                    continue
                if not count:
                    raise ClosedError
                done += count
        return data


def _wait(descriptor: int, event: int, deadline: float | None) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    if not poll.poll(None if left is None else left * 1000):
        raise LateError
