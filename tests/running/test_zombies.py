"""A driver that is stopped, taken over and wakes up: the results stay as the other one left them.

No model is at work here. Units come out as they were made beforehand, so that a driver can be stopped before every
single operation on the run's folder, and another one can do a whole run in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import RunAborted, SinkError
from pipeline.looking.verify import verify
from pipeline.reading.storage import open_fs
from pipeline.reading.units import read_units
from pipeline.recipe import Recipe, SinkConfig
from pipeline.records import Concept, Edited, EditRequest, Rejected
from pipeline.running import driver
from pipeline.running.pool import WorkerSettings
from pipeline.running.tally import Seen, Tally
from pipeline.running.todo import Todo
from pipeline.samples import Sample, UnitInput
from pipeline.seeds import seed_for
from pipeline.writing import commit, files, folding, indexing
from pipeline.writing.attempts import Attempt
from pipeline.writing.commit import FinishedUnit, committed_units
from pipeline.writing.finish import finish_unit
from pipeline.writing.flags import FOLDER, flags
from pipeline.writing.lock import Claim, DriverLock
from pipeline.writing.merged import Contents, Merged
from pipeline.writing.merging import Job, merge_here
from pipeline.writing.rows import OutputRow, encode_outcome, encode_png
from pipeline.writing.run_record import read_run_record
from pipeline.writing.spans import table_of
from tests.places import SETTLE_QUICKLY, Place, local_place, s3_place
from tests.runs import EDITS, asked, results, write_shards
from tests.writing.making import MEASURED, MODEL

pytestmark = pytest.mark.timeout(600)

SHARDS, ROWS = 1, 4  # in units of two
SIZES = {"merged": 30_000, "unmerged": 0}  # bytes of a file: one unit each
WRITES = ("put", "remove")

_encoded: dict[tuple[str, str, bool, str], OutputRow | Rejected] = {}


def outcome(sample: Sample, edit: str, failing: bool, recipe: Recipe) -> OutputRow | Rejected:
    """Of one row: always the same."""
    key = (sample.id, edit, failing, recipe.hash)
    if key not in _encoded:
        if failing:
            return Rejected(
                sample=sample,
                edit=edit,
                method="ledits_pp",
                stage="edit",
                error_class="EncodeError",
                message="no memory",
            )
        pixels = np.random.default_rng([sample.index, EDITS.index(edit)]).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        edited = Edited(
            sample=replace(sample, image=encode_png(255 - pixels)),
            edit=edit,
            method="ledits_pp",
            request=EditRequest(concepts=(Concept(prompt=f"concept {edit}"),)),
            image=pixels,
            original=255 - pixels,
            masks=(),
            mask=None,
            seed=seed_for(recipe.run.seed, sample.id, recipe.inversion.method),
            figures={"reconstruction_psnr": 31.5, "background_psnr": None, "mask_share": None},
        )
        _encoded[key] = encode_outcome(edited, recipe, MODEL, 4)
    return _encoded[key]


class Prepared:
    """A `Place` without a model, in which the images of some keys fail."""

    model = MODEL
    settings = WorkerSettings(call_size=4, threads=1)

    def __init__(self, recipe: Recipe, failing: Iterable[str]) -> None:
        self._recipe, self._failing, self._tally = recipe, set(failing), Tally(recipe.run)

    def open(self, before: Any, tell: Any) -> str:
        return ""

    def edit(self, todo: Todo, claim: Claim) -> None:
        recipe = self._recipe
        self._tally.begin(todo.extent)
        for task in todo.tasks:
            for unit_input in read_units(task, recipe.source, recipe.run.unit_size, todo.committed.has):
                with Attempt(unit_input.unit.id, recipe.sink, claim.generation):
                    finished = self._finished(unit_input, claim.generation)
                self._tally.add(commit.commit(finished, recipe.sink, claim.check))

    def _finished(self, unit_input: UnitInput, generation: int) -> FinishedUnit:
        rows = [row for row in unit_input.rows if isinstance(row, Sample)]
        done = [outcome(row, edit, row.key in self._failing, self._recipe) for row in rows for edit in EDITS]
        finished = finish_unit(
            unit_input, done, self._recipe, generation=generation, model_digest=MODEL.digest, call_size=4
        )
        return finished.with_measured(MEASURED)

    def merge(self, sink: SinkConfig, jobs: Iterable[Job]) -> Iterator[Contents]:
        return merge_here(sink, jobs)

    def seen(self) -> Seen:
        return self._tally.seen()

    def stop(self, reason: str) -> None:
        self._tally.stop(reason)

    def close(self) -> None:
        pass


def drive(recipe: Recipe, *, failing: Iterable[str] = (), retry: bool = False) -> None:
    """A whole run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_executor_of", lambda recipe: Prepared(recipe, failing))
        patch.setattr("pipeline.looking.report.page.write_report", lambda sink: None)
        patch.setitem(DriverLock.__init__.__kwdefaults__, "beat_s", 3600.0)  # a stopped driver's heart does not beat
        driver.run(recipe, progress="off", retry_failed=retry)


