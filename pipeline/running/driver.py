"""A whole run: find what is left to do, edit it here or on Ray, add up what is committed.

That nothing is lost or done twice depends on the units' names and manifests (writing/commit.py), never on the executor.
"""

from __future__ import annotations

import glob
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from pipeline.common import stopping
from pipeline.common.partition import WHOLE, Partition
from pipeline.common.showing import printable
from pipeline.common.wording import count
from pipeline.errors import ClusterError, HeldError, RecipeError, RunAborted, SinkError
from pipeline.reading.shards import shard_slug
from pipeline.reading.storage import open_fs
from pipeline.recipe import Recipe
from pipeline.running.in_process import Executor, LocalExecutor
from pipeline.running.preflight import check_captions, refuse_what_the_model_lacks, rows_to_look_at
from pipeline.running.progress import Display, Watch
from pipeline.running.tally import Seen, over_budget
from pipeline.running.todo import Todo, find_todo
from pipeline.writing.answers import forget_failed_answers
from pipeline.writing.attempts import forget_stops, note_stop
from pipeline.writing.baseline import Baseline, Counted
from pipeline.writing.card import BESIDE, CARD, write_card
from pipeline.writing.cleaning import begin, remove_leftovers
from pipeline.writing.commit import Committed, committed_shards, committed_units
from pipeline.writing.flags import no_empty_folder
from pipeline.writing.folding import fold_finished_shards
from pipeline.writing.lock import Claim, DriverLock
from pipeline.writing.merged import Merged
from pipeline.writing.merging import merge_units
from pipeline.writing.paths import refuse_links
from pipeline.writing.run_record import (
    RunRecord,
    check_same_run,
    read_run_record,
    run_record,
    versions_that_differ,
    write_run_record,
)
from pipeline.writing.sink_place import refuse_sink_over_source, refuse_unusable_sink
from pipeline.writing.summary import Summary, Totals, summarise, write_summary

log = logging.getLogger(__name__)

BEGINNING = "_lock/begin"  # a lock of its own, for the time until run.json is there
WAIT_S = 1.0  # between looks at it
RAYS_COPIES = "working_dir_files"  # the folder in which Ray unpacks the working directories of jobs


def run(
    recipe: Recipe,
    *,
    progress: Display = "auto",
    retry_failed: bool = False,
    strict: bool = False,
    partition: Partition = WHOLE,
) -> Summary:
    """Edit everything that the recipe asks for and that is not committed yet; then write summary.json and report.html.

    With a partition, edit its shards alone, beside other commands at work on other partitions. Where it ends and
    shards of others are left, nothing is merged and no summary written: the last one does that. The summary that is
    returned then says "partition complete", and counts what all have committed so far.

    Args:
        recipe: the run. `run.engine` decides between one process and Ray; both write the same bytes.
        progress: a bar, lines, neither, or what fits the terminal.
        retry_failed: edit units with failures again as well; what comes out replaces their earlier commits.
        strict: failed results within the error budget give the summary's exit code 3 instead of 0.
        partition: which of the run's shards. Units are the same however they are shared out: a run may go on with
            other partitions, or without.

    Raises:
        RecipeError: a path leads into the uploaded copy of a Ray job's working directory.
        SourceError: there is nothing to read.
        SinkError: nothing can be written, or the folder belongs to another run.
        ModelError: the checkpoint cannot be used.
        ClusterError: the cluster lacks what the recipe asks for, or failed.
        RunAborted: an error budget was spent, on the way or in the end; what is committed stays.
        Stopped: a `KeyboardInterrupt`; SIGINT came while this ran in the main thread. What is committed stays.
    """
    if problems := uploaded_paths(recipe):
        raise RecipeError("recipe", problems)
    refuse_what_the_model_lacks(recipe)
    refuse_sink_over_source(recipe)
    refuse_unusable_sink(recipe)
    refuse_links(recipe.sink)
    executor = _executor_of(recipe)

    def hold(part: Partition = WHOLE) -> AbstractContextManager[DriverLock]:
        notify = partial(_say, progress=progress)
        return _held(DriverLock(recipe.sink, on_lost=executor.stop, partition=part, notify=notify), stop)

    with no_empty_folder(recipe.sink), stopping.orderly() as stop:
        try:
            with hold(partition) as lock:
                todo, summary = _run(recipe, executor, lock, progress, retry_failed, strict, partition)
        except HeldError:  # perhaps by the driver that finishes the run, with nothing left to do here
            todo, summary = find_todo(recipe, retry_failed=retry_failed, partition=partition), None
            if partition == WHOLE or todo.tasks:
                raise
        if summary is None:
            summary = _finish_as_last(recipe, todo, executor, hold, progress, strict, partition)
    if summary.outcome == "over the error budget":  # too few units to be judged on the way, or a lower budget since
        raise RunAborted(over_budget(recipe.run, summary.planned, summary.failed))
    return summary


