"""`shardedit evaluate` from its begin to its end.

    set       a benchmark becomes Parquet, once (set_files.py)
    edits     the job of `shardedit edit`, by all methods, which share inversions
    scores    unit by unit: measured, judged, committed as one file of rows; then pairs of methods, if asked for
    tables    a function of these rows alone, so that a second run prints the same

The same command goes on where an earlier one stopped: with the units that are not committed, and with the questions
that are not answered.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pipeline.common import stopping
from pipeline.common.showing import public_url
from pipeline.common.wording import count
from pipeline.errors import SinkError
from pipeline.evaluation.config import EvaluateConfig, OwnSet
from pipeline.evaluation.job.measuring import (
    MeasuredUnit,
    Measures,
    Measuring,
    Unit,
    load_unit,
    units_to_measure,
)
from pipeline.evaluation.job.preferring import prefer
from pipeline.evaluation.job.results import write_results
from pipeline.evaluation.judging.judged import Judging
from pipeline.evaluation.score_rows import as_bytes, rows_in, schema
from pipeline.evaluation.set_files import FOLDER, source_of, write_set
from pipeline.evaluation.tables import Tables
from pipeline.reading.storage import FileSystem, open_fs
from pipeline.recipe import Recipe
from pipeline.running.driver import run
from pipeline.running.in_process import resources_here
from pipeline.running.progress import Display
from pipeline.writing.files import from_json, get, list_folder, put, remove
from pipeline.writing.lock import DriverLock
from pipeline.writing.run_record import read_run_record
from pipeline.writing.sink_place import refuse_unusable_sink
from pipeline.writing.summary import Summary

RECORD = f"{FOLDER}/evaluation.json"
MEASURES = f"{FOLDER}/measures.json"
ROWS = f"{FOLDER}/rows"
FEWEST_JUDGED = 200  # rows from which too many without a judge's score fail the command
TOO_MANY_FAILED = 3  # exit code


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How an evaluation ended."""

    folder: str
    tables: Tables
    edits: Summary | None  # of the job; None where results were there
    units: int
    units_now: int  # of these, measured by this command
    requests: int  # to the judge, by this command
    exit_code: int


def evaluate(config: EvaluateConfig, *, progress: Display = "auto", retry_failed: bool = False) -> Evaluation:
    """Edit what is left, measure what is left, and write tables.

    Args:
        config: what to do.
        progress: of the edits; "off" says nothing at all.
        retry_failed: edit and measure units with failures again, and ask anew what got no score.

    Raises:
        RecipeError: something cannot work.
        SourceError: the set or the results of others cannot be read.
        SinkError: nothing can be written, or the folder holds another evaluation.
        JudgeError: the judge cannot be asked; what is scored stays.
        RunAborted, ModelError, ClusterError, Stopped: as `driver.run`.
    """
    refuse_unusable_sink(_recipe_to_check(config))
    fs, root = open_fs(config.sink.folder, config.sink.storage_options)
    own = config.set if isinstance(config.set, OwnSet) else None
    is_new = _is_new(fs, root, config)
    files = [] if own else write_set(config)
    if is_new:
        _claim(fs, root, config)
    summary, recipe = None, None
    if config.methods:
        recipe = config.recipe(source_of(config, files))
        summary = run(recipe, progress=progress, retry_failed=retry_failed)
    inside = config.sink.model_copy(update={"folder": f"{config.sink.folder.rstrip('/')}/{FOLDER}"})
    lost: list[str] = []
    with ExitStack() as stack:
        stop = stack.enter_context(stopping.orderly())
        lock = stack.enter_context(DriverLock(inside, on_lost=lost.append, notify=partial(_say, progress)))
        stop.when_ended = partial(lock.__exit__, None, None, None)
        units = units_to_measure(config, files)
        work = _Work(config, fs, root, lock.claim.check, retry_failed)
        left = [unit for unit in units if work.is_left(unit)]
        with closing(_measured(left, config, recipe)) as measured:
            for number, one in enumerate(measured, 1):
                work.finish(one)
                _say(progress, f"measured {len(units) - len(left) + number:,} of {count(len(units), 'unit')}")
        rows = [(unit, work.rows(unit)) for unit in units]
        preferences = work.prefer(rows)
        tables = write_results(fs, root, config, rows, work.measures, preferences)
        lock.check()
    judged = [row for _, some in rows for row in some if not row["reason"]] if preferences is None else preferences
    return Evaluation(
        folder=config.sink.folder,
        tables=tables,
        edits=summary,
        units=len(units),
        units_now=len(left),
        requests=work.judging.requests if work.judging else 0,
        exit_code=_exit_code(config, summary, judged),
    )


def _measured(left: Sequence[Unit], config: EvaluateConfig, recipe: Recipe | None) -> Generator[MeasuredUnit]:
    """Units as they are measured: on the cluster where there is one, else here on all cores."""
    if not left:
        return
    record = read_run_record(config.sink)
    make = partial(Measuring, config, recipe, record.threads if record is not None else None)
    if _is_spread(config):
        from pipeline.running.on_ray.spreading import spread

        yield from spread(make, left, config.run)
        return
    measuring = make()
    try:
        for unit in left:
            stopping.check()
            yield measuring(unit)
    finally:
        measuring.close()


def _is_spread(config: EvaluateConfig) -> bool:
    """Whether more than this process is there to measure: starting Ray for less would take longer than it saves."""
    return config.run.engine == "ray" and (bool(os.environ.get("RAY_ADDRESS")) or resources_here().gpus > 1)


