"""The commands over sets of edit pairs: `shardedit audit`."""

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
