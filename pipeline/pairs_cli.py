"""The commands over sets of edit pairs: `shardedit audit`, `shardedit export`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from pipeline.looking.ending import reported


class Engine(StrEnum):
    """Where the work runs."""

    auto = "auto"
    local = "local"
    ray = "ray"


def audit(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A set of edit pairs, a path or URL.", show_default=False)
    ],
    out: Annotated[str, typer.Option(help="Folder for the page, the rows and the JSON.")] = "audit",
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE=COLUMN,...",
            help="What is what: source=...,edited=...,mask=...,prompt=...,id=...; none: told by the usual names.",
        ),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Look at about so many pairs, the same in every run; none: at all.")
    ] = None,
    engine: Annotated[Engine, typer.Option(help="auto: Ray where RAY_ADDRESS names a cluster.")] = Engine.auto,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Find what is wrong with a set of edit pairs: missing, broken, doubled, exchanged, displaced, badly masked."""
    with reported(debug):
        from pipeline.pairs.audit import AuditConfig
        from pipeline.pairs.layouts import layout_of_options
        from pipeline.pairs.show import show_audit

        layout = layout_of_options(columns) if columns is not None else None
        config = AuditConfig(url=folder, out=out, layout=layout, sample=sample, engine=engine.value)
        raise typer.Exit(show_audit(config))


class PresetChoice(StrEnum):
    """Whose columns are written."""

    instructpix2pix = "instructpix2pix"
    ip2p_original = "ip2p_original"
    magicbrush = "magicbrush"
    x2edit = "x2edit"


def export(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of finished runs, paths or URLs.", show_default=False)
    ],
    out: Annotated[str, typer.Option(help="Folder to write to, a path or URL.", show_default=False)],
    preset: Annotated[PresetChoice, typer.Option(help="Whose columns to write.")] = PresetChoice.instructpix2pix,
    validation: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of the source images that is held out, with all their edits.")
    ] = 0.02,
    shard_mb: Annotated[int, typer.Option("--shard-mb", min=1, help="Megabytes of pictures in a file, about.")] = 500,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Write the results of runs as a data set that a trainer reads. The same command goes on where one stopped."""
    with reported(debug):
        from pipeline.pairs.export import ExportConfig
        from pipeline.pairs.show import show_export

        config = ExportConfig(
            runs=tuple(runs), out=out, preset=preset.value, validation=validation, shard_bytes=shard_mb * 10**6
        )
        show_export(config)