@contextmanager
def _held(driver: DriverLock, stop: stopping.Orderly) -> Iterator[DriverLock]:
    """The lock, held; a stop gives it back as well."""
    try:
        with driver as lock:
            stop.when_ended = partial(lock.__exit__, None, None, None)
            stopping.check()
            yield lock
    finally:
        stop.when_told = stop.when_ended = None


def uploaded_paths(recipe: Recipe) -> list[tuple[str, str]]:
    """Relative paths that a Ray job would look for, or lose, in the uploaded copy of its working directory.

    Returns:
        Problems, as those of a recipe; none outside of such a copy.
    """
    try:
        if Path.cwd().parent.name != RAYS_COPIES:
            return []
    except FileNotFoundError:  # the folder is gone: what is relative fails by itself
        return []

    def is_relative(url: str) -> bool:
        return "://" not in url and "::" not in url and not os.path.isabs(url)

    way_out = "Give a URL, or an absolute path on a disk that all nodes share"
    missing = [url for url in recipe.source.shards if is_relative(url) and not glob.glob(url, recursive=True)]
    text = "is relative, and no such file was uploaded with the job's working directory"
    problems = [("source.shards", f"'{url}' {text}. {way_out}") for url in missing]
    if is_relative(recipe.sink.folder):
        text = "is relative: results would stand in the uploaded copy of the job's working directory, and go with it"
        problems.append(("sink.folder", f"'{recipe.sink.folder}' {text}. {way_out}"))
    return problems


def _executor_of(recipe: Recipe) -> Executor:
    if recipe.run.engine == "local":
        return LocalExecutor(recipe)
    try:
        from pipeline.running.on_ray.executor import RayExecutor
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ClusterError(
            "run.engine is ray, and Ray is not installed. Install it (pip install 'shardedit[cluster]'), or set "
            "run.engine=local to work in one process"
        ) from error
    return RayExecutor(recipe)


def _run(
    recipe: Recipe,
    executor: Executor,
    lock: DriverLock,
    progress: Display,
    retry_failed: bool,
    strict: bool,
    partition: Partition,
) -> tuple[Todo, Summary | None]:
    """Edit what is left; no summary for a partition, which may not be the last."""
    todo = find_todo(recipe, retry_failed=retry_failed, partition=partition)
    _say(todo.left_out, progress)
    stopping.check()
    if retry_failed:
        forget_failed_answers(recipe.sink)
    try:
        if not todo.tasks:
            _begin(recipe, todo, lock)
            return todo, _end(recipe, todo, executor, lock, progress, strict)
        _say(check_captions(rows_to_look_at(todo.tasks, recipe.source), todo.shards, recipe), progress)
        stopping.check()
        if todo.only is None or todo.before is not None:
            _open(recipe, todo, todo.before, executor, lock.claim, progress)
        else:
            _open_in_turn(recipe, todo, executor, lock.claim, progress)
        _begin(recipe, todo, lock)
        with Watch(executor.seen, display=progress):
            try:
                lock.check()
                # Not earlier: attempts begin now, and a note without a run.json would look like a lost run.
                stopping.at_work(when_told=partial(note_stop, recipe.sink, lock.claim.generation))
                executor.edit(todo, lock.claim)
                lock.check()
            except BaseException:  # Ctrl-C as well: what is committed by then is worth its summary
                try:
                    if todo.only is None and lock.claim.holds():  # or the summary is another driver's
                        so_far = _summary(recipe, todo, executor.seen(), lock, strict)
                        stopping.note_committed(so_far.images)
                except (SinkError, RunAborted) as error:  # most likely what ended the run
                    log.warning("no summary was written: %s", error)
                raise
        return todo, _end(recipe, todo, executor, lock, progress, strict)
    finally:
        executor.close()


def _say(text: str, progress: Display) -> None:
    if text and progress != "off":
        print(printable(text), file=sys.stderr, flush=True)


def _begin(recipe: Recipe, todo: Todo, lock: DriverLock) -> None:
    """Record what this driver goes on from, and remove what earlier ones left that does not count."""
    begin(recipe.sink, lock.claim, todo.counted, todo.committed, todo.only)
    remove_leftovers(
        recipe.sink, lock.claim, Baseline.of(todo.counted, lock.claim.generation, only=todo.only), todo.noise
    )