def give_up_for_dead(sink: SinkConfig) -> None:
    """What a driver elsewhere does once it has not seen this one for long enough: it may take the folder over."""
    fs, root = open_fs(sink.folder, sink.storage_options)
    for name in flags(fs, root):
        path = f"{root}/{FOLDER}/{name}"
        flag = json.loads(fs.cat_file(path))
        fs.pipe_file(path, json.dumps(flag | {"state": "released"}).encode())


class Stop:
    """Lets something happen before one operation on the store; counts them."""

    def __init__(self, at: int, meanwhile: Callable[[], None], kinds: tuple[str, ...]) -> None:
        self.count, self._at, self._meanwhile, self._kinds = 0, at, meanwhile, kinds
        self.where = ""
        self.failed: Exception | None = None
        self._inside = False

    def __call__(self, kind: str, path: str) -> None:
        if self._inside or kind not in self._kinds:
            return
        if f"/{FOLDER}/" in path and not self.count:
            return  # it does not hold the folder yet: when it wakes up, it comes after the other one
        if self.count == self._at:
            self._inside = True
            self.where = f"before {kind} {path}"
            try:
                self._meanwhile()
            except Exception as error:
                self.failed = error
        self.count += 1


KINDS = {"pipe_file": "put", "put_file": "put", "rm_file": "remove"}


