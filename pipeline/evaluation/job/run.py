"""`shardedit evaluate` from its begin to its end.

    set       a benchmark becomes Parquet, once (set_files.py)
    edits     the job of `shardedit edit`, by all methods, which share inversions
    scores    unit by unit: measured, judged, committed as one file of rows
    tables    a function of these rows alone, so that a second run prints the same

The same command goes on where an earlier one stopped: with the units that are not committed, and with the questions
that are not answered.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.common import stopping
from pipeline.common.showing import public_url
from pipeline.common.wording import count
from pipeline.errors import SinkError
from pipeline.evaluation.benchmarks.files import Folder
from pipeline.evaluation.benchmarks.pie_bench import SIDE
from pipeline.evaluation.config import EvaluateConfig, OwnSet
from pipeline.evaluation.from_run import results_of, units_of
from pipeline.evaluation.items import Result
from pipeline.evaluation.job.costs import Costs
from pipeline.evaluation.job.page import Unit
from pipeline.evaluation.job.results import write_results
from pipeline.evaluation.judging.judged import Judging
from pipeline.evaluation.layouts import FOLDERS, files_of, refuse_empty, result_there
from pipeline.evaluation.score_rows import as_bytes, row_of, rows_in, schema
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.set_files import FOLDER, read_items, source_of, write_set
from pipeline.evaluation.tables import Tables
from pipeline.looking.results import RunFolder
from pipeline.reading.decoder import Decoder
from pipeline.reading.storage import FileSystem, open_fs
from pipeline.recipe import Recipe
from pipeline.running.driver import run
from pipeline.running.in_process import resources_here
from pipeline.running.progress import Display
from pipeline.writing.files import from_json, get, list_folder, put
from pipeline.writing.lock import DriverLock
from pipeline.writing.sink_place import refuse_unusable_sink
from pipeline.writing.summary import Summary

RECORD = f"{FOLDER}/evaluation.json"
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
    _claim(fs, root, config)
    files = [] if own else write_set(config)
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
        units = _units(config, fs, root, files, own)
        work = _Work(config, fs, root, recipe, lock.claim.check, retry_failed)
        stack.callback(work.close)
        for name, load in units:
            stopping.check()
            if work.is_left(name):
                work.do(name, load())
                _say(progress, f"measured {work.done:,} of {count(len(units), 'unit')}")
        measured = [(unit, work.rows(unit[0])) for unit in units]
        rows = [row for _, some in measured for row in some]
        tables = write_results(fs, root, config, measured, work.scorer.unavailable, work.scorer.own_directions)
        lock.check()
    return Evaluation(
        folder=config.sink.folder,
        tables=tables,
        edits=summary,
        units=len(units),
        units_now=work.now,
        requests=work.judging.requests if work.judging else 0,
        exit_code=_exit_code(config, summary, rows),
    )


def _recipe_to_check(config: EvaluateConfig) -> Recipe:
    """A recipe with this sink, whose folder is looked at before anything is read."""
    return Recipe.model_validate({"source": {"shards": "-"}, "sink": config.sink.model_dump()})


def _say(progress: Display, text: str) -> None:
    if progress != "off":
        print(text, file=sys.stderr, flush=True)


def _claim(fs: FileSystem, root: str, config: EvaluateConfig) -> None:
    """Say what the folder is for, or see that it is for this."""
    before = get(fs, f"{root}/{RECORD}")
    if before is None:
        secrets: Any = {"sink": {"storage_options"}, "set": {"storage_options"}}
        put(
            fs,
            f"{root}/{RECORD}",
            json.dumps({"hash": config.hash, "config": _without_secrets(config, secrets)}, indent=1).encode(),
        )
        return
    known = from_json(before)
    if not isinstance(known, dict) or known.get("hash") != config.hash:
        raise SinkError(
            f"{public_url(config.sink.folder)} holds another evaluation: another set, other methods, measures or "
            "judge. Set another sink.folder"
        )


def _without_secrets(config: EvaluateConfig, secrets: Any) -> Any:
    data = config.model_dump(mode="json", exclude=secrets)
    data["set"].get("source", {}).pop("storage_options", None)
    return data


def _units(config: EvaluateConfig, fs: FileSystem, root: str, files: Sequence[str], own: OwnSet | None) -> list[Unit]:
    if not config.results:
        edited = RunFolder(config.sink)
        return [(name, partial(results_of, edited, spans, own)) for name, spans in units_of(edited).items()]
    folders = {method: Folder(url, config.sink.storage_options) for method, url in config.results.items()}
    kind = config.set.kind
    refuse_empty(kind, folders, read_items(fs, root, files[0])[0])

    def load(path: str, method: str) -> list[Result]:
        return [result_there(kind, folders[method], method, item) for item in read_items(fs, root, path)]

    return [
        (f"{method}-{number:05d}", partial(load, path, method))
        for method in config.results
        for number, path in enumerate(files)
    ]


class _Work:
    """What is done to units, with what is loaded once."""

    def __init__(
        self,
        config: EvaluateConfig,
        fs: FileSystem,
        root: str,
        recipe: Recipe | None,
        check: Callable[[], None],
        retry_failed: bool,
    ) -> None:
        self._config, self._fs, self._root, self._check = config, fs, root, check
        self._retry_failed = retry_failed
        self._there = {path.rpartition("/")[2] for path in list_folder(fs, f"{root}/{ROWS}")}
        source = recipe.source if recipe is not None else _recipe_to_check(config).source
        self.scorer = Scorer(
            config.metrics,
            size=SIDE if config.set.kind == "pie_bench" else None,
            decoder=Decoder(source),
            threads=max(1, int(resources_here().cpus)),
        )
        self.judging: Judging | None = None
        if config.judge is not None:
            journal = f"{root}/{FOLDER}/journal"
            self.judging = Judging(config.judge, fs, journal, ask_failed_again=retry_failed)
        self._costs = Costs(recipe)
        self._schema = schema(self.scorer.columns, judged=config.judge is not None)
        self.now = 0
        self.done = 0

    def close(self) -> None:
        """End threads."""
        self.scorer.close()

    def is_left(self, name: str) -> bool:
        """Whether a unit is to be measured."""
        left = f"{name}.parquet" not in self._there
        if not left and self._retry_failed:
            left = any(row["reason"] or row.get("judge_reason") for row in self.rows(name))
        self.done += not left
        return left

    def do(self, name: str, results: Sequence[Result]) -> None:
        """Measure, judge, commit."""
        scored = self.scorer.score(results)
        judged: Sequence[dict[str, Any]] = [{}] * len(scored)
        if self.judging is not None:
            judged = self.judging.columns(scored)
        rows = [
            row_of(one, cost=self._costs.of(one.result.method, one.result.item.request), judged=columns)
            for one, columns in zip(scored, judged, strict=True)
        ]
        for path, data in self._official(results):
            put(self._fs, f"{self._root}/{path}", data, durable=False)
        self._check()
        put(self._fs, f"{self._root}/{ROWS}/{name}.parquet", as_bytes(rows, self._schema))
        self.now += 1
        self.done += 1

    def _official(self, results: Sequence[Result]) -> Iterator[tuple[str, bytes]]:
        kind = self._config.set.kind
        if self._config.methods and self._config.official_layout and kind in FOLDERS:
            for result in results:
                for path, data in files_of(kind, result):
                    yield f"{FOLDER}/{FOLDERS[kind]}/{path}", data

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A unit's rows, as committed."""
        data = get(self._fs, f"{self._root}/{ROWS}/{name}.parquet")
        if data is None:
            raise SinkError(f"{ROWS}/{name}.parquet has gone. Run the same command again")
        return rows_in(data)


def _exit_code(config: EvaluateConfig, summary: Summary | None, rows: Sequence[dict[str, Any]]) -> int:
    if summary is not None and summary.exit_code:
        return summary.exit_code
    if config.judge is not None:
        judged = [row for row in rows if not row["reason"]]
        failed = sum(bool(row["judge_reason"]) for row in judged)
        if len(judged) >= FEWEST_JUDGED and failed > config.judge.max_failed * len(judged):
            return TOO_MANY_FAILED
    return 0
