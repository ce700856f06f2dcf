"""A finished run whose files and notes were damaged, lost or replaced: every command says so, or puts it right."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.corpus.commands import LOOKING, STARTING, Situation, World, remove

FILES = {  # what they are: where they stand
    "run.json": "run.json",
    "summary.json": "summary.json",
    "the report": "report.html",
    "the card": "README.md",
    "a manifest": "_units/*/*.json",
    "the index": "_output/index*.json",
    "contents of a file": "_output/data/*.json",
    "the lock's flag": "_lock/*.json",
    "the baseline": "_baseline/*.json",
    "results": "data/*.parquet",
    "failures": "quarantine/*.parquet",
}
FOLDERS = {name: name for name in ("data", "quarantine", "_units", "_output", "_lock", "_attempts", "_baseline")}
CONTENT: dict[str, bytes] = {
    "nothing": b"",
    "noise": bytes(range(256)) * 4,
    "half an object": b'{"a": ',
    "lists 100,000 deep": b"[" * 100_000,
    "objects 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a list": b"[]",
    "an object": b"{}",
    "a number of 5,000 digits": b"9" * 5000,
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "text": b"not ours",
}
INSTEAD: dict[str, Callable[[Path], Any]] = {
    "a folder": Path.mkdir,
    "a dangling link": lambda path: path.symlink_to("/nowhere/at/all"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a named pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
COMMANDS = (*LOOKING, ("verify", "OUT", "--repair"), *STARTING)
RECORD: dict[str, tuple[str, Any]] = {  # what is changed in run.json: to what
    "an older schema": ("schema_version", 1),
    "a schema of text": ("schema_version", "two"),
    "no recipe": ("recipe", {}),
    "a recipe of text": ("recipe", "x"),
    "a recipe of empty sections": ("recipe", {"run": {}, "sink": {}}),
    "columns that are none": ("recipe", {"run": {}, "sink": {"columns": "x"}}),
    "no model": ("model", {}),
    "another model": ("model", {"name": "x", "extra": "y"}),
    "a call size of 0": ("call_size", 0),
    "a call size of text": ("call_size", "many"),
    "threads below 0": ("threads", -1),
    "no input": ("input", []),
    "an input of numbers": ("input", [[1, 2, 3]]),
    "an input of NaN": ("input", [["a.tar", float("nan"), ""]]),
    "no settings": ("settings", {}),
    "unknown keys": ("bogus", 1),
}


def situations() -> Iterator[Situation]:
    """All of them."""
    for name, pattern in FILES.items():
        for damage, content in CONTENT.items():
            make = partial(_write, pattern=pattern, content=content)
            yield Situation(f"run folder, {name}", damage, make, COMMANDS, refused=None, has_run=True)
        yield Situation(
            f"run folder, {name}", "cut in half", partial(_cut, pattern=pattern), COMMANDS, refused=None, has_run=True
        )
    for name, pattern in {**FILES, **FOLDERS}.items():
        for damage, put in INSTEAD.items():
            if (damage == "a folder") > (name in FILES):
                continue
            make = partial(_put, pattern=pattern, put=put)
            yield Situation(f"run folder, {name}", damage, make, COMMANDS, refused=None, has_run=True)
        make = partial(_put, pattern=pattern, put=lambda _: None)
        yield Situation(f"run folder, {name}", "gone", make, COMMANDS, refused=None, has_run=True)
    for name, (key, value) in RECORD.items():
        yield Situation("run folder, record", name, partial(_set, key=key, value=value), COMMANDS, None, "", True)


def _one(world: World, pattern: str) -> Path:
    return min(world.out.glob(pattern))


def _write(world: World, pattern: str, content: bytes) -> None:
    _one(world, pattern).write_bytes(content)


def _cut(world: World, pattern: str) -> None:
    path = _one(world, pattern)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _put(world: World, pattern: str, put: Callable[[Path], Any]) -> None:
    path = _one(world, pattern)
    remove(path)
    put(path)


def _set(world: World, key: str, value: Any) -> None:
    path = world.out / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