def _open(
    recipe: Recipe, todo: Todo, before: RunRecord | None, executor: Executor, claim: Claim, progress: Display
) -> None:
    """Load the model; write run.json, or see that this is the run which it describes."""
    _say(executor.open(before, partial(_say, progress=progress)), progress)
    stopping.check()
    _say(recipe.model.caveat, progress)
    settings = executor.settings
    record = run_record(recipe, todo.shards, executor.model, settings.call_size, settings.threads, settings.tuned)
    if before is None:
        claim.check()
        write_run_record(record, recipe.sink)
        return
    check_same_run(before, record, recipe.sink)
    for difference in versions_that_differ(before, record):
        log.warning("other versions than the run began with, bits may differ: %s", difference)


def _open_in_turn(recipe: Recipe, todo: Todo, executor: Executor, claim: Claim, progress: Display) -> None:
    """The same for partitions that begin a run together: the first to load its model decides the call size for all."""
    beginning = recipe.sink.model_copy(update={"folder": f"{recipe.sink.folder.rstrip('/')}/{BEGINNING}"})
    while True:
        try:
            with DriverLock(beginning, on_lost=log.info, notify=log.info) as first:
                _open(recipe, todo, read_run_record(recipe.sink), executor, first.claim, progress)
                return
        except HeldError:
            time.sleep(WAIT_S)
            stopping.check()
            if (before := read_run_record(recipe.sink)) is not None:
                _open(recipe, todo, before, executor, claim, progress)
                return


def _end(
    recipe: Recipe, todo: Todo, executor: Executor, lock: DriverLock, progress: Display, strict: bool
) -> Summary | None:
    """Finish the run; for a partition, which may not be the last, fold its shards."""
    if todo.only is None:
        return _finish(recipe, todo, executor, lock, progress, strict)
    fold_finished_shards(recipe.sink, lock.claim, todo.only)
    return None


def _finish_as_last(
    recipe: Recipe,
    todo: Todo,
    executor: Executor,
    hold: Callable[[], AbstractContextManager[DriverLock]],
    progress: Display,
    strict: bool,
    partition: Partition,
) -> Summary:
    """Finish the run where no shard of any partition is left; else say what is.

    Two that end at once both come here, when nobody holds a partition any more: one gets the whole folder.
    """
    mine = todo.only or frozenset()
    committed, totals = Committed(), Totals()
    for manifest in committed_units(recipe.sink):
        committed.add(manifest)
        totals.add(manifest)
    left = {slug for shard in todo.shards if not committed.has_whole_shard(slug := shard_slug(shard.path))}
    try:
        if not left:
            with hold() as lock:
                return _finish(recipe, todo, executor, lock, progress, strict)
        others = f"{count(len(left - mine), 'shard')} of others left"
    except HeldError:
        others = "another driver is at work on what is left, or finishes the run"
    finally:
        executor.close()
    if not left & mine:
        _say(f"partition {partition.index} of {partition.count} done; {others}", progress)
    return totals.summary(
        complete=False,
        part_complete=not left & mine,
        units_now=executor.seen().units,
        max_failed_fraction=recipe.run.max_failed_fraction,
        strict=strict,
    )


def _finish(
    recipe: Recipe, todo: Todo, executor: Executor, lock: DriverLock, progress: Display, strict: bool
) -> Summary:
    """Once every unit has been edited: merge their files, add up, and say what is there."""
    stopping.at_work()
    committed, counted = Committed(), Counted()
    noise: list[str] = []
    for found in committed_shards(recipe.sink):
        stopping.check()
        noise += found.noise
        for manifest in found.manifests:
            committed.add(manifest)
            counted.add(manifest)
    if todo.only is not None:  # the lock is not the one that the partition began with
        begin(recipe.sink, lock.claim, counted, committed)
    remove_leftovers(recipe.sink, lock.claim, Baseline.of(counted, lock.claim.generation), noise)
    if all(committed.has_whole_shard(shard_slug(shard.path)) for shard in todo.shards):
        merge_units(recipe.sink, executor.merge, lock.claim)
        forget_stops(recipe.sink)
    summary = _summary(recipe, todo, executor.seen(), lock, strict)
    record = read_run_record(recipe.sink)
    lock.claim.check()
    if summary.complete and record is not None and write_card(recipe.sink, record, summary) != CARD:
        _say(f"{CARD} is not ours and stays; the dataset's card is {BESIDE}", progress)
    return summary


def _summary(recipe: Recipe, todo: Todo, seen: Seen, lock: DriverLock, strict: bool) -> Summary:
    from pipeline.looking.report.page import write_report

    fold_finished_shards(recipe.sink, lock.claim)
    fs, root = open_fs(recipe.sink.folder, recipe.sink.storage_options)
    summary = summarise(
        committed_units(recipe.sink),
        todo.shards,
        units_now=seen.units,
        max_failed_fraction=recipe.run.max_failed_fraction,
        generation=lock.claim.generation,
        strict=strict,
        merged=Merged(fs, root),
    )
    lock.claim.check()
    write_summary(summary, recipe.sink)
    write_report(recipe.sink)
    return summary
