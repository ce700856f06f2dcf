"""What is shown of a run at work: in 80 columns, with the time left, moving with results, counting what is so."""

from __future__ import annotations

import io
import random
import re
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.recipe import RunConfig, recipe_from
from pipeline.running import driver, progress, worker
from pipeline.running.on_ray.executor import EditWorker
from pipeline.running.progress import Watch, clock
from pipeline.running.tally import Extent, InFlight, Seen, Tally
from pipeline.running.todo import find_todo
from pipeline.writing.commit import committed_units
from pipeline.writing.manifest import Manifest
from tests.runs import png, recipe_data, write_shards

HUGE = Seen(
    units=10**6, images=123_456_789, failed=12_345_678, images_left=987_654_321.0, shards=123_456, of_shards=1_234_567
)


def wait_for(reads: list[Seen], count: int) -> None:
    """Until the thread that shows has asked so often."""
    while len(reads) < count:
        time.sleep(0.01)


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_the_line_fits_whatever_the_numbers_and_keeps_images_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, now = Watch(lambda: HUGE, display="off"), Clock(monkeypatch)
    for width in (79, 68, 40):
        now.now += 1000.0
        line = watch.line(HUGE, width)
        assert len(line) <= width
        assert line.startswith("123,456,789 of ")
    assert watch.line(HUGE, 79).endswith(" left")
    small = Seen(images=3, images_left=9.0, failed=1, shards=0, of_shards=2, estimated=False)
    assert re.fullmatch(r"3 of 12 images, 0 of 2 shards, 1 failed, \S+/s, \S+ left", watch.line(small))


def test_the_time_left_is_that_of_the_images_left_at_the_rate_since_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock(monkeypatch)
    watch = Watch(Seen, display="off")
    now.now += 600.0  # a model is loaded, which says nothing of images
    assert watch.line(Seen(of_shards=1, images_left=None)).endswith(
        "10:00 so far"
    )  # no more is known than the time so far
    watch.line(Seen(images=1, images_left=101.0, of_shards=1))
    now.now += 20.0
    assert watch.line(Seen(images=11, images_left=91.0, of_shards=1)).endswith("0.5/s, 3:02 left")
    assert [clock(second) for second in (5, 65, 3605, 90_000)] == ["0:05", "1:05", "1:00:05", "1 d 1 h"]


