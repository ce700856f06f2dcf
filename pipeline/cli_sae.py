"""The commands `shardedit sae`: collect, train, label, score, layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.common.partition import Partition
from pipeline.looking.ending import reported
from pipeline.looking.printing import out, show_summary

sae = typer.Typer(
    name="sae",
    help="Sparse autoencoders of what the network's blocks write: collect, train, label, score, layout.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings to change.", show_default=False),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


@sae.command()
def collect(
    config: Config,
    overrides: Overrides = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do units with failed rows again; good rows keep their bytes.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with exit code 3 where any row failed, not only too many.")
    ] = False,
    partition: Annotated[
        str, typer.Option("--partition", metavar="I/N", help="Every Nth shard alone.", show_default=False)
    ] = "0/1",
    debug: Debug = False,
) -> None:
    """Sample images, and keep what the network's blocks wrote: a recipe with editing.record. Resumes as `edit` does."""
    try:
        part = Partition.parsed(partition)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--partition") from error
    with reported(debug):
        from pipeline.errors import RecipeError
        from pipeline.recipe import load_recipe

        recipe = load_recipe(config, overrides or [])
        if not recipe.recorded:
            text = "records nothing. Set editing.method concepts, and editing.record with the blocks"
            raise RecipeError(str(config), [("editing.record", text)])
        from pipeline.running.driver import run

        summary = run(recipe, retry_failed=retry_failed, strict=strict, partition=part)
        show_summary(summary, recipe)
        raise typer.Exit(summary.exit_code)


@sae.command()
def train(config: Config, overrides: Overrides = None, debug: Debug = False) -> None:
    """Train an autoencoder for each block, time and branch that was collected. Goes on where an earlier one stopped."""
    with reported(debug):
        from pipeline.settings.configuration import load_config
        from pipeline.studies.sae.config import TrainConfig
        from pipeline.studies.sae.show import trained_text

        settings = load_config(TrainConfig, config, overrides or [])
        from pipeline.studies.sae.training import run_training

        out.print(trained_text(run_training(settings)), markup=False)


@sae.command()
def label(config: Config, overrides: Overrides = None, debug: Debug = False) -> None:
    """Name features by the regions that they cover in images of known content: dictionary, concepts, gallery."""
    with reported(debug):
        from pipeline.settings.configuration import load_config
        from pipeline.studies.sae.config import LabelConfig
        from pipeline.studies.sae.show import labelled_text

        settings = load_config(LabelConfig, config, overrides or [])
        from pipeline.studies.sae.labelling import label as name_features

        out.print(labelled_text(name_features(settings)), markup=False)


@sae.command()
def score(config: Config, overrides: Overrides = None, debug: Debug = False) -> None:
    """Say how much of the network's prediction is left where a block's write is what its codes make of it."""
    with reported(debug):
        from pipeline.settings.configuration import load_config
        from pipeline.studies.sae.config import ScoreConfig
        from pipeline.studies.sae.show import score_text

        settings = load_config(ScoreConfig, config, overrides or [])
        from pipeline.studies.sae.scoring import score as score_library

        out.print(score_text(score_library(settings)), markup=False)


@sae.command()
def layout(config: Config, overrides: Overrides = None, debug: Debug = False) -> None:
    """Say how early the layout of an image is told by its concepts: a table, a plot."""
    with reported(debug):
        from pipeline.settings.configuration import load_config
        from pipeline.studies.sae.config import LayoutConfig
        from pipeline.studies.sae.show import layout_text

        settings = load_config(LayoutConfig, config, overrides or [])
        from pipeline.studies.sae.layout import compare_layouts

        out.print(layout_text(compare_layouts(settings)), markup=False)
