"""The commands themselves against recipes, places, checkpoints and run folders that nobody meant: whose fault is it?

Every situation is a small world (an input, a recipe, mostly a finished run) in which one thing is wrong. Commands run
in this process with a deadline. Each ends by itself, with an exit code that is documented, and never with "a fault of
shardedit": what is wrong is the user's, and is told by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from pipeline import cli
from tests.corpus.making import PNG

DEADLINE_S = 60.0  # of one command, which takes a fraction of a second on an idle machine
KEY = "a.tar/im0"
LOOKING = (("status", "OUT"), ("verify", "OUT"), ("regenerate", "OUT", KEY), ("report", "OUT"))
STARTING = (("plan", "RECIPE", "--no-probe"), ("edit", "RECIPE"))
READING = (("plan", "RECIPE", "--no-probe"), ("status", "RECIPE"))
BLAMED = "fault of shardedit"


@dataclass(frozen=True)
class Situation:
    """One thing that is wrong, and the commands that meet it."""

    kind: str
    name: str
    make: Callable[[World], Any]  # from a world in which everything is right
    commands: tuple[tuple[str, ...], ...] = STARTING
    refused: bool | None = True  # whether every command must end with 1 or 2; None: either is right
    says: str = ""  # what every refusal has in it
    has_run: bool = False  # whether the world holds a finished run
    powerless: bool = False  # whether permissions bind the commands, even those of root

    def with_commands(self, *commands: tuple[str, ...]) -> Situation:
        """The same for some commands."""
        return replace(self, commands=commands)


@dataclass(frozen=True)
class End:
    """How a command ended."""

    command: str
    code: int  # -1: it did not end, and was stopped at the deadline
    text: str  # all that it printed
    crash: str = ""  # an exception that came out of it
    seconds: float = 0.0


@dataclass
class Met:
    """A situation, and what came of it."""

    situation: Situation
    ends: list[End] = field(default_factory=list)

    def problems(self) -> list[str]:
        """What must not be."""
        return [f"{end.command}: {problem}" for end in self.ends for problem in self._problems(end)]

    def _problems(self, end: End) -> Iterator[str]:
        if end.code == -1:
            yield f"hung: it did not end in {DEADLINE_S:.0f} s"
        elif end.crash or "Traceback" in end.text:
            yield f"crashed: {end.crash or end.text[-300:]}"
        elif BLAMED in end.text:
            yield f"misblamed: {end.text[:300]}"
        elif end.code not in (0, 1, 2):
            yield f"ended with the exit code {end.code}: {end.text[-300:]}"
        elif self.situation.refused is not None and self.situation.refused != (end.code > 0):
            yield f"{'not refused' if self.situation.refused else 'refused'}: {end.text[-300:]}"
        elif end.code and self.situation.says not in end.text:
            yield f"does not say {self.situation.says!r}: {end.text[-300:]}"

    @property
    def outcome(self) -> str:
        """In a word."""
        if any(end.code == -1 for end in self.ends):
            return "hung"
        if any(end.crash or "Traceback" in end.text for end in self.ends):
            return "crashed"
        if any(BLAMED in end.text for end in self.ends):
            return "misblamed"
        return (
            "refused"
            if all(end.code for end in self.ends)
            else "done"
            if not any(end.code for end in self.ends)
            else "both"
        )


class HungError(BaseException):
    """No command may catch it."""


class World:
    """A folder with an input, a recipe and, where it is asked for, a finished run; made anew for every situation."""

    def __init__(self, root: Path) -> None:
        self.root = root / "world"
        self._kept = root / "kept"
        self.root.mkdir(parents=True)
        self.input, self.out, self.recipe = self.root / "in", self.root / "out", self.root / "recipe.yaml"
        self.input.mkdir()
        self.write_tar(self.input / "a.tar")
        self.write()
        end = self.run(("edit", "RECIPE"))
        assert end.code == 0, end
        shutil.copytree(self.root, self._kept)

    @staticmethod
    def write_tar(path: Path) -> None:
        """Two images with captions, and one that is none."""
        with tarfile.open(path, "w") as tar:
            for number in range(3):
                for name, data in ((f"im{number}.png", PNG if number < 2 else b"none"), (f"im{number}.txt", b"a cat")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    def settings(self) -> dict[str, Any]:
        """A recipe that works."""
        return {
            "source": {"shards": str(self.input)},
            "edits": {"concepts": [{"prompt": "a hat"}]},
            "model": {"name": "analytic", "size": 32},
            "inversion": {"method": "ddpm", "num_steps": 2},
            "sink": {"folder": str(self.out)},
            "run": {"engine": "local", "unit_size": 2, "call_size": 4},
        }

    def write(self, **changes: Any) -> None:
        """The recipe, with `section__key=value` changed."""
        data = self.settings()
        for path, value in changes.items():
            section, _, key = path.partition("__")
            data[section] = {**data[section], key: value} if key else value
        self.recipe.write_text(yaml.safe_dump(data))

    def reset(self, *, has_run: bool) -> None:
        """As it was in the beginning, with the run or without it."""
        shutil.rmtree(self.root)
        shutil.copytree(self._kept, self.root)
        if not has_run:
            shutil.rmtree(self.out)

    def meet(self, situation: Situation) -> Met:
        """Run every command of a situation, each in a world of its own."""
        met = Met(situation)
        for command in situation.commands:
            self.reset(has_run=situation.has_run)
            situation.make(self)
            try:
                with without_powers() if situation.powerless else contextlib.nullcontext():
                    met.ends.append(self.run(command))
            finally:
                for folder in (path for path in (self.root, *self.root.rglob("*")) if path.is_dir()):
                    if not folder.is_symlink():
                        folder.chmod(0o755)
        return met

    def run(self, command: tuple[str, ...]) -> End:
        """One command in this process, until its end or the deadline."""
        places = {"OUT": str(self.out), "RECIPE": str(self.recipe), "ROOT": str(self.root)}
        arguments = [places.get(word, word) for word in command]
        before = signal.signal(signal.SIGALRM, _hung)
        signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
        started = time.monotonic()
        try:
            done = CliRunner().invoke(cli.app, arguments)
        except HungError:
            return End(" ".join(command)[:80], -1, "")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        crash = "" if isinstance(done.exception, SystemExit | None) else repr(done.exception)
        return End(" ".join(command)[:80], done.exit_code, done.output, crash, time.monotonic() - started)


def _hung(*_: object) -> None:
    raise HungError


@contextmanager
def without_powers() -> Iterator[None]:
    """This thread, and those that it starts, are held by permissions, although they may be root's (capabilities(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    before = data[0]
    data[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, among those in effect
    libc.capset(header, data)
    try:
        yield
    finally:
        data[0] = before
        libc.capset(header, data)


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
