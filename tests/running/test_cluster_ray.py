"""The same run on Ray Data: equal bytes, early commits, lost workers, too few GPUs. On local files and on S3 where the
output matters.

One local cluster of two logical CPUs for the module.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from pipeline.common.stopping import Stopped
from pipeline.errors import ClusterError, EncodeError, ModelError, RunAborted
from pipeline.recipe import Recipe, recipe_from
from pipeline.running import driver
from pipeline.running.on_ray.executor import UNITS_AT_ONCE, RayExecutor
from pipeline.writing.attempts import ALONE_FROM
from pipeline.writing.summary import Summary
from tests.clusters import free_port
from tests.places import Place, slow_on_s3
from tests.runs import asked, contents, recipe_data, results, write_shards

pytestmark = pytest.mark.timeout(400)
SHARDS, ROWS = 4, 5  # of `four_shards`


def witness(notes: Path) -> Callable[[], None]:
    """What every process of the cluster does first: note who does what when, wait and die where told to."""
    last_shard = f"s{SHARDS - 1}.tar"

    def install() -> None:  # nested, so that it travels by value: workers cannot import this module
        import pipeline.errors
        import pipeline.running.on_ray.executor
        import pipeline.running.worker

        read, edit = pipeline.running.on_ray.executor.read_units, pipeline.running.on_ray.executor.EditWorker.__call__

        def note(event: str, unit: str) -> None:
            with open(notes / "events", "a") as file:
                file.write(json.dumps([event, unit, time.time(), os.getpid()]) + "\n")

        def patient_read(*args: Any) -> Iterator[Any]:
            for unit_input in read(*args):
                hold = notes / "hold"
                if hold.exists() and unit_input.unit.shard == last_shard:
                    until = time.time() + 90
                    while not list(Path(hold.read_text()).glob("_units/*/*.json")) and time.time() < until:
                        time.sleep(0.05)
                note("read", unit_input.unit.id)
                yield unit_input

        def noted_edit(self: Any, batch: Any) -> Any:
            unit = json.loads(batch["unit"][0].as_py())["unit"]["id"]
            note("begin", unit)
            kill = notes / "kill"
            if kill.exists():
                kill.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            preempted = notes / "preempted"
            if preempted.exists() and preempted.read_text().count("once") <= 2 * ALONE_FROM:
                from pipeline.running import worker

                def preempt(*_: Any, **__: Any) -> Any:  # as a node that goes: told, and then killed
                    with open(preempted, "a") as file:
                        file.write("once ")
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(2)
                    os.kill(os.getpid(), signal.SIGKILL)

                worker.edit_unit = preempt
            poison = notes / "poison"
            if poison.exists():
                from pipeline import flow

                prepare, key = flow.prepare_row, poison.read_text()

                def deadly(row: Any, *rest: Any) -> Any:
                    if row.sample.key == key and not row.refusal:
                        note("died", unit)
                        os._exit(1)
                    return prepare(row, *rest)

                flow.prepare_row = deadly
            broken = notes / "broken"
            if broken.exists() and not broken.read_text():
                import torch

                broken.write_text(str(os.getpid()))
                network, calls = self._worker.backbone.denoise, itertools.count(1)

                def fail(call: Any) -> Any:
                    if next(calls) >= 20:  # and from then on, as a device does
                        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
                    return network(call)

                self._worker.backbone.denoise = fail
            time.sleep(0.2)
            finished = edit(self, batch)
            note("end", unit)
            return finished

        make = pipeline.running.worker.Worker.__init__

        def bad_load(self: Any, *given: Any, **named: Any) -> None:
            bad = notes / "bad"
            if bad.exists():
                if bad.read_text() == "a death":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise pipeline.errors.ModelError("weights are cut off")
            make(self, *given, **named)

        pipeline.running.worker.Worker.__init__ = bad_load  # type: ignore[method-assign]
        pipeline.running.on_ray.executor.read_units = patient_read
        pipeline.running.on_ray.executor.EditWorker.__call__ = noted_edit

    return install


@dataclass(frozen=True)
class Event:
    kind: str
    unit: str
    time: float
    pid: int


def events(notes: Path) -> list[Event]:
    if not (notes / "events").exists():
        return []
    return [Event(*json.loads(line)) for line in (notes / "events").read_text().splitlines()]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def two_cpus(notes: Path, metrics_port: int) -> Iterator[Path]:
    """A local cluster; the value is the folder of its logs."""
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": witness(notes)},
        _metrics_export_port=metrics_port,
        _system_config={"metrics_report_interval_ms": 200},
    )
    yield Path(ray._private.worker.global_worker.node.get_session_dir_path())
    ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(place: Place, four_shards: Path) -> dict[str, Any]:
    """What the plain loop writes in the place, from the same shards."""
    shutil.copytree(four_shards, place.root / "in")
    recipe = place.recipe("in", "undisturbed")
    driver.run(recipe, progress="off")
    return contents(place.folder(recipe))


@dataclass(frozen=True)
class Run:
    summary: Summary
    out: Path
    events: list[Event]


@pytest.fixture(scope="module")
def on_ray(two_cpus: Path, place: Place, undisturbed: dict[str, Any], notes: Path) -> Run:
    """One undisturbed run, whose last shard is read once the first unit is committed, or much later."""
    recipe = recipe_from(place.recipe_data("in", "ray", engine="ray"))
    earlier = len(events(notes))
    (notes / "hold").write_text(str(place.folder(recipe)))
    summary = driver.run(recipe, progress="off")
    (notes / "hold").unlink()
    return Run(summary, place.folder(recipe), events(notes)[earlier:])


@slow_on_s3
def test_ray_writes_the_bytes_of_the_plain_loop(on_ray: Run, undisturbed: dict[str, Any]) -> None:
    assert contents(on_ray.out) == undisturbed
    assert results(on_ray.out) == asked(shards=SHARDS, rows=ROWS)
    assert (on_ray.summary.complete, on_ray.summary.failed, on_ray.summary.exit_code) == (True, 2, 0)
    assert on_ray.summary.units_now == on_ray.summary.units == 12


@slow_on_s3
def test_the_first_unit_is_committed_before_the_last_one_is_read(on_ray: Run) -> None:
    first_commit = min(path.stat().st_mtime for path in (on_ray.out / "_units").glob("*/*.json"))
    reads = sorted(event.time for event in on_ray.events if event.kind == "read")
    assert len(reads) == 12
    assert first_commit < reads[-1]


@slow_on_s3
def test_two_workers_a_shuffled_plan_and_the_death_of_one_change_no_byte_and_show_no_secret(
    two_cpus: Path,
    place: Place,
    undisturbed: dict[str, Any],
    notes: Path,
    s3_server: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = driver.find_todo

    def shuffled(recipe: Recipe, **options: Any) -> Any:
        todo = plan(recipe, **options)
        before = list(todo.tasks)
        random.Random(1).shuffle(todo.tasks)
        assert todo.tasks != before
        return todo

    monkeypatch.setattr(driver, "find_todo", shuffled)
    recipe = recipe_from(place.recipe_data("in", "two", engine="ray", workers=2))
    (notes / "kill").touch()
    summary = driver.run(recipe, progress="off")
    assert not (notes / "kill").exists(), "no worker died"
    assert (summary.complete, summary.units, summary.exit_code) == (True, 12, 0)
    out = place.folder(recipe)
    assert contents(out) == undisturbed
    assert results(out) == asked(shards=SHARDS, rows=ROWS)
    for folder in (out, two_cpus):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 10
        assert [path.name for path in files if s3_server.secret.encode() in path.read_bytes()] == []


@slow_on_s3
def test_two_units_are_in_flight_on_one_worker(on_ray: Run) -> None:
    inside: set[str] = set()
    most = 0
    for event in sorted(on_ray.events, key=lambda event: event.time):
        if event.kind == "begin":
            inside.add(event.unit)
        elif event.kind == "end":
            inside.remove(event.unit)
        most = max(most, len(inside))
    assert most == UNITS_AT_ONCE
    assert len({event.pid for event in on_ray.events if event.kind == "begin"}) == 1


@pytest.mark.slow  # two runs with their workers; without Ray, tests/running/test_retry.py
@pytest.mark.usefixtures("two_cpus")
def test_a_spent_error_budget_ends_a_run_on_ray_and_a_retry_there_goes_on_from_it(
    four_shards: Path,
    four_edited: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def recipe(**run: Any) -> Recipe:
        return recipe_from(recipe_data(four_shards, tmp_path / "out", **run))

    def hindered(_: Any) -> Any:
        raise EncodeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.writing.restoring.restored", hindered)  # in this process alone: Ray's are well
        with pytest.raises(RunAborted, match="1 units in a row"):
            driver.run(recipe(engine="local", max_consecutive_failed_units=1), progress="off")
    kept: list[logging.LogRecord] = []
    log_file = logging.Handler()
    log_file.emit = kept.append  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("ray.data"), "handlers", [log_file, caplog.handler])
    with pytest.raises(RunAborted, match=r"more than run\.max_failed_fraction 0"):
        # im03 cannot be decoded. Judged with every unit.
        driver.run(recipe(engine="ray", max_consecutive_failed_units=1, max_failed_fraction=0), progress="off")
    assert [record for record in kept if record.exc_info], "Ray keeps its own account of the error in its log"
    assert not [record for record in caplog.records if record.name.startswith("ray.data")]  # off the terminal
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (written["complete"], written["exit_code"]) == (False, 1)
    summary = driver.run(recipe(engine="ray"), progress="off", retry_failed=True)
    assert (summary.complete, summary.failed, summary.exit_code) == (True, 2, 0)
    assert results(tmp_path / "out") == asked(shards=SHARDS, rows=ROWS)
    data = {name: content for name, content in contents(tmp_path / "out").items() if name.startswith("data/")}
    assert set(data.values()) == {content for name, content in four_edited.items() if name.startswith("data/")}


def rows_of_data(written: dict[str, Any]) -> list[dict[str, Any]]:
    files = [data for name, data in sorted(written.items()) if name.startswith("data/")]
    return [row for data in files for row in pq.read_table(pa.BufferReader(data)).to_pylist()]


def test_a_row_that_kills_its_worker_is_quarantined_in_one_run_and_its_neighbours_are_kept(
    two_cpus: Path, four_shards: Path, notes: Path, four_edited: dict[str, Any], tmp_path: Path
) -> None:
    (notes / "poison").write_text("im07")  # in a unit with im06
    recipe = recipe_from(recipe_data(four_shards, tmp_path, engine="ray"))
    try:
        summary = driver.run(recipe, progress="off")
    finally:
        (notes / "poison").unlink()
    assert (summary.complete, summary.done, summary.failed) == (True, 2 * SHARDS * ROWS - 4, 4)  # im03 is no image
    assert summary.failed_by_class == {"DecodeError": 2, "ProcessKilled": 2}
    assert results(tmp_path) == asked(shards=SHARDS, rows=ROWS)
    assert len([event for event in events(notes) if event.kind == "died"]) == ALONE_FROM
    before = rows_of_data(four_edited)
    assert rows_of_data(contents(tmp_path)) == [row for row in before if row["key"] != "im07"]
    assert not list((tmp_path / "_attempts").iterdir())


def test_a_worker_whose_device_fails_is_replaced_and_no_row_is_blamed(
    two_cpus: Path, four_shards: Path, notes: Path, four_edited: dict[str, Any], tmp_path: Path
) -> None:
    earlier = len(events(notes))
    (notes / "broken").touch()
    recipe = recipe_from(recipe_data(four_shards, tmp_path, engine="ray"))
    try:
        summary = driver.run(recipe, progress="off")
        broken = int((notes / "broken").read_text())
    finally:
        (notes / "broken").unlink()
    assert (summary.complete, summary.failed_by_class) == (True, {"DecodeError": 2})  # im03 is no image
    assert contents(tmp_path) == four_edited
    begun = [event for event in events(notes)[earlier:] if event.kind == "begin"]
    assert {event.pid for event in begun} > {broken}
    assert begun[-1].pid != broken
    assert not list(tmp_path.glob("_attempts/*"))


@pytest.mark.slow  # each of four workers has to start
@pytest.mark.usefixtures("two_cpus")
def test_workers_that_go_with_their_nodes_blame_no_row(four_shards: Path, notes: Path, tmp_path: Path) -> None:
    recipe = recipe_from(recipe_data(four_shards / "s1.tar", tmp_path, engine="ray"))
    (notes / "preempted").touch()
    try:
        summary = driver.run(recipe, progress="off")
        assert (notes / "preempted").read_text().count("once") > 2 * ALONE_FROM
    finally:
        (notes / "preempted").unlink()
    assert (summary.complete, summary.failed) == (True, 0)
    assert not list(tmp_path.glob("_attempts/*"))


@pytest.mark.slow  # a run for each stop; without Ray, tests/common/test_stopping.py
@pytest.mark.usefixtures("two_cpus")
def test_a_unit_that_is_stopped_ever_again_on_ray_is_whole_in_the_end_and_no_row_is_blamed(
    four_shards: Path, tmp_path: Path
) -> None:
    recipe = recipe_from(recipe_data(four_shards / "s0.tar", tmp_path, engine="ray"))

    def noted_since(begun: float) -> bool:
        """Whether a unit is at work: notes of earlier runs may still stand there."""
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_mtime > begun for path in tmp_path.glob("_attempts/*.json"))
        return False

    def stop_at_work(begun: float) -> None:
        until = time.monotonic() + 60
        while not noted_since(begun) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    for _ in range(ALONE_FROM + 1):
        stopper = threading.Thread(target=stop_at_work, args=(time.time(),))
        stopper.start()
        with pytest.raises(Stopped):
            driver.run(recipe, progress="off")
        stopper.join()
    assert list(tmp_path.glob("_attempts/*.json")), "no unit was at work"
    summary = driver.run(recipe, progress="off")
    assert (summary.complete, summary.failed_by_class) == (True, {"DecodeError": 2})
    assert results(tmp_path) == asked(shards=1, rows=ROWS)
    assert not list(tmp_path.glob("_attempts/*"))


@pytest.mark.parametrize("how", ["an error", pytest.param("a death", marks=pytest.mark.slow)])
def test_a_worker_that_cannot_load_its_model_ends_the_run_by_name_and_blames_no_row(
    two_cpus: Path, four_shards: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The model is there for the driver: a bad disk of a node, say."""
    monkeypatch.setattr("pipeline.running.on_ray.executor.RESTARTS", 1)
    (notes / "bad").write_text(how)
    recipe = recipe_from(recipe_data(four_shards, tmp_path, engine="ray"))
    named = {
        "an error": (ModelError, "a worker cannot load its model: ModelError: weights are cut off .on the node "),
        "a death": (ClusterError, "the job failed on Ray .ActorDiedError"),
    }
    try:
        with pytest.raises(named[how][0], match=named[how][1]):
            driver.run(recipe, progress="off")
    finally:
        (notes / "bad").unlink()
    assert not list(tmp_path.glob("quarantine/*"))
    assert not list(tmp_path.glob("_units/*/*"))
    summary = driver.run(recipe, progress="off")
    assert (summary.complete, summary.failed_by_class) == (True, {"DecodeError": 2})