@contextlib.contextmanager
def every_operation(stop: Stop) -> Iterator[None]:
    made, retrying = files._made_locally, files.retrying

    def watched_made(path: Path, *args: Any) -> Any:
        stop("put", str(path))
        return made(path, *args)

    def watched_retrying() -> Any:
        def call(function: Any, *args: Any, **options: Any) -> Any:
            name = function.__name__.lstrip("_")  # fsspec's synchronous methods bear those of the asynchronous ones
            path = str((*args, "")[name == "put_file"])
            stop(KINDS.get(name, "read"), path)
            return retrying()(function, *args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_made_locally", watched_made)
        patch.setattr(files, "retrying", watched_retrying)
        for module in (commit, folding, indexing):  # a driver that is stopped is so in all of its threads
            patch.setattr(module, "LISTERS", 1)
        patch.setattr(folding, "FOLD_FROM", 1)
        yield


@dataclass(frozen=True)
class View:
    """What readers see."""

    rows: dict[tuple[str, str, str], tuple[str, dict[str, Any]]]  # kind and row, by what it answers
    files: dict[str, bytes]  # that count


def view(recipe: Recipe) -> View:
    fs, root = open_fs(recipe.sink.folder, recipe.sink.storage_options)
    fs.invalidate_cache()
    merged = Merged(fs, root)
    rows, found = {}, {}
    for manifest in committed_units(recipe.sink):
        for span in merged.spans(manifest):
            found[span.path] = fs.cat_file(f"{root}/{span.path}")
            for row in table_of(fs, root, span).to_pylist():
                key = (row["id"], row["edit"], row["method"])
                assert key not in rows, f"{key} is there twice"
                rows[key] = (span.kind, row)
    return View(rows, found)


def check(recipe: Recipe, place: Place, left: View, calm: View | None, where: str) -> Counter[str]:
    """That all is as the second driver left it; returns what `verify` found before it repaired."""
    place.settle()
    assert view(recipe) == left, where
    assert calm is None or left.rows == calm.rows, where
    record = read_run_record(recipe.sink)
    assert record is not None
    found = verify(recipe.sink, record)
    found.by_kind.pop("report", None)  # these runs write none
    # Also a summary, which has one fixed name: stopped within its put, a driver puts an old one in its place.
    assert set(found.by_kind) <= {"stray file"}, (where, found.findings)
    if found.by_kind:
        verify(recipe.sink, record, repair=True)
        place.settle()
        assert set(verify(recipe.sink, record).by_kind) <= {"report"}, where
        assert view(recipe) == left, where
    assert results(place.folder(recipe)) == asked(shards=SHARDS, rows=ROWS), where
    return Counter(found.by_kind)


def at_every_operation(
    place: Place,
    before: Path | None,
    calm: View | None,
    size: int,
    *,
    retry: bool,
    again: bool,
    kinds: tuple[str, ...] = WRITES,
) -> Counter[str]:
    """Stop a driver before every operation, let another one do the run, and the first one go on.

    Args:
        place: where.
        before: a run to go on with; None for none.
        calm: the rows that are to be seen in the end; None where they depend on how far the first driver came.
        size: of merged files.
        retry: whether the first driver does again what has failed. It is `im01` that fails under it.
        again: whether the second one does.
        kinds: of operations.
    """
    strays: Counter[str] = Counter()
    at = 0
    while True:
        recipe = place.recipe("in", place.new(), sink={"shard_size": size})
        if before is not None:
            shutil.copytree(before, place.folder(recipe))
            place.settle()
        left: list[View] = []

        def meanwhile(recipe: Recipe = recipe, left: list[View] = left) -> None:
            place.settle()
            give_up_for_dead(recipe.sink)
            place.settle()
            drive(recipe, retry=again)
            left.append(view(recipe))

        stop = Stop(at, meanwhile, kinds)
        with every_operation(stop), contextlib.suppress(RunAborted, SinkError):
            drive(recipe, failing=["im01"], retry=retry)
        if stop.failed:
            raise stop.failed
        if not left:
            assert at > 10
            return strays
        strays += check(recipe, place, left[0], calm, f"{at}: {stop.where}")
        shutil.rmtree(place.folder(recipe))
        at += 1


@pytest.fixture(scope="module", params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Where runs stand; images to edit are there."""
    with contextlib.ExitStack() as until_left:
        place = local_place(tmp_path_factory.mktemp("zombies"))
        if request.param == "s3":
            place = until_left.enter_context(s3_place(request.getfixturevalue("s3_server")))
        write_shards(place.root / "in", shards=SHARDS, rows=ROWS, damaged=())
        yield place


@pytest.fixture(scope="module")
def calm(source: Place) -> dict[str, View]:
    recipes = {name: source.recipe("in", f"calm-{name}", sink={"shard_size": size}) for name, size in SIZES.items()}
    for recipe in recipes.values():
        drive(recipe)
    return {name: view(recipe) for name, recipe in recipes.items()}


@pytest.mark.parametrize("size", SIZES)
def test_a_driver_stopped_before_any_write_of_its_first_run_harms_nothing(
    source: Place, calm: dict[str, View], size: str
) -> None:
    strays = at_every_operation(source, None, calm[size], SIZES[size], retry=False, again=True)
    assert strays["stray file"] > 3, "no driver that was taken over ever wrote anything: it was not stopped in time"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "again", [pytest.param(False, id="plain"), pytest.param(True, id="again", marks=pytest.mark.slow)]
)
def test_a_driver_stopped_before_any_write_while_it_does_failures_again_harms_nothing(
    source: Place, calm: dict[str, View], size: str, again: bool
) -> None:
    """Results were good or failed before; under the stopped driver others fail than before."""
    recipe = source.recipe("in", source.new("before"), sink={"shard_size": SIZES[size]})
    with every_operation(Stop(-1, lambda: None, ())):
        drive(recipe, failing=["im00", "im02"])
    at_every_operation(
        source, source.folder(recipe), calm[size] if again else None, SIZES[size], retry=True, again=again
    )


DRIVER = SETTLE_QUICKLY + textwrap.dedent("""
    import json, sys, time
    from pathlib import Path
    from pipeline.writing import restoring
    from pipeline.running import driver
    from pipeline.running import in_process
    from pipeline.errors import EncodeError, ShardeditError
    from pipeline.recipe import recipe_from

    asked = json.load(sys.stdin)
    restored, commit = restoring.restored, in_process.commit

    def hindered(decoded):
        if decoded.prepared.sample.key in asked["failing"]:
            raise EncodeError("out of memory")
        return restored(decoded)

    def noted(*args):
        Path(asked["at_commit"]).write_text("")
        time.sleep(asked["pause"])
        return commit(*args)

    restoring.restored, in_process.commit = hindered, noted
    try:
        driver.run(recipe_from(asked["recipe"]), progress="off", retry_failed=asked["retry"])
    except ShardeditError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
""")


def test_a_process_that_is_stopped_taken_over_and_continued_stops_with_one_line_and_harms_nothing(
    source: Place, tmp_path: Path
) -> None:
    place = source
    out = place.new()
    orders = {
        "recipe": place.recipe_data("in", out, engine="local"),
        "failing": ["im01", "im02"],
        "at_commit": str(tmp_path / "at-commit"),
        "pause": 2.0,
        "retry": False,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(orders))
        process.stdin.close()
        until = time.monotonic() + 120
        while not (tmp_path / "at-commit").exists():
            assert process.poll() is None, "it ended before it was stopped"
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGSTOP)
        recipe = place.recipe("in", out)
        place.settle()
        give_up_for_dead(recipe.sink)
        place.settle()
        assert driver.run(recipe, progress="off").failed == 0
        left = view(recipe)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(120) == 1
        assert process.stderr is not None
        said = process.stderr.read().strip().splitlines()
    finally:
        process.kill()
        process.wait()
    assert len(said) == 1, said
    assert "was taken over by another driver" in said[0]
    check(recipe, place, left, None, "a process")
