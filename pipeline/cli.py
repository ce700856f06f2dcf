"""The command `shardedit`. Parses, calls, prints, and turns errors into exit codes; the work is done elsewhere.

Torch and Ray take seconds to import: what needs them is imported by the command that does, so that help is instant.
Exit codes: 0 done, 1 failed or stopped early, 2 a recipe that cannot work, 3 done with failed results under --strict,
128 and the signal's number where one stopped it. docs/commands.md says them all.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import pipeline
from pipeline.cli_sae import sae
from pipeline.common.partition import WHOLE, Partition
from pipeline.common.showing import typed
from pipeline.looking.ending import reported
from pipeline.looking.printing import (
    PlainFormatter,
    out,
    say_error,
    show_comparison,
    show_inspection,
    show_methods,
    show_plan,
    show_status,
    show_summary,
    whole_streams,
)
from pipeline.models.allocator import keep_freed_memory
from pipeline.pairs_cli import audit, export

app = typer.Typer(
    name="shardedit",
    help="Edit image datasets with diffusion models: shards in, edited images and masks out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(sae)
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings to change, e.g. run.seed=7.", show_default=False),
]
Where = Annotated[
    str,
    typer.Argument(
        metavar="OUT_OR_CONFIG",
        help="A run's folder (path or URL); or its recipe, with settings to change as in `edit`.",
        show_default=False,
    ),
]
PartitionOption = Annotated[
    str,
    typer.Option(
        "--partition",
        metavar="I/N",
        help="Every Nth shard alone, from the Ith on (from 0), beside commands that do the others.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


def parsed_partition(text: str) -> Partition:
    """What was typed after --partition."""
    try:
        return Partition.parsed(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--partition") from error


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
def edit(
    config: Config,
    overrides: Overrides = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Edit units with failed results again; good rows keep their bytes.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with exit code 3 where any result failed, not only too many.")
    ] = False,
    partition: PartitionOption = "0/1",
    debug: Debug = False,
) -> None:
    """Edit every image of a dataset. The same command goes on where an earlier one stopped."""
    part = parsed_partition(partition)
    with reported(debug):
        from pipeline.recipe import load_recipe

        recipe = load_recipe(config, overrides or [])
        # Only a recipe that can work pays for starting Ray.
        from pipeline.running.driver import run

        summary = run(recipe, retry_failed=retry_failed, strict=strict, partition=part)
        show_summary(summary, recipe)
        raise typer.Exit(summary.exit_code)


@app.command()
def evaluate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The evaluation, a YAML file.", show_default=False)],
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Count what it would take; edit and ask nothing.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Edit, measure and judge units with failures again.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Compare methods on a benchmark or a set of your own: edit, measure, judge, print a table."""
    with reported(debug):
        from pipeline.evaluation.config import load_evaluation

        settings = load_evaluation(config, overrides or [])
        from pipeline.evaluation.job.show import show

        raise typer.Exit(show(settings, plan_only=plan, retry_failed=retry_failed))


@app.command()
def basis(
    config: Config,
    overrides: Overrides = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do units with failed rows again; good rows keep their bytes.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with exit code 3 where any row failed, not only too many.")
    ] = False,
    partition: PartitionOption = "0/1",
    debug: Debug = False,
) -> None:
    """Find every image's local latent basis: the recipe of a `riemannian` edit, with rows of vectors for images."""
    edit(config, [*(overrides or []), "job=basis"], retry_failed, strict, partition, debug)


@app.command()
def geometry(
    config: Config, overrides: Overrides = None, partition: PartitionOption = "0/1", debug: Debug = False
) -> None:
    """Compare local bases: distances, spectra, transport, mean directions; as tables and pictures."""
    part = parsed_partition(partition)
    with reported(debug):
        from pipeline.settings.configuration import load_config
        from pipeline.studies.config import GeometryConfig

        settings = load_config(GeometryConfig, config, overrides or [], "geometry")
        from pipeline.studies.geometry import compare
        from pipeline.studies.show import text_of

        out.print(text_of(compare(settings, partition=part)), markup=False)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    as_json: AsJson = False,
    probe: Annotated[bool, typer.Option(help="Time the model on two images; without, no time is estimated.")] = True,
    partition: PartitionOption = "0/1",
    debug: Debug = False,
) -> None:
    """Say what a run would take: images, results, network rows, bytes, time. Nothing is edited or written."""
    part = parsed_partition(partition)
    with reported(debug):
        from pipeline.recipe import load_recipe

        recipe = load_recipe(config, overrides or [])
        from pipeline.looking import planning

        made = planning.plan(recipe, probe=probe, partition=part)
        if as_json:
            print(json.dumps(made.as_dict(), indent=1))
        else:
            here = "" if part == WHOLE else f" --partition {part}"
            show_plan(made, typed(str(config), overrides or []) + here)


