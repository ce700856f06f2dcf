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
    ultraedit = "ultraedit"
    ultraedit_region = "ultraedit_region"
    magicbrush = "magicbrush"
    imgedit = "imgedit"
    x2edit = "x2edit"
    webdataset = "webdataset"
    preference = "preference"
    diffusion_dpo = "diffusion_dpo"


class End(StrEnum):
    """Of a score."""

    HIGHER = "higher"
    LOWER = "lower"


SIGNED = "a PEM file. With the other one, every result is signed (C2PA; needs shardedit[c2pa])."


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
    mask_rle: Annotated[
        bool, typer.Option("--mask-rle", help="Add a column `mask_rle`: masks as COCO's run lengths.")
    ] = False,
    with_rejected: Annotated[
        bool, typer.Option("--with-rejected", help="Export what gates rejected, too, with columns that say so.")
    ] = False,
    score: Annotated[
        str | None,
        typer.Option(metavar="FIGURE", help="Of pairs: the figure that tells better from worse; none: gates."),
    ] = None,
    better: Annotated[
        End | None, typer.Option(help="Of pairs: the better end of --score, where it is not known.")
    ] = None,
    min_margin: Annotated[float, typer.Option(help="Of pairs: how far apart both must be, in the score's unit.")] = 0.0,
    license: Annotated[str | None, typer.Option(metavar="ID", help="Licence of the set, such as cc-by-4.0.")] = None,
    title: Annotated[str | None, typer.Option(help="Of the set, for its card.")] = None,
    source: Annotated[str | None, typer.Option(metavar="TEXT", help="Where the input images are from.")] = None,
    push_to: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Push to this dataset of the hub, in one commit.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Of a dataset that --push-to makes.")] = False,
    sign_certificates: Annotated[str | None, typer.Option(metavar="FILE", help=f"Certificates, {SIGNED}")] = None,
    sign_key: Annotated[str | None, typer.Option(metavar="FILE", help=f"Private key, {SIGNED}")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Write the results of runs as a data set that a trainer reads. The same command goes on where one stopped."""
    with reported(debug):
        from pipeline.errors import RecipeError
        from pipeline.pairs.export import ExportConfig
        from pipeline.pairs.export_card import Said
        from pipeline.pairs.hub import Push
        from pipeline.pairs.show import show_export
        from pipeline.pairs.signing import Signing

        if (sign_certificates is None) != (sign_key is None):
            raise RecipeError("export", [("sign", "takes both --sign-certificates and --sign-key")])
        signing = None
        if sign_certificates is not None and sign_key is not None:
            signing = Signing(certificates=sign_certificates, key=sign_key)
        config = ExportConfig(
            runs=tuple(runs),
            out=out,
            preset=preset.value,
            validation=validation,
            shard_bytes=shard_mb * 10**6,
            mask_rle=mask_rle,
            with_rejected=with_rejected,
            score=score,
            better=None if better is None else better.value,
            min_margin=min_margin,
            said=Said(license=license, title=title, source=source),
            push=None if push_to is None else Push(repository=push_to, private=private),
            signing=signing,
        )
        show_export(config)
