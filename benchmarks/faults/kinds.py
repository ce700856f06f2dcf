"""The kinds of faults: each strikes a run, lets its successors end the work, and has what they leave judged."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from benchmarks.faults import filesystems
from benchmarks.faults.driver import HANGS, SHORT_S, Process
from benchmarks.faults.judge import State, Verdict
from benchmarks.faults.stage import FAILING, Calm, Stage
from benchmarks.faults.stores import PARTED
from benchmarks.faults.strike import Strike
from tests.faulty import Fate, Request, dice

ELSEWHERE = ("another-machine", "a-third-machine")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
HOUR_S = 3600.0
What = dict[str, Any]  # a case's own settings, of JSON's types


@dataclass
class Played:
    """What came of one case."""

    faults: int = 0  # that struck
    codes: list[int] = field(default_factory=list)  # of the drivers that were hit, or that others disturbed
    complaints: list[str] = field(default_factory=list)  # what did not end as it should, beside the data
    verdicts: list[Verdict] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)

    def hit(self, process: Process, *, orderly: bool) -> None:
        """Note a driver that was struck; `orderly`: it is to end by itself, and without a traceback."""
        code = process.wait()
        self.codes.append(code)
        self.logs.append(process.log)
        if code == HANGS:
            self.complaints.append("it hung")
        elif orderly and (code < 0 or code == 99 or "Traceback" in process.log or "fault of shardedit" in process.log):
            self.complaints.append(f"no orderly end: exit code {code}")

    def ends_well(self, process: Process, what: str, codes: tuple[int, ...] = (0,)) -> None:
        """Note a driver that nothing disturbs any more."""
        if process.wait() not in codes:
            self.complaints.append(f"{what} ended with {process.code}")
        self.logs.append(process.log)


@dataclass(frozen=True)
class Kind:
    """A kind of fault on a store."""

    name: str
    store: str  # "" for those that bring their own
    play: Callable[[Stage, What], Played]
    cases: Callable[[Calm, random.Random], Iterable[What]]


def again(
    stage: Stage,
    played: Played,
    command: str,
    calm: State | None = None,
    overrides: tuple[str, ...] = (),
    **how: bool,
) -> Played:
    """The same command without faults, and what is there then."""
    assert stage.calm is not None
    repairs = command == "repair"
    played.ends_well(stage.run(command, overrides=overrides), "the same command again", (0, 1) if repairs else (0,))
    if repairs:
        played.ends_well(stage.run(), "the edit after it")
    expected = calm or (stage.calm.retried if command == "retry" else stage.calm.edited)
    played.verdicts.append(stage.judge(expected, **how))
    return played


# One driver ------------------------------------------------------------------------------------------------------


def struck(stage: Stage, what: What) -> Played:
    """Killed before an operation, or out of space from it on."""
    stage.fill(what["command"])
    process = stage.run(what["command"], strike=Strike(what["strike"], what["at"]))
    played = Played(faults=int(bool(process.struck)))
    played.hit(process, orderly=what["strike"] != "kill")
    return again(stage, played, what["command"])


def struck_twice(stage: Stage, what: What) -> Played:
    """Killed, and the rerun killed as well."""
    played = Played()
    for at in what["at"]:
        process = stage.run(strike=Strike("kill", at))
        played.hit(process, orderly=False)
        played.faults += bool(process.struck)
    return again(stage, played, "edit")


def signalled(stage: Stage, what: What) -> Played:
    """Signals at random moments, one or several."""
    process = stage.driver()
    process.begun()
    played = Played()
    for pause, name in what["signals"]:
        time.sleep(pause)
        if not process.ended():
            process.signal(signal.Signals[name])
            played.faults += 1
    played.hit(process, orderly=True)
    return again(stage, played, "edit")


def signalled_on_one_unit(stage: Stage, what: What) -> Played:
    """Stops, every one while the same unit is at work: no row of it is to be blamed."""
    played = Played()
    for name in what["signals"]:
        process = stage.run(strike=Strike(name, what["at"], "results"))
        played.faults += bool(process.struck)
        played.hit(process, orderly=True)
    return again(stage, played, "edit")


def skewed(stage: Stage, what: What) -> Played:
    """A driver whose clock is wrong is killed; its successors are right, or the other way round."""
    wrong = {"clock_s": what["hours"] * HOUR_S}
    first, second = (wrong, {}) if what["first"] else ({}, wrong)
    process = stage.run(strike=Strike("kill", what["at"]), **first)
    played = Played(faults=int(bool(process.struck)))
    played.hit(process, orderly=False)
    successor = stage.run(host=ELSEWHERE[0], lease_s=SHORT_S, **second)
    played.ends_well(successor, "a driver elsewhere, whose clock differs,")
    return again(stage, played, "edit")


# Several drivers -------------------------------------------------------------------------------------------------


def zombie(stage: Stage, what: What) -> Played:
    """A driver stops for longer than its lease, another one takes over and ends the work, the first one wakes up."""
    assert stage.calm is not None
    command = what["command"]
    stage.fill(command)
    bad = {"failing": FAILING}
    first, second = {"same": ({}, {}), "worse": (bad, {}), "better": ({}, bad)}[what["outcomes"]]
    played = Played()
    sleeper = stage.driver(command, strike=Strike("stop", what["at"], "work"), lease_s=SHORT_S, **first)
    stopped = sleeper.stopped()
    played.ends_well(stage.run(command, host=ELSEWHERE[0], lease_s=SHORT_S, **second), "the driver that took over")
    if stopped:
        before = stage.look()
        played.faults = 1
        sleeper.signal(signal.SIGCONT)
        played.hit(sleeper, orderly=True)
        # Whatever it did: what its successor left stands.
        played.verdicts.append(stage.judge(before, by_rows=True, noise=True))
    changed = what["outcomes"] != "same"
    calm = stage.calm.retried if changed or command == "retry" else stage.calm.edited
    return again(stage, played, "retry" if changed else command, calm, by_rows=changed or command == "retry")


def late_put(stage: Stage, what: What) -> Played:
    """A driver dies while a put of its is on the way; it arrives when the next driver has ended the work."""
    assert stage.calm is not None
    command = what["command"]
    stage.fill(command)
    release = stage.notes / "release"
    puts = iter(range(1, 10**6))
    reached = stage.notes / "reached"

    def fate(request: Request) -> Fate:
        if request.method != "PUT" or "/_lock/" in request.path or next(puts) != what["at"]:
            return "passed on"
        reached.touch()
        return "late"

    played = Played()
    with stage.proxied(fate, release) as environment:
        first = {"failing": FAILING} if what["outcomes"] == "worse" else {}
        sender = stage.driver(command, environment=environment, **first)
        while not reached.exists() and not sender.ended():
            time.sleep(0.005)
        sender.signal(signal.SIGKILL)
        sender.wait()
        played.ends_well(stage.run(command), "the driver that took over")
        before = stage.look()
        release.touch()
        while reached.exists() and not release.with_suffix(".passed").exists():
            time.sleep(0.005)
    played.faults = int(reached.exists())
    played.verdicts.append(stage.judge(before, by_rows=True, noise=True))
    changed = what["outcomes"] != "same"
    calm = stage.calm.retried if changed or command == "retry" else stage.calm.edited
    return again(stage, played, "retry" if changed else command, calm, by_rows=changed or command == "retry")


def at_once(stage: Stage, what: What) -> Played:
    """Two or three drivers begin at the same time, on one machine or several, their clocks right or not."""
    assert stage.calm is not None
    processes = []
    for host, pause, hours in zip(what["hosts"], what["pauses"], what["hours"], strict=True):
        time.sleep(pause)
        processes.append(stage.driver(host=host, clock_s=hours * HOUR_S, lease_s=SHORT_S))
    played = Played(faults=len(processes) - 1)
    for process in processes:
        played.hit(process, orderly=True)
    if 0 in played.codes:
        played.verdicts.append(stage.judge(stage.calm.edited, by_rows=True, noise=True))
    return again(stage, played, "edit")


def partitions(stage: Stage, what: What) -> Played:
    """Several jobs on parts of one run at once, each killed where it is to be, all of these begun again at once."""
    assert stage.calm is not None
    count = len(what["at"])
    parts = [("--partition", f"{part}/{count}") for part in range(count)]
    first = [
        stage.driver(overrides=part, strike=Strike("kill", at) if at else None)
        for part, at in zip(parts, what["at"], strict=True)
    ]
    played = Played()
    for process in first:
        played.hit(process, orderly=False)
    played.faults = sum(bool(process.struck) for process in first) or 1  # jobs beside each other are one, too
    begun_again = [stage.driver(overrides=part) for part, done in zip(parts, first, strict=True) if done.code != 0]
    for process in begun_again:
        played.ends_well(process, "a job that was begun again")
    played.verdicts.append(stage.judge(stage.calm.edited))
    return played


# The store -------------------------------------------------------------------------------------------------------


def full(stage: Stage, what: What) -> Played:
    """A real file system of its own, with too little room, or too few inodes; then with enough."""
    played = Played()
    with filesystems.small(stage, what) as enough:
        process = stage.run()
        played.hit(process, orderly=True)
        played.faults = int(process.code != 0)
        enough()
        return again(stage, played, "edit")


def one_request(stage: Stage, what: What) -> Played:
    """A single request is refused, cut, or loses its answer: the run itself is to end well."""
    meets: Fate = what["fate"]
    played = Played()
    with stage.proxied(lambda request: meets if request.number == what["at"] else "passed on") as environment:
        process = stage.run(environment=environment)
        played.hit(process, orderly=True)
        if process.code != 0 and meets != "full":
            played.complaints.append(f"one spoiled request ended a run with {process.code}")
    played.faults = int(stage.spoiled() > 0)
    return again(stage, played, "edit")


def many_requests(stage: Stage, what: What) -> Played:
    """A share of all requests is refused, of all bodies cut; a kill, too, where one is asked for."""
    played = Played()
    strike = Strike("kill", what["at"]) if what["at"] else None
    with stage.proxied(dice(what["refused"], what["cut"], what["seed"])) as environment:
        process = stage.run(environment=environment, strike=strike)
        played.hit(process, orderly=not what["at"])
    played.faults = int(stage.spoiled() > 0) + bool(process.struck)
    return again(stage, played, "edit")


# Which, and how many ---------------------------------------------------------------------------------------------


def every(command: str, strike: str = "kill", step: int = 1) -> Callable[[Calm, random.Random], Iterable[What]]:
    """Every operation of a command, or every so many."""

    def cases(calm: Calm, _: random.Random) -> Iterator[What]:
        for at in range(1, calm.operations[command]["store"] + 1, step):
            yield {"command": command, "strike": strike, "at": at}

    return cases


def drawn(count: int, draw: Callable[[Calm, random.Random, int], What]) -> Callable[..., Iterable[What]]:
    """So many, each drawn with its number."""
    return lambda calm, rng: (draw(calm, rng, number) for number in range(count))


def _signals(calm: Calm, rng: random.Random, number: int) -> What:
    several = number % 3 == 2
    first = [round(rng.uniform(0.02, calm.seconds), 3), SIGNALS[number // 3 % 3 if several else number % 3]]
    more = [[round(rng.uniform(0.0, 0.15), 3), rng.choice(SIGNALS)] for _ in range(rng.randint(1, 3))]
    return {"signals": [first, *(more if several else [])]}


def _on_one_unit(calm: Calm, rng: random.Random, number: int) -> What:
    return {"signals": [SIGNALS[number % 3]] * 4, "at": rng.randint(1, 2)}


def _skewed(calm: Calm, rng: random.Random, number: int) -> What:
    hours = (30, -30, 3, -3)[number % 4]
    return {"hours": hours, "first": number // 4 % 2 == 0, "at": rng.randint(1, calm.operations["edit"]["store"])}


ZOMBIES = (("edit", "same"), ("edit", "worse"), ("edit", "better"), ("retry", "same"), ("retry", "worse"))


def _zombie(calm: Calm, rng: random.Random, number: int) -> What:
    command, outcomes = ZOMBIES[number % len(ZOMBIES)]
    return {"command": command, "outcomes": outcomes, "at": rng.randint(1, calm.operations[command]["work"])}


def _late(calm: Calm, rng: random.Random, number: int) -> What:
    command, outcomes = [pair for pair in ZOMBIES if pair[1] != "better"][number % 4]
    return {"command": command, "outcomes": outcomes, "at": rng.randint(1, calm.operations[command]["work"] * 2 // 3)}


def _at_once(calm: Calm, rng: random.Random, number: int) -> What:
    count = 2 + number % 2
    hosts = ["", *islice(cycle(ELSEWHERE), count - 1)] if number // 2 % 2 else [""] * count
    hours = [0, *(rng.choice((0, 0, 3, -3)) for _ in range(count - 1))]
    longest = 0.02 if number // 4 % 2 else calm.seconds / 2
    return {"hosts": hosts, "hours": hours, "pauses": [0, *(round(rng.uniform(0, longest), 3) for _ in hosts[1:])]}


def _partitions(calm: Calm, rng: random.Random, number: int) -> What:
    count = 2 + 2 * (number % 2)
    operations = calm.operations["edit"]["store"] // count
    return {"at": [0 if rng.random() < 0.2 else rng.randint(1, operations) for _ in range(count)]}


def _one_request(calm: Calm, rng: random.Random, number: int) -> What:
    fates: tuple[Fate, ...] = ("refused", "reset", "cut", "lost")
    return {"fate": fates[number % 4], "at": rng.randint(1, calm.requests)}


def _many_requests(calm: Calm, rng: random.Random, number: int) -> What:
    at = rng.randint(1, calm.operations["edit"]["store"]) if number % 2 else 0
    refused, cut = (0.1, 0.0) if number // 2 % 2 else (0.0, 0.1)
    return {"refused": refused, "cut": cut, "at": at, "seed": rng.randrange(2**31)}


def _small(what: str, least: int, most: int) -> Callable[[Calm, random.Random, int], What]:
    return lambda calm, rng, number: {what: rng.randint(least, most)}


def _twice(calm: Calm, rng: random.Random, number: int) -> What:
    return {
        "at": [
            rng.randint(10, calm.operations["edit"]["store"]),
            rng.randint(10, calm.operations["edit"]["store"] // 2),
        ]
    }


FILES, S3, PLAIN = "files", "S3", "S3 without conditions"
KINDS: tuple[Kind, ...] = (
    Kind("killed at an operation: edit", FILES, struck, every("edit")),
    Kind("killed at an operation: retry-failed", FILES, struck, every("retry")),
    Kind("killed at an operation: repair", FILES, struck, every("repair")),
    Kind("killed twice", FILES, struck_twice, drawn(15, _twice)),
    Kind("disk full at an operation", FILES, struck, every("edit", "full", 5)),
    Kind("disk full once", FILES, struck, every("edit", "full once", 9)),
    Kind("disk full, a real one", FILES, full, drawn(20, _small("kib", 8, 400))),
    Kind("no inodes, a real one", FILES, full, drawn(20, _small("inodes", 3, 40))),
    Kind("signals", FILES, signalled, drawn(60, _signals)),
    Kind("four signals on one unit", FILES, signalled_on_one_unit, drawn(6, _on_one_unit)),
    Kind("zombie", FILES, zombie, drawn(75, _zombie)),
    Kind("drivers at once", FILES, at_once, drawn(24, _at_once)),
    Kind("clock wrong by hours", FILES, skewed, drawn(24, _skewed)),
    Kind("partitions killed", FILES + PARTED, partitions, drawn(20, _partitions)),
    Kind("partitions killed", PLAIN + PARTED, partitions, drawn(4, _partitions)),
    *(
        kind
        for store in (S3, PLAIN)
        for kind in (
            Kind("killed at an operation: edit", store, struck, every("edit")),
            Kind("killed at an operation: retry-failed", store, struck, every("retry", step=2)),
            Kind("killed at an operation: repair", store, struck, every("repair")),
            Kind("signals", store, signalled, drawn(9, _signals)),
            Kind("zombie", store, zombie, drawn(25, _zombie)),
            Kind("late put", store, late_put, drawn(20, _late)),
            Kind("drivers at once", store, at_once, drawn(8, _at_once)),
            Kind("clock wrong by hours", store, skewed, drawn(8, _skewed)),
            Kind("one request spoiled", store, one_request, drawn(24, _one_request)),
            Kind("many requests spoiled", store, many_requests, drawn(8, _many_requests)),
        )
    ),
)
