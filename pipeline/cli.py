"""The command `shardedit`. Parses, calls, prints, and turns errors into exit codes; the work is done elsewhere.

Torch and Ray take seconds to import: what needs them is imported by the command that does, so that help is instant.
Exit codes: 0 clean, 1 failed or stopped early, 2 a recipe that cannot work, 3 done with failed rows, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import pipeline
from pipeline.errors import ShardeditError

if TYPE_CHECKING:
    from pipeline.planning import Plan
    from pipeline.recipe import SinkConfig
    from pipeline.writing.summary import Summary

INTERRUPTED = 130  # what shells expect of a command that Ctrl-C ended

app = typer.Typer(
    name="shardedit",
    help="Edit image datasets with diffusion models: shards in, edited images and masks out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Addresses and paths are copied from the terminal: nothing is wrapped or coloured inside a line of them.
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings to change, e.g. run.seed=7.", show_default=False),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Errors of ours print as themselves, in a few lines; others name a file with the traceback. Then the exit code."""
    try:
        yield
    except ShardeditError as error:
        if debug:
            traceback.print_exc()
        say_error(f"{type(error).__name__}: {error}")
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        say_error("Interrupted. What is committed stays: the same command goes on from there.")
        raise typer.Exit(INTERRUPTED) from error
    except typer.Exit:
        raise
    except Exception as error:
        text = traceback.format_exc()
        if debug:
            sys.stderr.write(text)
        say_error(
            f"{type(error).__name__}: {first_line(error)}\nThis is a fault of shardedit, not of your data or recipe."
        )
        if not debug:
            say_error(f"The full traceback is in {keep(text)} (or add --debug).")
        raise typer.Exit(1) from error


def say_error(text: str) -> None:
    """Print to stderr, as is: a message may hold brackets, which are no markup."""
    err.print(text, markup=False)


def first_line(error: BaseException) -> str:
    """An error's message without what libraries append to it."""
    return next(iter(str(error).strip().splitlines()), "")[:500]


def keep(text: str) -> str:
    """Write a traceback to a file of its own, readable by this user alone."""
    handle, path = tempfile.mkstemp(prefix="shardedit-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        print(f"shardedit {pipeline.__version__}")
        raise typer.Exit


@app.callback()
def shardedit(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Edit image datasets with diffusion models: shards in, edited images and masks out."""


@app.command()
def edit(config: Config, overrides: Overrides = None, debug: Debug = False) -> None:
    """Edit every image of a dataset. The same command goes on where an earlier one stopped."""
    with reported(debug):
        from pipeline.recipe import load_recipe

        recipe = load_recipe(config, overrides or [])
        # Only a recipe that can work pays for starting Ray.
        from pipeline.cluster import run

        summary = run(recipe)
        show_summary(summary, recipe.sink)
        raise typer.Exit(summary.exit_code)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    probe: Annotated[bool, typer.Option(help="Time the model on two images; without, no time is estimated.")] = True,
    debug: Debug = False,
) -> None:
    """Say what a run would take: images, results, UNet rows, bytes, time. Nothing is edited or written."""
    with reported(debug):
        from pipeline.recipe import load_recipe

        recipe = load_recipe(config, overrides or [])
        from pipeline import planning

        made = planning.plan(recipe, probe=probe)
        if as_json:
            print(json.dumps(made.as_dict(), indent=1))
        else:
            show_plan(made, str(config))


@app.command()
def report(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A run's folder (sink.folder), a path or URL.")],
    debug: Debug = False,
) -> None:
    """Write report.html of a run again, finished or not."""
    with reported(debug):
        from pipeline.evaluation.report import write_report

        out.print(write_report(folder), markup=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the drawn input and the results.")] = Path("demo-output"),
    images: Annotated[int, typer.Option(min=1, max=10_000, help="How many images to draw.")] = 24,
    debug: Debug = False,
) -> None:
    """Draw a small dataset and edit it with the bundled model: the whole product, without a GPU or a download."""
    with reported(debug):
        from pipeline.demo import demo_recipe, run_demo

        summary = run_demo(output, images)
        if summary.units_now == 0:
            out.print("Nothing left to do: everything that the demo asks for is there.")
        show_summary(summary, demo_recipe(output).sink)
        out.print(f"Open {output / 'report.html'} in a browser, or look at {output / 'overview.png'}.", markup=False)
        raise typer.Exit(summary.exit_code)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors that complete and check YAML."""
    from pipeline.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=1))


