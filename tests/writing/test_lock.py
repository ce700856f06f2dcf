"""The driver's lock: one driver per folder, dead ones are no obstacle, and who has lost it stops."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lock import PARTITIONS, hold_many
from pipeline.common.partition import WHOLE, Partition
from pipeline.errors import HeldError, RunAborted, SinkError
from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing import lock as lock_module
from pipeline.writing.flags import Flag, flag_name, flags, generation
from pipeline.writing.lock import DriverLock
from pipeline.writing.processes import started_at, this_host

pytestmark = pytest.mark.timeout(400)  # moto is installed once
QUICK = {"beat_s": 0.2, "expiry_s": 1.5, "settle_s": 0.3}


@pytest.fixture(params=["local", "rclone", "moto"])
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> SinkConfig:
    """A run's folder on disk, on a store that ignores conditions, and on one that honours them."""
    if request.param == "local":
        return SinkConfig(folder=str(tmp_path / "out"))
    server = request.getfixturevalue("s3_server" if request.param == "rclone" else "moto_server")
    server.bucket("locks")
    return SinkConfig(folder=f"s3://locks/{secrets.token_hex(4)}", storage_options=server.storage_options)


@pytest.fixture
def here(tmp_path: Path) -> SinkConfig:
    return SinkConfig(folder=str(tmp_path / "out"))


