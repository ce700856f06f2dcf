"""What the commands print, as a person reads it: summaries, states, inspections, plans, methods.

Torch and Ray take seconds to import: what needs them is imported in the functions that do.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from pipeline.common.showing import printable, without_credentials

if TYPE_CHECKING:
    from pipeline.looking.planning import Plan
    from pipeline.looking.regenerate import Comparison
    from pipeline.looking.runs import Run
    from pipeline.looking.status import Status
    from pipeline.looking.verify import Inspection
    from pipeline.recipe import Recipe
    from pipeline.writing.manifest import GateCounts
    from pipeline.writing.summary import Summary


BUSY = 0.9  # share of a worker's time in which its model should have work
LONG_S = 60.0  # of workers' time: a shorter run spends much of it on its beginning and end


class PlainConsole(Console):
    """A console that shows strangers' control characters as escapes, wherever a text comes from."""

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        """A text as it is shown."""
        return super().render_str(printable(text), **options)

    @override
    def on_broken_pipe(self) -> None:
        """Called when the reader has gone. The error passes: the command ends by it, not with rich's own code."""
        raise


class PlainFormatter(logging.Formatter):
    """The same for what is logged, tracebacks included; addresses in it carry no credentials."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        """A record as it is shown."""
        return printable(without_credentials(super().format(record)))


# Addresses and paths are copied from the terminal: nothing is wrapped or coloured inside a line of them.
out = PlainConsole(highlight=False, soft_wrap=True)
err = PlainConsole(stderr=True, highlight=False, soft_wrap=True)


def say_error(text: str) -> None:
    """Print to stderr, as is: a message may hold brackets, which are no markup."""
    err.print(text, markup=False)


def show_summary(summary: Summary, recipe: Recipe) -> None:
    """The end of a run, as a person reads it."""
    from pipeline.common.showing import public_url
    from pipeline.common.wording import count, size_text
    from pipeline.remote.pictures import spent_in_words

    folder = public_url(recipe.sink.folder).rstrip("/")
    rows = {
        "done": f"{summary.done:,} of {count(summary.planned, 'result')} from {count(summary.images, 'image')}",
        "failed": "none",
    }
    if summary.gates:
        rows |= gate_lines(summary.gates, summary.rejected, f"{folder}/rejected")
    if summary.failed:
        budget = f"run.max_failed_fraction {recipe.run.max_failed_fraction:g}"
        rows["failed"] = f"{summary.failed:,} of {summary.planned:,}, within the error budget ({budget})"
        rows["  by stage"] = counted(summary.failed_by_stage)
        rows["  by reason"] = counted(summary.failed_by_class)
        rows["  kept in"] = f"{folder}/quarantine"
    if summary.spent:
        rows["servers"] = spent_in_words(summary.spent)
    speed = f"{summary.images_per_second:.3g} images/s, " if summary.images_per_second else ""
    rows["pace"] = f"{speed}{summary.network_rows:,} network rows in {duration(summary.seconds)}"
    # A run that asks servers waits for these.
    if (
        not summary.spent
        and summary.worker_seconds > LONG_S
        and (share := summary.busy_seconds / summary.worker_seconds) < BUSY
    ):
        rows["limit"] = f"processors: the model had work for {share:.0%} of that time. Give a worker more CPUs"
    rows["written"] = f"{size_text(summary.output_bytes)} in {count(summary.units, 'unit')} ({summary.units_now:,} now)"
    rows["results"] = f"{folder}/data"
    rows["report"] = f"{folder}/report.html"
    show_rows(rows)
    if summary.outcome == "partition complete":
        out.print("Shards of other partitions are left: the last one to end merges, and writes summary and report.")
    elif not summary.complete:
        out.print("Stopped early: the same command goes on from here.")


def show_status(found: Status, config: str) -> None:
    """How far a run is, as a person reads it."""
    from pipeline.common.wording import count, size_text
    from pipeline.remote.pictures import spent_in_words

    so_far = found.so_far
    about = "about " if found.planned_is_estimate else ""
    planned = "an unknown number of" if found.planned is None else f"{about}{found.planned:,}"
    table = Table(title=found.folder, title_justify="left", title_style="bold", show_header=False)
    table.add_row("done", f"{so_far.done:,} of {planned} results, from {count(so_far.images, 'image')}")
    table.add_row("failed", f"{so_far.failed:,}" if so_far.failed else "none")
    if so_far.gates:
        for name, text in gate_lines(so_far.gates, so_far.rejected).items():
            table.add_row(name, text)
    if so_far.failed:
        table.add_row("  by stage", counted(so_far.failed_by_stage))
        table.add_row("  by reason", counted(so_far.failed_by_class))
    table.add_row(
        "committed", f"{count(so_far.units, 'unit')}, {found.shards_done:,} of {count(found.shards, 'shard')}"
    )
    if so_far.spent:
        table.add_row("servers", spent_in_words(so_far.spent))
    speed = f"{so_far.images_per_second:.3g} images/s, " if so_far.images_per_second else ""
    table.add_row("pace", f"{speed}{so_far.network_rows:,} network rows in {duration(so_far.seconds)}")
    table.add_row("written", size_text(so_far.output_bytes))
    out.print(table)
    for shard, number, file in found.worst_shards:
        out.print(f"{number:,} failed in {shard}, the first of them in {file}", markup=False)
    for row in found.failures:
        what = ", ".join(name for name in (row["id"], row["edit"], row["method"]) if name)
        out.print(f"  {what}: {row['stage']}: {row['error_class']}: {first_words(row['message'])}", markup=False)
    if not so_far.complete:
        out.print(f"Not complete. To go on: shardedit edit {config}", markup=False)
    elif so_far.failed:
        out.print(f"To try the failed ones again: shardedit edit {config} --retry-failed", markup=False)


def gate_lines(gates: Mapping[str, GateCounts], rejected: int, folder: str = "") -> dict[str, str]:
    """The survival table: what passed every gate, and what it saw."""
    from pipeline.writing.gate_counts import seen_in_words

    rows = {"rejected": f"{rejected:,} by gates" + (f", kept in {folder}" if folder else "")}
    for name, gate in gates.items():
        judged = gate.passed + gate.rejected
        share = f"{gate.passed:,} of {judged:,} passed ({gate.passed / judged:.0%})" if judged else "judged nothing"
        alone = f"; {gate.alone:,} rejected by it alone" if gate.alone else ""
        undefined = f"; undefined for {gate.undefined:,}" if gate.undefined else ""
        rows[f"  {name}"] = f"{share}{alone}{undefined}; seen {seen_in_words(gate)}"
    return rows


def first_words(message: str) -> str:
    """A stored reason in one line of bounded length."""
    return " ".join(message.split())[:160]


def show_inspection(inspection: Inspection, run: Run) -> None:
    """What is wrong, where, and what puts it right."""
    from pipeline.common.wording import count, size_text

    for finding in inspection.findings:
        out.print(f"{finding.kind}: {finding.path}: {finding.text}", markup=False)
    if inspection.wrong > len(inspection.findings):
        out.print(f"... and {inspection.wrong - len(inspection.findings):,} more: {counted(inspection.by_kind)}")
    looked = (
        f"{count(inspection.units, 'unit')}, {count(inspection.files, 'file')}, {size_text(inspection.bytes)}; "
        f"{inspection.done:,} results in data/, "
        + (f"{inspection.rejected:,} in rejected/, " if inspection.rejected else "")
        + f"{inspection.failed:,} in quarantine/"
    )
    if inspection.temporary:
        found = count(inspection.temporary, "temporary file")
        out.print(f"Note: a killed run left {found}, which nothing reads; `shardedit edit` removes what is a day old.")
    if inspection.left_out:
        out.print(f"Note: of the source {inspection.left_out}.", markup=False)
    if inspection.clean:
        out.print(f"{'Whole' if inspection.source_was_listed else 'Whole as far as run.json tells'}: {looked}.")
    else:
        out.print(f"{count(inspection.wrong, 'problem')} in {looked}.")
    if not inspection.source_was_listed:
        why = inspection.source_unreachable or "it was not listed. Give the recipe, which says how to open it"
        out.print(f"Not checked against the source: {why}", markup=False)
    if inspection.repairs:
        does = "Repaired" if inspection.repaired else "--repair would"
        out.print(f"{does}: {', '.join(inspection.repairs)}.", markup=False)
    if inspection.clean or not inspection.edit_repairs:
        return
    # Not "&&": a repair ends with 1 as well, for what it found.
    steps = [f"shardedit verify {run.where} --repair; "] if inspection.needs_repair and not inspection.repaired else []
    out.print(f"To repair: {''.join(steps)}shardedit edit {run.config}", markup=False)


def show_plan(made: Plan, config: str) -> None:
    """A plan, as a person reads it."""
    from pipeline.common.wording import count, size_text

    per_image = made.network_rows / made.images if made.images else 0.0
    edits = ", ".join(made.edits) if made.edits else "those of the rows"
    rows = {
        "images": f"{made.images:,} in {count(made.shards, 'shard')}, {size_text(made.bytes_in)}",
        "edits": f"{edits}, by {', '.join(made.methods)}",
        "results": f"{made.results:,}",
        "network rows": f"{made.network_rows:,}, {per_image:.1f} per image",
    }
    if made.requests is not None:
        most = "" if made.cost_at_most is None else f", cost {made.cost_at_most:,.2f} at most"
        rows["requests"] = f"{made.requests:,} to servers{most}"
    if made.bytes_out is not None:
        rows["output"] = f"about {size_text(made.bytes_out)}"
    if made.seconds is not None and made.probe is not None:
        rows["time"] = f"about {duration(made.seconds)} on {count(made.workers, 'worker')} ({made.probe.device})"
    show_rows(rows)
    for note in made.notes:
        out.print(f"  {note}", style="dim", markup=False)
    out.print(f"Nothing was written. To run it: shardedit edit {config}", markup=False)


def show_comparison(made: Comparison) -> None:
    """A result that was made again beside the stored one."""
    out.print(f"{made.id}, {made.edit}, {made.method} in {made.file}, row {made.row}", markup=False)
    for line in made.did:
        out.print(f"  {line}", markup=False)
    for line in made.changed:
        out.print(f"  changed since: {line}", markup=False)
    for line in made.differences:
        out.print(f"  differs: {line}", markup=False)
    out.print("  equal in every byte" if made.equal else "  not equal")


def show_methods() -> None:
    """All inversions and editors as tables."""
    from pipeline.editing import EDITORS
    from pipeline.inversion import INVERSIONS

    inversions = method_table("inversion.method")
    for name, inversion in INVERSIONS.items():
        about = f"replays {inversion.exact}\n{inversion.paper}"
        inversions.add_row(name, defaults_of(inversion), about)
    editors = method_table("editing.method")
    for name, editor in EDITORS.items():
        fitting = [key for key, inversion in INVERSIONS.items() if editor.fits(inversion)]
        about = f"goes with {', '.join(fitting)}\n{editor.paper}"
        editors.add_row(name, defaults_of(editor), about)
    for table in (inversions, editors):
        Console(highlight=False).print(table)
    out.print(
        "All but endpoint, which asks a server, and instruct, whose model reads the image, work with the bundled model "
        "(model.name: demo), which knows drawn faces only, and with any Stable Diffusion 1.x or 2.x checkpoint. "
        "Settings for parity with published code are left out: `shardedit schema --markdown` ends with them.",
        markup=False,
    )


def method_table(title: str) -> Table:
    """An empty table of methods."""
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    table.add_column("method", no_wrap=True)
    table.add_column("settings and defaults", overflow="fold", width=30)
    table.add_column("about", overflow="fold")
    return table


def defaults_of(method: Any) -> str:
    """A method's settings with their defaults, one to a line; those for parity with published code are left out."""
    from pipeline.compat import SETTINGS

    fields = dict(method.model_fields)
    left_out = ("method", *SETTINGS.get(fields["method"].default, ()))
    return "\n".join(f"{name}: {field.default}" for name, field in fields.items() if name not in left_out)


def show_rows(rows: dict[str, str]) -> None:
    """Names and values, aligned."""
    width = max(map(len, rows))
    for name, value in rows.items():
        out.print(f"  {name:<{width}}  {value}", markup=False)


def counted(numbers: dict[str, int]) -> str:
    """ "decode 2, edit 1"."""
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items())


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def whole_streams() -> None:
    """See that the standard streams are open, and that what is printed on them can be.

    A file that is opened while one of them is closed would take its number, and what native code prints would land in
    it. And a terminal of an older encoding lacks most languages' letters: these are shown as escapes.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  it lives as long as we do
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