@app.command()
def methods() -> None:
    """List inversions and editors: where they come from, which fit together, their settings."""
    from pipeline.editing import EDITORS
    from pipeline.inversion import INVERSIONS

    inversions = method_table("inversion.method")
    for name, inversion in INVERSIONS.items():
        about = f"records {listed(inversion.records)}; replays {inversion.exact}\n{inversion.paper}"
        inversions.add_row(name, defaults_of(inversion), about)
    editors = method_table("editing.method")
    for name, editor in EDITORS.items():
        fitting = [key for key, inversion in INVERSIONS.items() if editor.reads <= inversion.records]
        about = f"reads {listed(editor.reads)}; goes with {', '.join(fitting)}\n{editor.paper}"
        editors.add_row(name, defaults_of(editor), about)
    for table in (inversions, editors):
        Console(highlight=False).print(table)


def method_table(title: str) -> Table:
    """An empty table of methods."""
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    table.add_column("method", no_wrap=True)
    table.add_column("settings and defaults", no_wrap=True)
    table.add_column("about", overflow="fold")
    return table


def listed(names: frozenset[str]) -> str:
    """Names in a fixed order."""
    return ", ".join(sorted(names))


def defaults_of(method: Any) -> str:
    """A method's settings with their defaults, one to a line."""
    fields = method.model_fields.items()
    return "\n".join(f"{name}: {field.default}" for name, field in fields if name != "method")


def show_summary(summary: Summary, sink: SinkConfig) -> None:
    """The end of a run, as a person reads it."""
    from pipeline.evaluation.report import count, size_text
    from pipeline.reading.storage import public_url

    folder = public_url(sink.folder).rstrip("/")
    rows = {
        "done": f"{summary.done:,} of {count(summary.planned, 'result')} from {count(summary.images, 'image')}",
        "failed": f"{summary.failed:,}" if summary.failed else "none",
    }
    if summary.failed:
        rows["  by stage"] = counted(summary.failed_by_stage)
        rows["  by reason"] = counted(summary.failed_by_class)
        rows["  kept in"] = f"{folder}/quarantine"
    speed = f"{summary.images_per_second:.3g} images/s, " if summary.images_per_second else ""
    rows["pace"] = f"{speed}{summary.unet_rows:,} UNet rows in {duration(summary.seconds)}"
    rows["written"] = f"{size_text(summary.output_bytes)} in {count(summary.units, 'unit')} ({summary.units_now:,} now)"
    rows["results"] = f"{folder}/data"
    rows["report"] = f"{folder}/report.html"
    show_rows(rows)
    if not summary.complete:
        out.print("Stopped early: the same command goes on from here.")


def show_plan(made: Plan, config: str) -> None:
    """A plan, as a person reads it."""
    from pipeline.evaluation.report import count, size_text

    per_image = made.unet_rows / made.images if made.images else 0.0
    edits = ", ".join(made.edits) if made.edits else "those of the rows"
    rows = {
        "images": f"{made.images:,} in {count(made.shards, 'shard')}, {size_text(made.bytes_in)}",
        "edits": f"{edits}, by {', '.join(made.methods)}",
        "results": f"{made.results:,}",
        "UNet rows": f"{made.unet_rows:,}, {per_image:.1f} per image",
    }
    if made.bytes_out is not None:
        rows["output"] = f"about {size_text(made.bytes_out)}"
    if made.seconds is not None and made.probe is not None:
        rows["time"] = f"about {duration(made.seconds)} on {count(made.workers, 'worker')} ({made.probe.device})"
    show_rows(rows)
    for note in made.notes:
        out.print(f"  {note}", style="dim", markup=False)
    out.print(f"Nothing was written. To run it: shardedit edit {config}", markup=False)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    app(args=None if arguments is None else list(arguments))


if __name__ == "__main__":
    main()