@app.command()
def status(where: Where, overrides: Overrides = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Say how far a run is, what failed and where. Reads the run's manifests; it may be at work meanwhile."""
    with reported(debug):
        from pipeline.looking.runs import find_run

        run = find_run(where, overrides or [])
        from pipeline.looking.status import status as look

        found = look(run.sink, run.record)
        if as_json:
            print(json.dumps(found.as_dict(), indent=1))
        else:
            show_status(found, run.config)


@app.command()
def verify(
    where: Where,
    overrides: Overrides = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take back damaged units and remove stray files, for `edit` to make again.")
    ] = False,
    no_source: Annotated[
        bool, typer.Option("--no-source", help="Do not list the source, e.g. where it is no longer there.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check that a run's output is whole: every file read, hashed and opened, every result of the source there once."""
    with reported(debug):
        from pipeline.looking.runs import find_run

        run = find_run(where, overrides or [])
        from pipeline.looking.verify import verify as check

        source = None if no_source else run.source
        inspection = check(run.sink, run.record, repair=repair, source=source, source_is_needed=run.by_recipe)
        if as_json:
            print(json.dumps(inspection.as_dict(), indent=1))
        else:
            show_inspection(inspection, run)
        raise typer.Exit(0 if inspection.clean else 1)


@app.command()
def regenerate(
    where: Where,
    key: Annotated[str, typer.Argument(help="Id of a row, or its key where one row has it.", show_default=False)],
    overrides: Overrides = None,
    edit: Annotated[str | None, typer.Option(help="Which edit, where the row has several.")] = None,
    method: Annotated[str | None, typer.Option(help="Which method, where the recipe has several.")] = None,
    attempt: Annotated[int | None, typer.Option(help="Which of several attempts; else the chosen one.")] = None,
    debug: Debug = False,
) -> None:
    """Make one result again from the source, the recipe and its seed, and compare the bytes. Writes nothing."""
    with reported(debug):
        from pipeline.looking.runs import find_run

        run = find_run(where, overrides or [])
        from pipeline.looking.regenerate import regenerate as make

        made = make(run, key, edit=edit, method=method, attempt=attempt)
        show_comparison(made)
        raise typer.Exit(0 if made.equal else 1)


@app.command()
def report(
    where: Where,
    overrides: Overrides = None,
    results: Annotated[
        str | None,
        typer.Option(metavar="NUMBER|all", help="How many results to show with pictures, about, or all. Else 1000."),
    ] = None,
    score_model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER_OR_HUB_ID", help="A CLIP that says how near each edit is to what was asked for."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the report of a run again, finished or not: did the edits happen, did the rest stay?"""
    if results not in (None, "all") and not (results.isascii() and results.isdigit() and int(results) > 0):
        raise typer.BadParameter("give a number above 0, or all", param_hint="--results")
    with reported(debug):
        from pipeline.looking.runs import find_run

        run = find_run(where, overrides or [])
        from pipeline.looking.report.page import MAX_RESULTS, write_report
        from pipeline.models.image_text import load_image_text

        model = load_image_text(score_model) if score_model is not None else None
        most = None if results == "all" else int(results or MAX_RESULTS)
        out.print(write_report(run.sink, results=most, score_model=model), markup=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the drawn input and the results.")] = Path("demo-output"),
    images: Annotated[int, typer.Option(min=1, max=10_000, help="How many images to draw.")] = 24,
    debug: Debug = False,
) -> None:
    """Draw a small dataset and edit it with the bundled model, which knows drawn faces only. No GPU, no download."""
    with reported(debug):
        from pipeline.running.demo import demo_recipe, run_demo

        summary = run_demo(output, images)
        if summary.units_now == 0:
            out.print("Nothing left to do: everything that the demo asks for is there.")
        show_summary(summary, demo_recipe(output))
        out.print(f"Open {output / 'report.html'} in a browser, or look at {output / 'overview.png'}.", markup=False)
        raise typer.Exit(summary.exit_code)


@app.command("check-model")
def check_model(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="demo, a folder, or a hub id.")] = "demo",
    overrides: Overrides = None,
    image: Annotated[Path | None, typer.Option(help="A photograph of yours; none: a drawn face.")] = None,
    prompt: Annotated[
        str, typer.Option(help="What to add or remove: 'add a hat', 'remove the hat'.")
    ] = "add sunglasses",
    steps: Annotated[int, typer.Option(min=2, max=500, help="Of inversions and edit.")] = 20,
    output: Annotated[Path, typer.Option("--out", help="Folder for the page and the JSON.")] = Path("model-check"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; none: the GPU where there is one.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 1 for warnings, too.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say whether a model can be used: what it offers, round trips, agreement with diffusers, an edit, speed."""
    with reported(debug):
        from pipeline.looking.check_model.show import check_and_show

        raise typer.Exit(
            check_and_show(
                name,
                overrides or [],
                output,
                image=image,
                prompt=prompt,
                num_steps=steps,
                device=device,
                strict=strict,
                as_json=as_json,
            )
        )


@app.command()
def schema(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As tables for people: docs/recipe.md.")] = False,
) -> None:
    """Print the JSON schema of a recipe, for editors that complete and check YAML; every key with its description."""
    if as_markdown:
        from pipeline.settings.reference import markdown

        print(markdown())
        return
    from pipeline.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=1))


@app.command()
def config(
    name: Annotated[str | None, typer.Argument(help="Which recipe; none: list them.", show_default=False)] = None,
    debug: Debug = False,
) -> None:
    """Print a recipe to start from: `shardedit config demo > recipe.yaml`. Without a name: list the recipes."""
    with reported(debug):
        from pipeline.settings import shipped

        if name is not None:
            print(shipped.text(name), end="")
            return
        for known in shipped.names():
            out.print(f"{known}: {shipped.summary(known)}", markup=False)


@app.command()
def methods() -> None:
    """List inversions and editors: where they come from, which fit together, their settings."""
    show_methods()


app.command()(audit)
app.command()(export)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    keep_freed_memory()
    whole_streams()
    try:
        os.getcwd()
    except FileNotFoundError:  # torch's libraries end a process that has none, without a word that helps
        say_error("The folder that this process works in is gone. Change to another one, and give the command again")
        sys.exit(1)
    if logging.lastResort is not None:  # prints warnings where nobody has set up logging
        logging.lastResort.setFormatter(PlainFormatter())
    app(args=None if arguments is None else list(arguments))


if __name__ == "__main__":
    main()
