"""Units of an evaluation: what each holds, and what is measured of it. Here, or in a worker elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.evaluation.benchmarks.files import Folder
from pipeline.evaluation.benchmarks.pie_bench import SIDE
from pipeline.evaluation.config import EvaluateConfig, OwnSet
from pipeline.evaluation.from_run import results_of, units_of
from pipeline.evaluation.items import Result
from pipeline.evaluation.job.costs import Costs
from pipeline.evaluation.layouts import FOLDERS, files_of, refuse_empty, result_there
from pipeline.evaluation.score_rows import row_of
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.set_files import FOLDER, read_items
from pipeline.looking.results import RunFolder
from pipeline.reading.decoder import Decoder
from pipeline.reading.storage import open_fs
from pipeline.recipe import Recipe
from pipeline.running.in_process import resources_here
from pipeline.settings.sections import SourceConfig
from pipeline.writing.files import put
from pipeline.writing.merged import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Results that are measured, and committed, together: a unit of the job, or a file of the set by one method."""

    name: str
    spans: tuple[Span, ...] = ()  # of the job
    items: str = ""  # file of the set, whose results are somebody else's
    method: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What is measured, of every unit alike."""

    columns: tuple[str, ...]  # names of figures
    unavailable: Mapping[str, str]  # those that could not be had, with the way to get them
    own: Mapping[str, bool | None]  # directions of those of one's own


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredUnit:
    """Its rows, without a judge's columns."""

    unit: Unit
    rows: list[dict[str, Any]]
    measures: Measures


def units_to_measure(config: EvaluateConfig, files: Sequence[str]) -> list[Unit]:
    """All of an evaluation, in their order.

    Args:
        config: the evaluation's.
        files: of the set; none of one's own.

    Raises:
        SourceError: a method's folder holds nothing.
    """
    if not config.results:
        return [Unit(name=name, spans=tuple(spans)) for name, spans in units_of(RunFolder(config.sink)).items()]
    fs, root = open_fs(config.sink.folder, config.sink.storage_options)
    refuse_empty(config.set.kind, _folders(config), read_items(fs, root, files[0])[0])
    return [
        Unit(name=f"{method}-{number:05d}", items=path, method=method)
        for method in config.results
        for number, path in enumerate(files)
    ]


def _folders(config: EvaluateConfig) -> dict[str, Folder]:
    return {method: Folder(url, config.sink.storage_options) for method, url in config.results.items()}


def load_unit(config: EvaluateConfig, unit: Unit) -> list[Result]:
    """A unit's results, those of one item together.

    Raises:
        SinkError, SourceError: they cannot be read.
    """
    fs, root = open_fs(config.sink.folder, config.sink.storage_options)
    if not unit.items:
        return results_of(fs, root, unit.spans, config.set if isinstance(config.set, OwnSet) else None)
    folder = _folders(config)[unit.method]
    return [result_there(config.set.kind, folder, unit.method, item) for item in read_items(fs, root, unit.items)]


class Measuring:
    """Measures units; loads what the configuration names once.

    Args:
        config: the evaluation's.
        recipe: of the job; None where results are somebody else's.
        threads: of the models on a CPU, as the job has them; None: as torch has them. Another number rounds otherwise.
    """

    def __init__(self, config: EvaluateConfig, recipe: Recipe | None, threads: int | None) -> None:
        self._config = config
        if threads is not None and not torch.cuda.is_available():
            torch.set_num_threads(threads)
        source = recipe.source if recipe is not None else SourceConfig(shards=("-",))
        self._scorer = Scorer(
            config.metrics,
            size=SIDE if config.set.kind == "pie_bench" else None,
            decoder=Decoder(source),
            threads=max(1, int(resources_here().cpus)),
        )
        self._costs = Costs(recipe)

    def __call__(self, unit: Unit) -> MeasuredUnit:
        """Measure, and lay results out as the benchmark's scripts read them."""
        results = load_unit(self._config, unit)
        rows = [
            row_of(one, cost=self._costs.of(one.result.method, one.result.item.request), judged={})
            for one in self._scorer.score(results)
        ]
        fs, root = open_fs(self._config.sink.folder, self._config.sink.storage_options)
        for path, data in self._official(results):
            put(fs, f"{root}/{path}", data, durable=False)
        measures = Measures(
            columns=self._scorer.columns,
            unavailable=dict(self._scorer.unavailable),
            own=dict(self._scorer.own_directions),
        )
        return MeasuredUnit(unit=unit, rows=rows, measures=measures)

    def close(self) -> None:
        """End the threads."""
        self._scorer.close()

    def _official(self, results: Sequence[Result]) -> Iterator[tuple[str, bytes]]:
        kind = self._config.set.kind
        if self._config.methods and self._config.official_layout and kind in FOLDERS:
            for result in results:
                for path, data in files_of(kind, result):
                    yield f"{FOLDER}/{FOLDERS[kind]}/{path}", data
