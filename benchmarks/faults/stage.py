"""What faults are played on: forked processes, calm runs to compare with, folders to begin with."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.cluster import Cluster
from benchmarks.faults.driver import Driver, Process
from benchmarks.faults.judge import State, Verdict, judge, look
from benchmarks.faults.stores import FEW, MANY, ONE, Store
from benchmarks.faults.strike import Strike
from tests.faulty import Fate, Request, faulty_proxy
from tests.runs import recipe_data

INPUTS = {ONE: (1, 4), FEW: (2, 4), MANY: (4, 4)}  # shards, and rows of each
UNIT_SIZE = 2
SHARD_SIZE = {ONE: 60_000, FEW: 100_000, MANY: 100_000}  # so that there are several files
DAMAGED = (1,)  # images that are none, in every run
FAILING = ("im03", "im06")  # whose results fail in the drivers that fail


class Aside:
    """Calls things in forked processes: threads of libraries then start there, and a fork meets none."""

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result.

        Raises:
            RuntimeError: it failed; with its own text.
        """
        return self.begin(function, *arguments)()

    def begin(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Start it; returns what waits for its result."""
        reads, writes = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reads)
            _answer(writes, function, *arguments)
        os.close(writes)

        def result() -> Any:
            with os.fdopen(reads, "rb") as pipe:
                data = pipe.read()
            os.waitpid(pid, 0)
            ok, value = pickle.loads(data) if data else (False, "the process died")
            if not ok:
                raise RuntimeError(value)
            return value

        return result


def _answer(handle: int, function: Callable[..., Any], *arguments: Any) -> None:
    import traceback

    try:
        answer = (True, function(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    with os.fdopen(handle, "wb") as pipe:
        pickle.dump(answer, pipe)
    os._exit(0)


aside = Aside()


@dataclass
class Calm:
    """Undisturbed runs on one store."""

    edited: State  # by one healthy command
    retried: State  # by one that failed in part, and --retry-failed
    operations: dict[str, dict[str, int]]  # by command, and by what is counted; see `Strike.of`
    requests: int  # of an edit, to an S3 server
    seconds: float  # that an edit takes
    begin_with: dict[str, Path]  # folders to copy, by command


@dataclass
class Stage:
    """One fault's own place on a store."""

    name: str
    store: Store
    work: Path
    calm: Calm | None = None
    cluster: Cluster | None = None
    started: list[Process] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """The run's."""
        return self.store.folder(self.name)

    @property
    def notes(self) -> Path:
        """Where its drivers leave theirs."""
        return self.work / "notes" / self.name

    def driver(self, command: str = "edit", **what: Any) -> Process:
        """Start one; see `Driver`."""
        self.notes.mkdir(parents=True, exist_ok=True)
        recipe = self.notes / "recipe.yaml"
        if not recipe.exists():
            run = {"unit_size": UNIT_SIZE, "max_failed_fraction": 1.0, **self.store.run}
            data = recipe_data(self.store.source, self.folder, sink={"shard_size": SHARD_SIZE[self.store.input]}, **run)
            recipe.write_text(json.dumps(data))
        process = Driver(
            recipe=recipe,
            folder=self.folder,
            notes=self.notes / str(len(self.started)),
            command=command,
            settle_s=what.pop("settle_s", self.store.settle_s),
            environment={**self.store.environment, **what.pop("environment", {})},
            **what,
        ).start()
        self.started.append(process)
        return process

    def run(self, command: str = "edit", **what: Any) -> Process:
        """Start one, and wait for its end."""
        process = self.driver(command, **what)
        process.wait()
        return process

    def fill(self, command: str) -> None:
        """Put there what a command begins with."""
        assert self.calm is not None
        if command in self.calm.begin_with:
            aside(self.store.fill, self.calm.begin_with[command], self.folder)

    def look(self) -> State:
        """What stands in the run's folder."""
        return aside(self._look)

    def judge(self, calm: State, **how: bool) -> Verdict:
        """Against what should; see `judge`."""
        return aside(self._judge, calm, how)

    def _look(self) -> State:
        return look(self._fetched())

    def _judge(self, calm: State, how: dict[str, bool]) -> Verdict:
        return judge(self._fetched(), calm, **how)

    def _fetched(self) -> Path:
        into = self.notes / f"fetched-{os.getpid()}"
        return self.store.fetch(self.folder, into)

    @contextmanager
    def proxied(self, fate: Callable[[Request], Fate], late: Path | None = None) -> Iterator[dict[str, str]]:
        """The environment of drivers whose requests meet a fate; late ones wait until a file is there."""
        self.notes.mkdir(parents=True, exist_ok=True)
        address = self.notes / f"proxy-{len(self.started)}"
        pid = os.fork()
        if pid == 0:
            try:
                _serve(self.store.endpoint, fate, late, address)
            finally:
                os._exit(1)
        while not address.exists():
            time.sleep(0.005)
        try:
            yield {"AWS_ENDPOINT_URL": address.read_text()}
        finally:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)

    def spoiled(self) -> int:
        """How many requests were not simply passed on, by the proxies that have ended."""
        found = [json.loads(path.read_text()) for path in self.notes.glob("proxy-*.counts")]
        return sum(count for counts in found for fate, count in counts.items() if fate != "passed on")

    def end(self) -> None:
        """Leave nothing behind."""
        for process in self.started:
            process.signal(signal.SIGKILL)
            process.signal(signal.SIGCONT)
        aside(self.store.clear, self.folder)
        shutil.rmtree(self.notes, ignore_errors=True)