def _recipe_to_check(config: EvaluateConfig) -> Recipe:
    """A recipe with this sink, whose folder is looked at before anything is read."""
    return Recipe.model_validate({"source": {"shards": "-"}, "sink": config.sink.model_dump()})


def _say(progress: Display, text: str) -> None:
    if progress != "off":
        print(text, file=sys.stderr, flush=True)


def _is_new(fs: FileSystem, root: str, config: EvaluateConfig) -> bool:
    """Whether the folder holds no evaluation yet.

    Raises:
        SinkError: it holds another one.
    """
    before = get(fs, f"{root}/{RECORD}")
    if before is None:
        return True
    known = from_json(before)
    if not isinstance(known, dict) or known.get("hash") != config.hash:
        raise SinkError(
            f"{public_url(config.sink.folder)} holds another evaluation: another set, other methods, measures or "
            "judge. Set another sink.folder"
        )
    return False


def _claim(fs: FileSystem, root: str, config: EvaluateConfig) -> None:
    """Say what the folder is for; without storage options, which may hold secrets."""
    secrets: Any = {"sink": {"storage_options"}, "set": {"storage_options"}}
    data = config.model_dump(mode="json", exclude=secrets)
    data["set"].get("source", {}).pop("storage_options", None)
    put(fs, f"{root}/{RECORD}", json.dumps({"hash": config.hash, "config": data}, indent=1).encode())


class _Work:
    """Units that are measured become committed ones."""

    def __init__(
        self, config: EvaluateConfig, fs: FileSystem, root: str, check: Callable[[], None], retry_failed: bool
    ) -> None:
        self._config, self._fs, self._root, self._check = config, fs, root, check
        self._retry_failed = retry_failed
        self._there = {path.rpartition("/")[2] for path in list_folder(fs, f"{root}/{ROWS}")}
        self._known = self._known_measures()
        if retry_failed and self._known is not None and self._known.unavailable:
            self._forget()
        self.judging: Judging | None = None
        if config.judge is not None:
            journal = f"{root}/{FOLDER}/journal"
            self.judging = Judging(config.judge, fs, journal, ask_failed_again=retry_failed)
        self._rows_are_judged = config.judge is not None and config.judge.scores_rows

    @property
    def measures(self) -> Measures:
        """What the committed rows hold."""
        return self._known or Measures(columns=(), unavailable={}, own={})

    def is_left(self, unit: Unit) -> bool:
        """Whether a unit is to be measured."""
        if f"{unit.name}.parquet" not in self._there:
            return True
        return self._retry_failed and any(row["reason"] or row.get("judge_reason") for row in self.rows(unit))

    def finish(self, measured: MeasuredUnit) -> None:
        """Judge and commit."""
        self._settle(measured.measures)
        rows = measured.rows
        if self._rows_are_judged:
            assert self.judging is not None, "there is one"
            results = load_unit(self._config, measured.unit)
            judged = self.judging.columns(results, [row["reason"] for row in rows])
            rows = [row | columns for row, columns in zip(rows, judged, strict=True)]
        columns = schema(measured.measures.columns, judged=self._rows_are_judged)
        self._check()
        put(self._fs, f"{self._root}/{ROWS}/{measured.unit.name}.parquet", as_bytes(rows, columns))

    def prefer(self, rows: Sequence[tuple[Unit, Sequence[dict[str, Any]]]]) -> list[dict[str, Any]] | None:
        """Rows of pairs of methods; None: a judge is not asked about these."""
        if self.judging is None or self._rows_are_judged:
            return None
        return prefer(
            self._fs,
            self._root,
            self._config,
            rows,
            self.judging,
            check=self._check,
            retry_failed=self._retry_failed,
        )

    def rows(self, unit: Unit) -> list[dict[str, Any]]:
        """A unit's rows, as committed."""
        data = get(self._fs, f"{self._root}/{ROWS}/{unit.name}.parquet")
        if data is None:
            raise SinkError(f"{ROWS}/{unit.name}.parquet has gone. Run the same command again")
        return rows_in(data)

    def _known_measures(self) -> Measures | None:
        data = get(self._fs, f"{self._root}/{MEASURES}")
        if data is None:
            return None
        known = from_json(data)
        return Measures(columns=tuple(known["columns"]), unavailable=known["unavailable"], own=known["own"])

    def _forget(self) -> None:
        """All rows, for what was unavailable may be there by now. Answers of the judge stay in the journal."""
        self._check()
        for name in self._there:
            remove(self._fs, f"{self._root}/{ROWS}/{name}")
        remove(self._fs, f"{self._root}/{MEASURES}")
        self._there, self._known = set(), None

    def _settle(self, measures: Measures) -> None:
        """See that all units are measured alike: a model that was missing before would give half a column."""
        if self._known == measures:
            return
        if self._known is not None and self._there:
            differing = sorted(set(self._known.unavailable) ^ set(measures.unavailable))
            raise SinkError(
                f"units that are done were measured otherwise ({', '.join(differing) or 'other measures'}). Give "
                "--retry-failed to measure all of them again"
            )
        self._known = measures
        put(self._fs, f"{self._root}/{MEASURES}", json.dumps(asdict(measures), indent=1).encode())


def _exit_code(config: EvaluateConfig, summary: Summary | None, judged: Sequence[dict[str, Any]]) -> int:
    if summary is not None and summary.exit_code:
        return summary.exit_code
    if config.judge is not None:
        failed = sum(bool(row["judge_reason"]) for row in judged)
        if len(judged) >= FEWEST_JUDGED and failed > config.judge.max_failed * len(judged):
            return TOO_MANY_FAILED
    return 0
