"""What `shardedit evaluate` prints."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from pipeline.common.showing import public_url
from pipeline.common.wording import count
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.job.counted import counts_of
from pipeline.evaluation.job.run import evaluate
from pipeline.evaluation.set_files import FOLDER
from pipeline.evaluation.tables import Tables, grid
from pipeline.looking.printing import out


def show(config: EvaluateConfig, *, plan_only: bool, retry_failed: bool) -> int:
    """Do it, or count it; returns the exit code."""
    if plan_only:
        show_counts(config)
        return 0
    done = evaluate(config, retry_failed=retry_failed)
    show_tables(done.tables)
    folder = f"{public_url(done.folder).rstrip('/')}/{FOLDER}"
    measured = f"{count(done.units, 'unit')} ({done.units_now} now)"
    asked = f", {count(done.requests, 'request')} to the judge" if config.judge else ""
    out.print(f"Measured {measured}{asked}. Tables: {folder}/table.md, page: {folder}/index.html", markup=False)
    return done.exit_code


def show_counts(config: EvaluateConfig) -> None:
    """What it would take."""
    found = counts_of(config)
    excluded = ", ".join(f"{number} {name}" for name, number in found.excluded.items())
    out.print(f"items          {found.items:,}" + (f" (excluded: {excluded})" if excluded else ""), markup=False)
    out.print(f"results        {found.results:,}", markup=False)
    if found.network_rows is not None:
        alone = f" (one method after the other: {found.network_rows_alone:,})" if found.network_rows_alone else ""
        out.print(f"network rows   {found.network_rows:,}{alone}", markup=False)
    if found.questions:
        out.print(f"judge          {found.questions:,} questions, each one request at least", markup=False)


def show_tables(tables: Tables) -> None:
    """The comparison, and what it leaves out."""
    heads, rows = grid(tables)
    shown = Table(title=tables.title, title_justify="left")
    for head in heads:
        shown.add_column(head)
    styles = {"best": "bold", "near": "underline", "": ""}
    for row in rows:
        shown.add_row(*(Text(text.replace("`", ""), style=styles[mark]) for text, mark in row))
    out.print(shown)
    for method in tables.methods:
        for name, number in tables.reasons[method].items():
            out.print(f"{method}: {number} of {tables.asked[method]} without a number: {name}", markup=False)
    for name, text in tables.unavailable.items():
        out.print(f"unavailable: {name}: {text}", markup=False)
    for remark in tables.remarks:
        out.print(remark, markup=False)