def _serve(endpoint: str, fate: Callable[[Request], Fate], late: Path | None, address: Path) -> None:
    @contextmanager
    def held() -> Iterator[None]:
        assert late is not None
        while not late.exists():
            time.sleep(0.005)
        try:
            yield
        finally:
            late.with_suffix(".passed").touch()

    def stop(*_: Any) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    with faulty_proxy(endpoint, fate, held) as (url, counts):
        made = address.with_suffix(".new")
        made.write_text(url)
        made.rename(address)
        try:
            while True:
                time.sleep(60)
        except SystemExit:
            address.with_name(address.name + ".counts").write_text(json.dumps(counts))


LOCALLY = ("run.engine=local",)  # for drivers that need no cluster; both write the same bytes


def calm_edit(store: Store, work: Path) -> Calm:
    """Run an edit undisturbed, as one job, without a cluster.

    Raises:
        RuntimeError: it does not end well even so.
    """
    stage = Stage("calm", store, work)
    begun = time.monotonic()
    process = stage.run(overrides=LOCALLY, strike=Strike("count", 0))
    if process.code != 0:
        raise RuntimeError(f"undisturbed, an edit on {store.name} ends with {process.code}:\n{process.log}")
    seconds, state, operations = time.monotonic() - begun, stage.look(), process.operations
    stage.end()
    return Calm(state, state, {"edit": operations}, 0, seconds, {})


def calm_runs(store: Store, work: Path) -> Calm:
    """Run everything undisturbed, once, and count.

    Raises:
        RuntimeError: it does not end well even so.
    """
    count = Strike("count", 0)
    states: dict[str, State] = {}
    operations: dict[str, dict[str, int]] = {}
    mirrors = {command: work / "mirrors" / f"{store.name} {command}" for command in ("retry", "repair")}

    def done(stage: Stage, process: Process, what: str, codes: tuple[int, ...] = (0,)) -> None:
        if process.code not in codes:
            raise RuntimeError(f"undisturbed, {what} on {store.name} ends with {process.code}:\n{process.log}")
        if what in ("retry", "edit", "repair"):
            operations[what] = process.operations
            states[what] = stage.look()

    edited = Stage("calm", store, work)
    begun = time.monotonic()
    done(edited, edited.run(strike=count), "edit")
    seconds = time.monotonic() - begun
    aside(_mirror, edited, mirrors["repair"])
    aside(_damage, mirrors["repair"])
    failed = Stage("calm-failed", store, work)
    done(failed, failed.run(failing=FAILING), "a failing edit")
    aside(_mirror, failed, mirrors["retry"])
    done(failed, failed.run("retry", strike=count), "retry")
    repaired = Stage("calm-repaired", store, work, Calm(states["edit"], states["retry"], {}, 0, 0.0, mirrors))
    repaired.fill("repair")
    done(repaired, repaired.run("repair", strike=count), "repair", (0, 1))
    done(repaired, repaired.run(), "an edit after a repair")
    if not (verdict := repaired.judge(states["edit"])).whole:
        raise RuntimeError(f"undisturbed, a repair on {store.name} does not restore the run: {verdict}")
    stages = [edited, failed, repaired]
    requests = 0
    if store.environment:
        counted = Stage("calm-requests", store, work)
        with counted.proxied(lambda _: "passed on") as environment:
            done(counted, counted.run(environment=environment), "a run through a proxy")
        requests = sum(json.loads(next(counted.notes.glob("proxy-*.counts")).read_text()).values())
        stages.append(counted)
    for stage in stages:
        stage.end()
    return Calm(states["edit"], states["retry"], operations, requests, seconds, mirrors)


def _mirror(stage: Stage, into: Path) -> None:
    shutil.copytree(stage._fetched(), into)


def _damage(folder: Path) -> None:
    """What `verify --repair` is for: bytes that changed, a file that is gone, strays."""
    first, second, *_ = sorted((folder / "data").glob("*.parquet"))
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 255
    first.write_bytes(data)
    second.unlink()
    next(iter(sorted((folder / "quarantine").glob("*.parquet")))).write_bytes(b"PAR1")
    (folder / "data" / "train-00077-of-00078.parquet").write_bytes(b"stray")