@pytest.fixture
def many_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lock takes itself to be on a machine of its own."""
    monkeypatch.setattr(lock_module, "this_host", lambda: secrets.token_hex(8))


def driver(sink: SinkConfig, on_lost: Callable[[str], None] = lambda _: None, **settings: Any) -> DriverLock:
    return DriverLock(sink, on_lost, notify=lambda _: None, **{**QUICK, **settings})


def generations(sink: SinkConfig) -> list[int]:
    """Of the flags that are up."""
    return [generation(name) for name in flags(*open_fs(sink.folder, sink.storage_options))]


def states(sink: SinkConfig) -> list[str]:
    fs, root = open_fs(sink.folder, sink.storage_options)
    return [json.loads(fs.cat_file(f"{root}/_lock/{name}"))["state"] for name in flags(fs, root)]


def test_a_second_driver_is_refused_and_told_who_holds_and_what_to_do(sink: SinkConfig) -> None:
    with driver(sink):
        started = time.monotonic()
        with pytest.raises(SinkError, match=r"another driver \(process \d+ on this machine, owner [0-9a-f]{16}, last"):
            driver(sink).__enter__()
        assert time.monotonic() - started < 10
        assert (generations(sink), states(sink)) == ([1], ["holding"])
    assert (generations(sink), states(sink)) == ([1], ["released"])
    with driver(sink):
        assert (generations(sink), states(sink)) == ([2], ["holding"])


@pytest.mark.usefixtures("many_hosts")
def test_a_driver_elsewhere_is_known_by_its_heartbeat(sink: SinkConfig) -> None:
    with driver(sink), pytest.raises(SinkError, match=r"on another machine.*Wait until it ends"):
        driver(sink, expiry_s=20.0).__enter__()


@pytest.mark.usefixtures("many_hosts")
def test_of_drivers_that_start_together_one_gets_the_folder(sink: SinkConfig) -> None:
    outcomes: list[str] = []
    over = threading.Event()

    def start() -> None:
        try:
            with driver(sink, beat_s=0.3, expiry_s=20.0) as held:
                outcomes.append("held")
                over.wait(60)
                held.check()
        except SinkError:
            outcomes.append("refused")

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    while len(outcomes) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    over.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused", "refused"]


@pytest.mark.usefixtures("many_hosts")
def test_a_driver_elsewhere_whose_heart_stopped_is_taken_over_and_stops_once_it_wakes(sink: SinkConfig) -> None:
    reasons: list[str] = []
    paused = driver(sink, reasons.append, beat_s=4.0)
    with paused:
        with driver(sink):
            until = time.monotonic() + 30
            while not reasons and time.monotonic() < until:
                time.sleep(0.05)
        with pytest.raises(RunAborted, match="was taken over by another driver"):
            paused.check()
    assert reasons == [paused.lost]
    assert states(sink) == ["released"]
    assert not paused.claim.holds()


@pytest.fixture
def killed(here: SinkConfig) -> int:
    """The id of a process that took the lock and was killed."""
    code = (
        "import sys, time\nfrom pipeline.recipe import SinkConfig\nfrom pipeline.writing.lock import DriverLock\n"
        "with DriverLock(SinkConfig(folder=sys.argv[1]), print):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, here.folder], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return process.pid


def test_a_killed_driver_of_this_machine_is_taken_over_at_once(here: SinkConfig, killed: int) -> None:
    assert generations(here) == [1]
    started = time.monotonic()
    with DriverLock(here, pytest.fail):  # with the settings of a run
        assert generations(here) == [2]
    assert time.monotonic() - started < lock_module.BEAT_S
    assert states(here) == ["released"]


def test_a_process_id_that_was_given_out_again_is_no_holder(here: SinkConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with driver(here):
        mine = lock_module.started_at
        monkeypatch.setattr(lock_module, "started_at", lambda pid: f"{mine(pid)}0")
        with driver(here):
            assert generations(here) == [2]


def test_what_is_no_flag_of_a_driver_is_no_obstacle_and_stays(here: SinkConfig) -> None:
    (Path(here.folder) / "_lock").mkdir(parents=True)
    strange = Path(here.folder) / "_lock" / "notes.json"
    strange.write_bytes(b"{}")
    with driver(here):
        assert generations(here) == [1]
    assert strange.exists()


def test_an_error_releases_the_lock_and_a_folder_that_was_only_locked_holds_nothing_else(here: SinkConfig) -> None:
    with pytest.raises(ValueError, match="of the run"), driver(here):
        raise ValueError("of the run")
    assert [path.name for path in Path(here.folder).iterdir()] == ["_lock"]
    assert states(here) == ["released"]
    with driver(here):
        assert generations(here) == [2]


def test_a_driver_that_raised_its_flag_while_this_one_looked_is_seen(here: SinkConfig) -> None:
    """The other one is quicker between the first look and our own flag."""
    late, look = driver(here), lock_module.flags

    def slow_look(fs: Any, root: str) -> list[str]:
        seen = look(fs, root)
        if not quick:
            quick.append(driver(here))
            quick[0].__enter__()
        return seen

    quick: list[DriverLock] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock_module, "flags", slow_look)
        with pytest.raises(SinkError, match="another driver"):
            late.__enter__()
    quick[0].check()
    assert quick[0].claim.holds()
    quick[0].__exit__(None, None, None)
    assert states(here) == ["released"]


def test_a_generation_that_came_and_went_in_the_meantime_is_not_used_again(here: SinkConfig) -> None:
    late, look = driver(here), lock_module.flags
    passed: list[int] = []

    def slow_look(fs: Any, root: str) -> list[str]:
        seen = look(fs, root)
        if not passed:
            passed.append(0)
            with driver(here) as other:
                passed[0] = other.claim.generation
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock_module, "flags", slow_look)
        with late:
            assert late.claim.generation > passed[0] > 0
            assert late.claim.holds()


def test_of_many_processes_one_is_inside_at_a_time(here: SinkConfig) -> None:
    found = hold_many(Path(here.folder), processes=3, holds=60)
    assert found == {"holds": 60, "two_inside": 0, "errors": 0}


def test_drivers_of_disjoint_partitions_are_at_work_at_once_and_overlapping_ones_are_refused(sink: SinkConfig) -> None:
    with driver(sink, partition=Partition(0, 2)) as even, driver(sink, partition=Partition(3, 4)) as fourth:
        for overlapping in (WHOLE, Partition(0, 2), Partition(2, 4), Partition(1, 2), Partition(0, 3)):
            with pytest.raises(HeldError, match=r"partition (0/2|3/4) of .* is being written by another driver"):
                driver(sink, partition=overlapping).__enter__()
        with driver(sink, partition=Partition(1, 4)) as second:
            assert [lock.claim.holds() for lock in (even, fourth, second)] == [True] * 3
    with driver(sink) as whole:
        assert (generations(sink), states(sink)) == ([whole.claim.generation], ["holding"])  # it covers the others
    with driver(sink, partition=Partition(0, 2)) as even:
        assert even.claim.generation > whole.claim.generation


@pytest.mark.usefixtures("many_hosts")
def test_a_driver_that_was_taken_over_never_holds_again_though_other_partitions_go_on(here: SinkConfig) -> None:
    part, other = Partition(0, 2), Partition(1, 2)
    paused = driver(here, beat_s=30.0, partition=part)
    with paused:
        with driver(here, partition=part):
            pass
        for _ in range(2):
            with driver(here, partition=other):
                pass
        fs, root = open_fs(here.folder, here.storage_options)
        fs.pipe_file(f"{root}/_lock/{paused.claim.name}", b"{}")  # a heartbeat that was on its way
        assert not paused.claim.holds()
    with driver(here, partition=part) as last:
        assert last.claim.generation > paused.claim.generation + 1


def test_a_flag_that_is_only_tried_takes_nothing_from_a_holder_and_one_that_is_held_does(here: SinkConfig) -> None:
    fs, root = open_fs(here.folder, here.storage_options)
    with driver(here, partition=Partition(0, 2)) as held:
        name = flag_name(held.claim.generation + 1, WHOLE, "0" * 16)
        for state, holds in (("trying", True), ("holding", False)):
            flag = Flag(state=state, host="elsewhere", pid=1, started="")  # type: ignore[arg-type]
            fs.pipe_file(f"{root}/_lock/{name}", flag.to_bytes())
            assert held.claim.holds() is holds


@pytest.mark.usefixtures("many_hosts")
def test_a_listing_that_lags_less_than_drivers_settle_lets_one_in(s3_server: Any) -> None:
    s3_server.bucket("locks")
    sink = SinkConfig(folder=f"s3://locks/{secrets.token_hex(4)}", storage_options=s3_server.storage_options)
    listed, put = lock_module.flags, lock_module.put
    put_at, barrier, outcomes = dict[str, float](), threading.Barrier(2), list[str]()

    def noted(fs: Any, path: str, data: bytes, **options: Any) -> None:
        put(fs, path, data, **options)
        put_at.setdefault(path.rpartition("/")[2], time.monotonic())

    def lagging(*where: Any) -> list[str]:
        return [name for name in listed(*where) if name in put_at and time.monotonic() - put_at[name] > 0.4]

    def take_and_hold() -> None:
        barrier.wait()
        try:
            with driver(sink, settle_s=0.6, expiry_s=20.0):
                outcomes.append("held")
                time.sleep(5)
        except HeldError:
            outcomes.append("refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock_module, "flags", lagging)
        patch.setattr(lock_module, "put", noted)
        threads = [threading.Thread(target=take_and_hold) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(outcomes) == ["held", "refused"]


def test_of_many_processes_with_partitions_one_is_inside_each_at_a_time(here: SinkConfig) -> None:
    found = hold_many(Path(here.folder), processes=3, holds=60, partitions=PARTITIONS)
    assert found == {"holds": 60, "two_inside": 0, "errors": 0}


def test_partitions_share_a_listing_and_know_which_overlap_and_cover() -> None:
    listing = range(60)
    parts = [Partition(index, count) for count in range(1, 7) for index in range(count)]
    for part in parts:
        for other in parts:
            mine, theirs = set(part.of(listing)), set(other.of(listing))
            assert part.overlaps(other) == bool(mine & theirs)
            assert part.covers(other) == (theirs <= mine)


def test_a_process_is_told_from_dead_ones() -> None:
    import os

    process = subprocess.Popen([sys.executable, "-c", ""])
    assert started_at(process.pid) is not None or process.poll() is not None
    until = time.monotonic() + 30
    while started_at(process.pid) is not None and time.monotonic() < until:
        time.sleep(0.02)  # a zombie, until it is waited for, is dead as well
    assert started_at(process.pid) is None
    process.wait()
    assert started_at(os.getpid()) is not None
    assert this_host() == this_host()
