"""Keep known lines of native code off standard error. What Python prints, and every other line, comes through.

Ray's C++ core writes to file descriptor 2 itself, where no logger of Python's can stop it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_TO_END = 2.0


@contextmanager
def without_lines(*unwanted: str) -> Iterator[None]:
    """Drop lines that hold one of some texts from what is written to file descriptor 2 meanwhile.

    A process of its own does it, not a thread: should this one be aborted, its last words still come out. Where there
    is no `grep`, or no standard error, nothing is dropped.
    """
    with contextlib.ExitStack() as stack:
        try:
            before = os.dup(2)
        except OSError:
            yield
            return
        stack.callback(os.close, before)
        command = ["grep", "--line-buffered", "--invert-match", "--fixed-strings"]
        command += [f"--regexp={text}" for text in unwanted]
        try:
            # A session of its own: Ctrl-C is for us, and what we say about it has to come through.
            grep = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=before, stderr=subprocess.DEVNULL, start_new_session=True
            )
        except OSError:
            yield
            return
        assert grep.stdin is not None
        stack.callback(_end, grep)
        if sys.stderr is sys.__stderr__ and sys.stderr is not None:
            # Python's goes the straight way: a bar asks whether it is on a terminal. Closed by whoever holds it last,
            # which may be a handler of a logger.
            sys.stderr.flush()
            straight = os.fdopen(os.dup(before), "w", 1, encoding=sys.stderr.encoding, errors="backslashreplace")
            stack.enter_context(contextlib.redirect_stderr(straight))
        os.dup2(grep.stdin.fileno(), 2)
        grep.stdin.close()
        stack.callback(os.dup2, before, 2)
        yield


def _end(grep: subprocess.Popen[bytes]) -> None:
    """Let it write what is left. A child that was started meanwhile may hold its input open for ever."""
    try:
        grep.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        grep.kill()
        grep.wait()