@pytest.mark.slow  # waits for Ray's own intervals
def test_rays_metrics_tell_an_operator_what_is_committed_and_how_busy_workers_are_and_no_address(
    two_cpus: Path, metrics_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, list[Sample]] = {}

    def scrape() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            for sample in (sample for family in families for sample in family.samples):
                if sample.name.startswith("ray_shardedit_") and sample.labels["run"] == "measured":
                    found.setdefault(sample.name, []).append(sample)

    def watch() -> None:  # a worker's numbers go with it
        while not over.wait(0.2):
            with contextlib.suppress(OSError):
                scrape()

    def total(name: str, **labels: str) -> float:
        samples = [one for one in found.get(f"ray_shardedit_{name}", []) if labels.items() <= one.labels.items()]
        return max((sample.value for sample in samples), default=0.0)

    close, over = RayExecutor.close, threading.Event()

    def look_and_close(place: RayExecutor) -> None:
        until = time.monotonic() + 60
        while (total("units_total"), total("failures_total")) != (9, 2) and time.monotonic() < until:
            time.sleep(0.1)
        over.set()
        close(place)

    monkeypatch.setattr(RayExecutor, "close", look_and_close)
    recipe = recipe_data(write_shards(tmp_path / "in", shards=3, rows=5), tmp_path / "measured", engine="ray")
    threading.Thread(target=watch).start()
    try:
        summary = driver.run(recipe_from(recipe), progress="off")
    finally:
        over.set()
    assert total("units_total") == summary.units == 9
    assert total("images_total") == summary.images
    assert total("results_total") == summary.done
    assert total("failures_total", stage="decode") == summary.failed == 2
    assert total("network_rows_total") == summary.network_rows
    assert total("output_bytes_total") > 0
    assert total("unit_seconds_count") == 9
    assert "ray_shardedit_images_left" in found
    assert total("workers") == 1
    assert 0 < total("busy_seconds_total") < 60
    assert not [one for samples in found.values() for one in samples if str(tmp_path) in str(one.labels)]


def test_a_gpu_that_is_not_there_is_refused_at_once_and_nothing_is_written(
    two_cpus: Path, four_shards: Path, tmp_path: Path
) -> None:
    recipe = recipe_from(recipe_data(four_shards, tmp_path / "out", engine="ray", workers=3, gpus_per_worker=1))
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"3 x run\.gpus_per_worker 1 asks for 3 GPU\(s\); there are 0"):
        driver.run(recipe, progress="off")
    assert time.monotonic() - started < 10
    assert not (tmp_path / "out").exists()
