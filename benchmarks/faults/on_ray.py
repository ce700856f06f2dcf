"""Faults of a cluster: workers, raylets, nodes and drivers that are lost, some for good, and those that wake up again.

Each costs the start of two workers, so they are few. A unit waits for half a second in its worker, or a fault would
find all of them done.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.faults.driver import SHORT_S, Process
from benchmarks.faults.kinds import ELSEWHERE, Kind, Played, What, again, drawn
from benchmarks.faults.stage import LOCALLY, Calm, Stage

SECONDS_PER_UNIT = 0.5
BEGUN = (1, 5)  # units that are begun when a fault strikes, of eight


def witness(events: str) -> Callable[[], None]:
    """What every worker process does first: note each unit that is begun, and by whom, and wait a little."""

    def install() -> None:  # nested, so that it travels by value
        import json
        import os
        import time

        import pipeline.running.on_ray.executor

        edit = pipeline.running.on_ray.executor.EditWorker.__call__

        def noted(self: Any, batch: Any) -> Any:
            with open(events, "a") as file:
                file.write(json.dumps(os.getpid()) + "\n")
            time.sleep(SECONDS_PER_UNIT)
            return edit(self, batch)

        pipeline.running.on_ray.executor.EditWorker.__call__ = noted  # type: ignore[method-assign]

    return install


def connected(address: str, events: str, environment: dict[str, str]) -> None:
    """Join the cluster as a driver; the command then finds that it is on one."""
    import ray

    ray.init(
        address=address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"worker_process_setup_hook": witness(events), "env_vars": environment},
    )


class Job:
    """A driver on the cluster, and the workers that have begun a unit for it."""

    def __init__(self, stage: Stage, **what: Any) -> None:
        assert stage.cluster is not None
        stage.cluster.fill()
        self._events = stage.work / f"{stage.name}.events"
        self.driver: Process = stage.driver(ray=(stage.cluster.address, str(self._events)), **what)

    @property
    def begun(self) -> list[int]:
        """For every unit that was begun, the process."""
        return [json.loads(line) for line in self._events.read_text().splitlines()] if self._events.exists() else []

    def reaches(self, units: int, pause: float) -> bool:
        """Wait until so many are begun, and a little; false where it has ended."""
        while len(self.begun) < units and not self.driver.ended():
            time.sleep(0.02)
        time.sleep(pause)
        return not self.driver.ended()

    def workers(self) -> list[int]:
        """Those that live, the one with the newest unit first."""
        return [pid for pid in dict.fromkeys(reversed(self.begun)) if Path(f"/proc/{pid}").exists()]


def lost(stage: Stage, what: What) -> Played:
    """A worker, a raylet, a node or the driver is lost; of nodes, another one comes or does not."""
    assert stage.cluster is not None
    job, played = Job(stage), Played()
    if job.reaches(what["begun"], what["pause"]):
        played.faults = 1
        match what["loses"]:
            case "worker":
                os.kill(job.workers()[0], signal.SIGKILL)
            case "driver":
                job.driver.signal(signal.SIGKILL)
            case name if name.startswith("SIG"):
                job.driver.signal(signal.Signals[name])
            case name:
                stage.cluster.lose(whole=name == "node")
                if not what["for_good"]:
                    time.sleep(1.0)
                    stage.cluster.fill()
    hit_itself = what["loses"] == "driver"
    played.hit(job.driver, orderly=not hit_itself)
    if not hit_itself and not what["loses"].startswith("SIG") and job.driver.code != 0:
        played.complaints.append(f"the run did not go on without what it lost: {job.driver.code}")
    return again(stage, played, "edit", overrides=LOCALLY)


def sleeping(stage: Stage, what: What) -> Played:
    """A driver stops, with its workers or without; another one takes over and ends the work; then all wake up."""
    assert stage.calm is not None
    job, played = Job(stage, lease_s=SHORT_S), Played()
    stops = job.reaches(what["begun"], what["pause"])
    workers = job.workers() if what["workers"] else []
    if stops:
        job.driver.signal(signal.SIGSTOP)
        _all(workers, signal.SIGSTOP)
    played.ends_well(stage.run(host=ELSEWHERE[0], lease_s=SHORT_S, overrides=LOCALLY), "the driver that took over")
    if stops:
        before = stage.look()
        played.faults = 1
        job.driver.signal(signal.SIGCONT)
        _all(workers, signal.SIGCONT)
        played.hit(job.driver, orderly=True)
        time.sleep(1.0)  # for workers that outlive it for a moment
        played.verdicts.append(stage.judge(before, by_rows=True, noise=True))
    return again(stage, played, "edit", overrides=LOCALLY)


def _all(pids: list[int], which: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, which)


def _moment(rng: random.Random) -> What:
    return {"begun": rng.randint(*BEGUN), "pause": round(rng.uniform(0.0, SECONDS_PER_UNIT), 2)}


def _lost(*losses: tuple[str, bool]) -> Callable[[Calm, random.Random, int], What]:
    def draw(calm: Calm, rng: random.Random, number: int) -> What:
        loses, for_good = losses[number % len(losses)]
        return {"loses": loses, "for_good": for_good, **_moment(rng)}

    return draw


def _sleeping(calm: Calm, rng: random.Random, number: int) -> What:
    return {"workers": number % 2 == 0, **_moment(rng)}


FILES, S3, PLAIN = "Ray, files", "Ray, S3", "Ray, S3 without conditions"
RAY_KINDS: tuple[Kind, ...] = (
    Kind("worker lost", FILES, lost, drawn(6, _lost(("worker", True)))),
    Kind("raylet lost, another comes", FILES, lost, drawn(3, _lost(("raylet", False)))),
    Kind("node lost for good", FILES, lost, drawn(6, _lost(("node", True), ("raylet", True)))),
    Kind("driver lost or stopped", FILES, lost, drawn(4, _lost(*((name, True) for name in ("driver", "SIGTERM"))))),
    Kind("zombie", FILES, sleeping, drawn(6, _sleeping)),
    *(
        kind
        for store in (S3, PLAIN)
        for kind in (
            Kind("worker lost", store, lost, drawn(2, _lost(("worker", True)))),
            Kind("node lost for good", store, lost, drawn(1, _lost(("node", True)))),
            Kind("zombie", store, sleeping, drawn(3, _sleeping)),
        )
    ),
)