def test_a_bar_on_a_terminal_of_80_columns_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LOOKS", 0.01)
    file = io.StringIO()
    seen = [Seen(of_shards=9), Seen(images=1, images_left=100.0, of_shards=9), HUGE]
    reads: list[Seen] = []

    def read() -> Seen:
        reads.append(seen[min(len(reads) // 5, 2)])
        return reads[-1]

    with Watch(
        read,
        display="auto",
        console=Console(file=file, width=80, force_terminal=True, color_system=None, legacy_windows=False),
    ):
        wait_for(reads, 40)
    shown = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "\n", file.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, shown)) <= 80
    assert any("123,456,789" in line and line.endswith("left") for line in map(str.rstrip, shown))


def test_where_there_is_no_terminal_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    file, reads = io.StringIO(), list[Seen]()

    def read() -> Seen:
        reads.append(HUGE)
        return HUGE

    with Watch(read, display="auto", console=Console(file=file, width=20)):
        wait_for(reads, 5)
    lines = file.getvalue().splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 79


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """What a run's tally says after every report and every commit."""
    noted: list[Seen] = []
    for name in ("advance", "add"):
        real = getattr(Tally, name)

        def noting(self: Tally, what: Any, real: Any = real) -> Any:
            answer = real(self, what)
            noted.append(self.seen())
            return answer

        monkeypatch.setattr(Tally, name, noting)
    return noted


def test_progress_moves_with_every_image_and_the_time_left_is_known_before_the_first_commit(
    watched: list[Seen], tmp_path: Path
) -> None:
    source = write_shards(tmp_path / "in", shards=2, rows=6, damaged=(1,))
    driver.run(recipe_from(recipe_data(source, tmp_path / "out", engine="local", unit_size=6)), progress="off")
    before_any = [seen for seen in watched if seen.units == 0]
    assert {seen.images for seen in before_any} >= set(range(1, 7))  # those of the next unit, which is at work, too
    for seen in before_any:  # a tar tells its rows in the end alone
        assert seen.images_left is not None
        assert seen.estimated
        assert seen.images + seen.images_left == pytest.approx(12, rel=0.25)
    assert max(seen.failed for seen in before_any) == 2
    last = watched[-1]
    assert (last.images, last.images_left, last.failed, last.shards, last.of_shards) == (12, 0.0, 2, 2, 2)
    assert [seen.images for seen in watched] == sorted(seen.images for seen in watched)


def test_rows_that_the_source_tells_are_counted_and_a_rerun_counts_those_before(
    watched: list[Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for shard in range(2):
        images = [{"image": png(10 * shard + row)} for row in range(5)]
        pq.write_table(pa.Table.from_pylist(images), tmp_path / "in" / f"{shard}.parquet", row_group_size=2)
    recipe = recipe_from(recipe_data(tmp_path / "in", tmp_path / "out", engine="local", unit_size=2))
    driver.run(recipe, progress="off")
    assert [(seen.images + (seen.images_left or 0), seen.estimated) for seen in watched] == [(10, False)] * len(watched)
    next((tmp_path / "out" / "_units").glob("0-*/00001-*.json")).unlink()
    watched.clear()
    monkeypatch.setattr("pipeline.writing.folding.FOLD_FROM", 10**6)
    driver.run(recipe, progress="off")
    assert (watched[0].images_before, watched[0].images, watched[0].images_left) == (8, 1, 1)
    assert (watched[0].shards, watched[-1].shards, watched[-1].images_left) == (1, 2, 0)


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> tuple[Extent, list[Manifest]]:
    """The extent of a run over three shards of three units, and its manifests."""
    root = tmp_path_factory.mktemp("units")
    source = write_shards(root / "in", shards=3, rows=5)
    recipe = recipe_from(recipe_data(source, root / "out", engine="local"))
    extent = find_todo(recipe).extent
    driver.run(recipe, progress="off")
    return extent, list(committed_units(recipe.sink))


def tally_of(extent: Extent) -> Tally:
    tally = Tally(RunConfig(max_failed_fraction=1, max_consecutive_failed_units=99))
    tally.begin(Extent(rows=extent.rows, bytes=extent.bytes, shards=extent.shards))
    return tally


def test_a_shard_is_done_when_all_of_its_units_are_committed_in_whatever_order(
    units: tuple[Extent, list[Manifest]],
) -> None:
    extent, manifests = units
    for seed in range(5):
        shuffled = random.Random(seed).sample(manifests, len(manifests))
        tally, left = tally_of(extent), Counter(manifest.shard for manifest in manifests)
        for manifest in shuffled:
            tally.add(manifest)
            left[manifest.shard] -= 1
            assert tally.seen().shards == sum(count == 0 for count in left.values())
        assert (tally.seen().shards, tally.seen().images_left) == (3, 0)


def test_a_unit_counts_once_though_its_worker_died_its_report_came_late_and_it_was_written_twice(
    units: tuple[Extent, list[Manifest]],
) -> None:
    extent, (first, *_) = units
    tally = tally_of(extent)
    for images in (1, 2, 1):  # the worker dies after two, another one begins again
        tally.advance(InFlight(unit=first.unit, images=images))
        assert tally.seen().images == images
    tally.add(first)
    tally.add(first)
    tally.advance(InFlight(unit=first.unit, images=2))
    assert (tally.seen().units, tally.seen().images) == (1, first.counts.images)


def test_time_and_rows_of_units_that_overlap_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stats, now = SimpleNamespace(network_rows=0, busy_seconds=0.0), SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    meter = worker._Meter(SimpleNamespace(stats=stats))

    def work(seconds: float, rows: int) -> None:
        now.seconds += seconds
        stats.network_rows += rows
        stats.busy_seconds += seconds / 2

    with meter.measuring() as first:
        work(1, 10)
        with meter.measuring() as second:
            work(2, 6)
        work(1, 3)
    took = [measured(2) for measured in (first, second)]
    assert [(one.worker_seconds, one.network_rows, one.busy_seconds) for one in took] == [(1, 3, 0.5), (3, 16, 1.5)]
    assert {one.workers for one in took} == {2}


def test_a_worker_on_ray_reports_now_and_then_and_waits_for_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[InFlight] = []

    class Handle:
        class advance:  # noqa: N801  as an actor's method
            remote = told.append

    worker = EditWorker.__new__(EditWorker)
    worker._tally, worker._told = Handle, 0.0
    worker._worker = SimpleNamespace(engine=SimpleNamespace(stats=SimpleNamespace(busy_seconds=1.5)))
    busy: list[float] = []
    worker._meter = SimpleNamespace(tell=busy.append)
    now = Clock(monkeypatch)
    for images in range(10):
        worker._tell(InFlight(unit="u", images=images))
        now.now += 0.2
    assert [report.images for report in told] == [0, 3, 6, 9]
    assert busy == [1.5] * 4
