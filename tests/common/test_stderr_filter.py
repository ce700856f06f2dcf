"""A line of native code is kept from the user; nothing else is, not even the last words of an aborted process."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import textwrap

import pytest

SCRIPT = textwrap.dedent("""
    import os, sys
    from pipeline.common.stderr_filter import without_lines
    def native(text):
        os.write(2, text.encode())
    print("before", file=sys.stderr)
    with without_lines("constructor arguments in the object store"):
        native("[E 1 1] Actor has constructor arguments in the object store and max_restarts > 0\\n")
        native("[E 1 1] a real error\\n")
        print("python", sys.stderr.isatty(), file=sys.stderr)
        if "abort" in sys.argv:
            native("last words\\n")
            os.abort()
    native("constructor arguments in the object store, later\\n")
    print("after", file=sys.stderr)
""")


def run(*arguments: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, stderr=stderr, text=True, check=False, timeout=60)


def test_the_line_is_dropped_while_the_block_lasts_and_no_other() -> None:
    done = run()
    assert done.returncode == 0
    assert sorted(done.stderr.splitlines()) == sorted(
        ["before", "[E 1 1] a real error", "python False", "constructor arguments in the object store, later", "after"]
    )


def test_an_aborted_process_still_says_its_last_words() -> None:
    done = run("abort")
    assert done.returncode < 0
    assert "last words" in done.stderr
    assert "max_restarts" not in done.stderr


def test_a_terminal_stays_one_for_python() -> None:
    ours, theirs = pty.openpty()
    try:
        run(stderr=theirs)
        assert b"python True" in os.read(ours, 10_000)
    finally:
        os.close(ours)
        os.close(theirs)


def test_without_grep_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "max_restarts" in run().stderr
