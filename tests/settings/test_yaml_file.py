"""A recipe's file is read whole and within limits, or refused with the place in it; a shell's pipe is a file, too."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pipeline.settings.yaml_file import (
    MOST_BYTES,
    MOST_LEVELS,
    MOST_NODES,
    UnusableFileError,
    parse_yaml,
    read_yaml_file,
)


def test_anchors_and_merges_that_people_write_are_read() -> None:
    text = "base: &base {a: 1, b: [x]}\none: {<<: *base, b: 2}\nother: {<<: [*base, {c: 3}]}\nagain: *base\n"
    assert parse_yaml(text) == {
        "base": {"a": 1, "b": ["x"]},
        "one": {"a": 1, "b": 2},
        "other": {"a": 1, "b": ["x"], "c": 3},
        "again": {"a": 1, "b": ["x"]},
    }


def test_what_lies_just_within_the_limits_is_read() -> None:
    deep = parse_yaml("[" * (MOST_LEVELS - 1) + "]" * (MOST_LEVELS - 1))
    assert isinstance(deep, list)
    half = f"[{', '.join(['1'] * 1000)}]"
    assert len(parse_yaml(f"a: &a {half}\nb: [{', '.join(['*a'] * (MOST_NODES // 1001 - 2))}]")["b"]) > 100


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3\n", r"a key twice in one mapping \(line 3, column 1\)"),
        ("a: &a {b: *a}", "an alias leads back into itself"),
        ("a: [" + "[" * MOST_LEVELS + "]" * MOST_LEVELS + "]", "nested deeper than"),
        ("a: 2001-99-99", "malformed"),
        ("a: 'hunter2", r"line 1, column 12"),
    ],
)
def test_what_is_refused_is_told_by_its_place_and_without_its_words(text: str, reason: str) -> None:
    with pytest.raises(UnusableFileError, match=reason) as caught:
        parse_yaml(text)
    assert "hunter2" not in str(caught.value)


def test_aliases_that_stand_for_more_than_they_take_are_refused_before_they_are_written_out() -> None:
    text = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(12))
    with pytest.raises(UnusableFileError, match="values, aliases written out"):
        parse_yaml(text)


def test_a_file_that_is_too_long_or_never_ends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(UnusableFileError, match="has more than 1 MiB"):
        read_yaml_file(tmp_path / "long.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", "/dev/zero", "/dev/null"):
        with pytest.raises(UnusableFileError, match="neither a file nor a shell's pipe"):
            read_yaml_file(path)


def test_a_pipe_that_a_shell_opens_is_read_to_its_end() -> None:
    reader, writer = os.pipe()

    def write_slowly() -> None:
        for part in (b"a: ", b"1\n"):
            threading.Event().wait(0.05)
            os.write(writer, part)
        os.close(writer)

    thread = threading.Thread(target=write_slowly)
    thread.start()
    assert read_yaml_file(f"/dev/fd/{reader}") == {"a": 1}
    thread.join()
    os.close(reader)
