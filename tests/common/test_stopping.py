"""SIGINT, SIGTERM and SIGHUP stop a run in order: at once, with one line, and without a healthy row that is blamed.

The commands are children of one process, which has imported everything once.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import pytest

from pipeline.recipe import Recipe
from pipeline.running import driver
from tests.runs import asked, contents, recipe_data, results, write_shards

pytestmark = pytest.mark.timeout(120)
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")

# Reads a scenario per line, and runs it in a child; answers with the child's end and what it printed.
DRIVER = textwrap.dedent("""
    import json, os, signal, sys, tempfile, threading, time
    from pathlib import Path
    from pipeline import entry, flow
    from pipeline.common import stopping
    from pipeline.running import driver
    from pipeline.looking.report import page
    from pipeline.models import loading
    import pipeline.cli, pipeline.running.worker
    from pipeline.recipe import load_recipe

    def wait(begun, seconds):
        Path(begun).touch()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.01)

    def scenario(told):
        stopping.GRACE_S = told["grace"]
        prepare, load = flow.prepare_row, loading.load_backbone
        def slow_prepare(row, *rest):
            if told["where"] == "unit" and row.sample.key == told["key"]:
                wait(told["begun"], told["seconds"])
            return prepare(row, *rest)
        def slow_load(*args, **options):
            if told["where"] == "model":
                wait(told["begun"], told["seconds"])
            return load(*args, **options)
        flow.prepare_row, loading.load_backbone = slow_prepare, slow_load
        if told["program"]:
            exec(told["program"])
        else:
            entry.main(["edit", told["recipe"]])

    for line in sys.stdin:
        told = json.loads(line)
        child = os.fork()
        if child == 0:
            said = os.open(told["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1), os.dup2(said, 2)
            try:
                scenario(told)
                sys.stdout.flush()
                os._exit(0)
            except SystemExit as end:
                sys.stderr.flush()
                os._exit(end.code or 0)
            except BaseException:
                import traceback
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(99)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
""")


@dataclass
class End:
    """How a command ended."""

    code: int
    said: str  # by stdout and stderr
    seconds: float  # from the last signal


@dataclass
class Forks:
    """The process that runs the commands, and where they work."""

    process: subprocess.Popen[str]
    folder: Path

    def recipe(self, name: str, **run: object) -> Recipe:
        """One unit of six images."""
        data = recipe_data(
            self.folder / "in", self.folder / name, sink={"shard_size": 0}, engine="local", unit_size=6, **run
        )
        (self.folder / f"{name}.json").write_text(json.dumps(data))
        return Recipe.model_validate(data)

    def run(
        self,
        name: str,
        *signals: str,
        where: str = "unit",
        seconds: float = 0.3,
        grace: float = 25.0,
        program: str = "",
        pause: float = 0.2,
    ) -> End:
        """A command or program that gets signals from the moment on at which it is where it shall be."""
        begun, said = self.folder / "begun", self.folder / "said"
        begun.unlink(missing_ok=True)
        said.unlink(missing_ok=True)
        scenario = {"recipe": str(self.folder / f"{name}.json"), "begun": str(begun), "said": str(said), "key": "im03"}
        scenario |= {"where": where, "seconds": seconds, "grace": grace, "program": textwrap.dedent(program)}
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps(scenario), file=stdin, flush=True)
        child = psutil_of(stdout)
        for number, name_of in enumerate(signals):
            while not number and not begun.exists():
                time.sleep(0.01)
            time.sleep(pause * bool(number))
            child.send_signal(signal.Signals[name_of])
        told = time.monotonic()
        code = int(stdout.readline())
        return End(code, said.read_text(), time.monotonic() - told)


def psutil_of(stdout: IO[str]) -> psutil.Process:
    """The child that the driver has just begun."""
    return psutil.Process(int(stdout.readline()))


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    folder = tmp_path_factory.mktemp("stopping")
    write_shards(folder / "in", shards=1, rows=6, damaged=())
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Forks(process, folder)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def calm(forks: Forks) -> dict[str, object]:
    driver.run(forks.recipe("calm"), progress="off")
    return contents(forks.folder / "calm")


def locks(folder: Path) -> list[str]:
    """The states of all flags."""
    return [json.loads(path.read_bytes())["state"] for path in folder.glob("_lock/*.json")]


def last_line(end: End) -> str:
    assert "Traceback" not in end.said
    return end.said.splitlines()[-1]


def test_a_unit_that_was_stopped_ever_again_is_whole_in_the_end_and_no_row_is_blamed(
    forks: Forks, calm: dict[str, object]
) -> None:
    forks.recipe("again")
    out = forks.folder / "again"
    for name in (*SIGNALS, *SIGNALS):
        end = forks.run("again", name)
        assert end.code == 128 + signal.Signals[name]
        assert last_line(end).startswith(f"Stopped by {name}. Committed so far: 0 images. ")
        assert end.seconds < 5
        assert locks(out) == ["released"]
        assert json.loads((out / "summary.json").read_text())["outcome"] == "stopped early"
        assert not list(out.glob("_attempts/*.json"))
    assert forks.run("again").code == 0
    assert contents(out) == calm
    assert results(out) == asked(shards=1, rows=6)
    assert not list(out.glob("_attempts/*"))


def test_a_run_that_comes_to_no_point_where_it_may_end_is_ended_within_its_grace(
    forks: Forks, calm: dict[str, object]
) -> None:
    forks.recipe("stuck")
    out = forks.folder / "stuck"
    for name in (*SIGNALS, *SIGNALS):
        end = forks.run("stuck", name, seconds=30, grace=0.3)
        assert end.code == 128 + signal.Signals[name]
        assert last_line(end).startswith(f"Stopped by {name}. What is committed stays")
        assert end.seconds < 3
        assert locks(out) == ["released"]
    assert list(out.glob("_attempts/*.json"))  # nobody was left to take it back
    assert forks.run("stuck").code == 0
    assert contents(out) == calm
    assert not list(out.glob("_attempts/*"))


def test_a_second_signal_ends_a_command_at_once(forks: Forks) -> None:
    forks.recipe("twice")
    end = forks.run("twice", "SIGINT", "SIGINT", seconds=30)
    assert (end.code, end.seconds < 3) == (130, True)
    assert last_line(end).startswith("Stopped by SIGINT.")
    assert end.said.count("Stopped") == 1
    assert locks(forks.folder / "twice") == ["released"]


def test_a_command_that_loads_its_model_need_not_finish_that(forks: Forks) -> None:
    forks.recipe("model")
    end = forks.run("model", "SIGTERM", where="model", seconds=30)
    assert (end.code, end.seconds < 5) == (143, True)
    assert end.said.startswith("Stopped by SIGTERM. ")
    assert locks(forks.folder / "model") == ["released"]
    assert forks.run("model").code == 0  # what it left is no run that has lost its run.json


# The thread that hears of a signal is let in as soon as it can be.
HANDLERS = """
    os.write = lambda *args, write=os.write: (write(*args), time.sleep(0.05))[0]
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    def own(*_):
        print("own")
    signal.signal(signal.SIGHUP, own)
    try:
        print(driver.run(load_recipe(told["recipe"]), progress="off").outcome)
    except KeyboardInterrupt as error:
        print(type(error).__name__)
    before[signal.SIGHUP] = own
    assert {number: signal.getsignal(number) for number in stopping.SIGNALS} == before
    assert [thread for thread in threading.enumerate() if thread.name == "signals"] == []
"""


@pytest.mark.parametrize(
    ("signals", "code", "said"),
    [
        (["SIGINT"], 0, "Stopped\n"),  # a KeyboardInterrupt, which the program may handle
        (["SIGTERM"], -signal.SIGTERM, ""),  # as without the run, but in order
        (["SIGHUP"], 0, "own\ncomplete\n"),
        ([], 0, "complete\n"),
    ],
)
def test_a_program_that_runs_it_keeps_its_handlers(forks: Forks, signals: list[str], code: int, said: str) -> None:
    name = f"program-{''.join(signals)}"
    forks.recipe(name)
    end = forks.run(name, *signals, program=HANDLERS)
    assert (end.code, end.said) == (code, said)
    assert locks(forks.folder / name) == ["released"]
    assert not list((forks.folder / name).glob("_attempts/*.json"))


def test_a_second_interrupt_in_a_program_is_its_own(forks: Forks) -> None:
    forks.recipe("impatient")
    end = forks.run("impatient", "SIGINT", "SIGINT", seconds=1.0, program=HANDLERS)
    assert (end.code, end.said) == (0, "Stopped\n")


def test_a_run_outside_of_the_main_thread_hears_no_signal_and_works(forks: Forks) -> None:
    forks.recipe("thread")
    program = """
        def main():
            print(driver.run(load_recipe(told["recipe"]), progress="off").outcome)
        thread = threading.Thread(target=main)
        thread.start()
        thread.join()
    """
    end = forks.run("thread", program=program)
    assert (end.code, end.said) == (0, "complete\n")


@pytest.mark.parametrize(("name", "seconds"), [("SIGTERM", 0.0), ("SIGINT", 0.3), ("SIGHUP", 0.6)])
def test_a_command_that_still_imports_its_libraries_ends_with_one_line(forks: Forks, name: str, seconds: float) -> None:
    forks.recipe("early")
    command = [sys.executable, "-m", "jobs.edit", str(forks.folder / "early.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not handles(process.pid, signal.SIGTERM):
            time.sleep(0.002)
        time.sleep(seconds)
        process.send_signal(signal.Signals[name])
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.Signals[name]
    assert said == f"Stopped by {name}. What is committed stays: the same command goes on from there.\n"


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
