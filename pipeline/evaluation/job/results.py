"""What an evaluation leaves behind once every unit is measured: tables, the benchmark's own files, the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.evaluation import tables as printed
from pipeline.evaluation.config import EvaluateConfig, PieBench
from pipeline.evaluation.job.measuring import Measures, Unit, load_unit
from pipeline.evaluation.job.page import page_of
from pipeline.evaluation.job.preferring import MEASURE, differences_in, with_preferences
from pipeline.evaluation.judging.judged import remarks_of
from pipeline.evaluation.layouts import FOLDERS
from pipeline.evaluation.measures import MEASURES, Measure, measure_of
from pipeline.evaluation.official import gedit_aggregates, gedit_files, imgedit_aggregates, imgedit_files, pie_csv
from pipeline.evaluation.set_files import FOLDER
from pipeline.evaluation.statistics import Settings
from pipeline.evaluation.tables import Tables, tables_of
from pipeline.reading.storage import FileSystem
from pipeline.writing.files import put
from pipeline.writing.paths import refuse_links

Rows = Sequence[dict[str, Any]]
NAMES = {
    "pie_bench": "PIE-Bench",
    "gedit_bench": "GEdit-Bench",
    "imgedit_bench": "ImgEdit-Bench",
    "drawn": "Drawn world",
    "own": "Own set",
}


def write_results(
    fs: FileSystem,
    root: str,
    config: EvaluateConfig,
    units: Sequence[tuple[Unit, Rows]],
    measures: Measures,
    preferences: Rows | None = None,
) -> Tables:
    """Write everything that follows from the rows; returns the tables.

    Args:
        fs, root: the sink's folder.
        config: the evaluation's.
        units: with their rows, of all methods.
        measures: what the rows hold.
        preferences: rows of pairs of methods; None: a judge was not asked about these.
    """
    refuse_links(config.sink)
    rows = [row for _, some in units for row in some]
    judged = rows if preferences is None else preferences
    if preferences is not None:
        rows = with_preferences(rows, preferences)
    methods = list(config.methods or config.results)
    settings = Settings(
        resamples=config.statistics.resamples, seed=config.statistics.seed, correction=config.statistics.correction
    )
    tables = tables_of(
        rows,
        methods,
        _measures(config, rows, measures.own),
        settings,
        title=title_of(config, rows, methods),
        unavailable=measures.unavailable,
        remarks=remarks_of(config.judge, judged) if config.judge else (),
        differences=None if preferences is None else {MEASURE: differences_in(preferences, methods)},
    )
    official = official_of(config, rows, methods)
    files = {
        "table.md": printed.markdown(tables),
        "table.csv": printed.as_csv(tables),
        "table.tex": printed.latex(tables),
        "pairs.csv": printed.pairs_csv(tables),
        "summary.json": json.dumps(tables.as_dict() | {"official": official}, indent=1, ensure_ascii=False) + "\n",
    }
    is_laid_out = bool(config.methods) and config.official_layout
    files["index.html"] = page_of(
        tables, rows, units, config.set.kind, partial(load_unit, config), official=is_laid_out
    )
    for name, text in files.items():
        put(fs, f"{root}/{FOLDER}/{name}", text.encode("utf-8", "replace"))
    for name, data in _official_files(config, rows, methods).items():
        put(fs, f"{root}/{FOLDER}/{name}", data)
    return tables


def _measures(config: EvaluateConfig, rows: Rows, own: Mapping[str, bool | None]) -> dict[str, Measure]:
    names = config.statistics.measures or (*MEASURES, *own)
    there = rows[0].keys() if rows else ()
    return {name: measure_of(name, dict(own)) for name in names if name in there}


def title_of(config: EvaluateConfig, rows: Rows, methods: Sequence[str]) -> str:
    """Of the tables: sets of another size, and other judges, are not comparable."""
    asked = len([row for row in rows if row["method"] == methods[0]])
    subset = f", {config.set.subset}" if isinstance(config.set, PieBench) else ""
    judge = f", judged by {config.judge.model} at {config.judge.whereabouts}" if config.judge else ""
    return f"{NAMES[config.set.kind]}{subset}, n = {asked}{judge}"


def official_of(config: EvaluateConfig, rows: Rows, methods: Sequence[str]) -> dict[str, Any]:
    """Aggregates as the benchmark's own scripts make them, by method."""
    if config.judge is None or not config.judge.scores_rows:
        return {}
    aggregates = {"gedit_bench": gedit_aggregates, "imgedit_bench": imgedit_aggregates}.get(config.set.kind)
    if aggregates is None or (config.judge.protocol == "imgedit") != (config.set.kind == "imgedit_bench"):
        return {}
    return {method: aggregates(_of(rows, method)) for method in methods}


def _official_files(config: EvaluateConfig, rows: Rows, methods: Sequence[str]) -> dict[str, bytes]:
    kind = config.set.kind
    if kind == "pie_bench":
        names = [name for name in MEASURES if rows and name in rows[0] and not name.startswith("judge_")]
        return {"pie_bench.csv": pie_csv({method: _of(rows, method) for method in methods}, names)}
    files: dict[str, bytes] = {}
    if not config.official_layout or not official_of(config, rows, methods):
        return files
    assert config.judge is not None, "there are no aggregates without one"
    for method in methods:
        some = _of(rows, method)
        judge = _as_folder(config.judge.model)
        more = gedit_files(method, judge, some) if kind == "gedit_bench" else imgedit_files(method, some)
        files |= {f"{FOLDERS[kind]}/{path}": data for path, data in more.items()}
    return files


def _as_folder(name: str) -> str:
    """A model's name as that of one folder."""
    return "".join(char if char.isalnum() or char in "-_" else "_" for char in name) or "judge"


def _of(rows: Rows, method: str) -> Rows:
    return [row for row in rows if row["method"] == method]
