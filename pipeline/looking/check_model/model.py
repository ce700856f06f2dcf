"""What loaded, what it offers, and which methods can use it."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.common.wording import count
from pipeline.editing import EDITORS
from pipeline.engine.backbone import Backbone, Offers
from pipeline.inversion import INVERSIONS
from pipeline.looking.check_model.records import Check, Pair
from pipeline.looking.check_model.subject import Subject
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.base import Family
from pipeline.models.parity import parameters_of
from pipeline.recipe import Method

READING = {name: editor for name, editor in EDITORS.items() if editor.reads_model}
"""Editors that a model has to serve."""


def loaded(backbone: Backbone, checkpoint: tuple[Family, Checkpoint] | None, seconds: float) -> Check:
    """What was loaded, and where to."""
    record, side = backbone.record, backbone.image_size
    latents = side // backbone.latent_scale
    values = {
        "dtype": record.dtype,
        "device": record.device,
        "image_size_px": side,
        "latent_scale_px": backbone.latent_scale,
        "latent_channels": backbone.latent_channels,
        "digest": record.digest,
        "revision": record.revision,
        "seconds": round(seconds, 3),
    }
    facts = [
        ("precision and device", f"{record.dtype} on {record.device}"),
        (
            "image size",
            f"{side} x {side} px, latents {latents} x {latents}",
        ),
        ("digest", record.digest),
        ("loaded in", f"{seconds:.1f} s"),
    ]
    if record.revision:
        facts.insert(2, ("revision", record.revision))
    if checkpoint is None:
        return Check(name="loads", status="ok", text="The closed-form model is there.", values=values, facts=(*facts,))
    family, files = checkpoint
    parameters = parameters_of(family, files)
    index = files.configurations.index
    parts = {role.split("/")[0] for role in files.files}
    components = {part: index[part][1] for part in family.components if part in parts}
    values |= {
        "family": family.name,
        "pipeline": files.configurations.pipeline,
        "components": components,
        "parameters": parameters,
    }
    networks = [
        (part, f"{kind}, {parameters[part]:,} parameters" if part in parameters else kind)
        for part, kind in components.items()
    ]
    return Check(
        name="loads",
        status="ok",
        text=f"A {files.configurations.pipeline} of family {family.name}: every file is whole, and the parts fit.",
        values=values,
        facts=(*facts, *networks),
    )


def offers(subject: Subject) -> Check:
    """What methods can have of the model."""
    found, size = subject.backbone.offers, subject.latent_size
    factor = found.openings.watched_factor
    has_maps = found.watches and not any(side % factor for side in size)
    grids, inputs = list(_grids(found, size)), sorted(found.inputs)
    grid = "x".join(str(side) for side in (side // factor for side in size)) if has_maps else None
    layers, blocks = len(found.openings.layers), len(found.openings.residuals)
    values = {
        "attention_grids": grids,
        "transformer_blocks": layers,
        "feature_blocks": blocks,
        "watched_grid": grid,
        "inputs": inputs,
        "embedding_gradients": found.embedding_gradients,
        "distilled": found.distilled,
    }
    facts = (
        ("attention at", ", ".join(grids) or "none"),
        ("transformer blocks", f"{layers}"),
        ("decoder blocks with features", f"{blocks}"),
        ("maps for masks", grid or "none"),
        ("inputs beside latents and text", ", ".join(inputs) or "none"),
        ("gradients of the embedding", "yes" if found.embedding_gradients else "no"),
    )
    wrong = []
    if found.distilled:
        wrong.append(f"{found.distilled[:1].upper()}{found.distilled[1:]}: it cannot be guided or walked backwards.")
    if found.inputs:
        wrong.append("An inpainting checkpoint: it serves fast_diffedit with backend: inpaint alone.")
    if not has_maps:
        wrong.append("It has no attention maps for masks: set editing.mask: noise or steady.")
    text = " ".join(wrong) or "Attention maps, features and all that methods ask for are there."
    return Check(name="offers", status="warning" if wrong else "ok", text=text, values=values, facts=facts)


def _grids(found: Offers, size: tuple[int, int]) -> Iterator[str]:
    """Of the attention maps outside the middle, finest first."""
    layers = sorted(found.openings.layers, key=lambda layer: layer.factor)
    for rows, columns in dict.fromkeys(layer.grid(*size) for layer in layers if layer.place != "mid"):
        yield f"{rows}x{columns}"


def methods(subject: Subject) -> Check:
    """Every inversion with every editor that reads a model, with default settings."""
    pairs = tuple(_pair(inversion, editor, subject.backbone.offers) for inversion in INVERSIONS for editor in READING)
    working = [pair for pair in pairs if pair.state == "works"]
    cannot = [pair for pair in pairs if pair.state == "cannot"]
    lost = [name for name in READING if name not in {pair.editor for pair in working}]
    text = f"All {len(working)} pairs of inversion and editor work with their default settings."
    if cannot:
        text = f"{len(working)} of {count(len(working) + len(cannot), 'pair')} work with their default settings"
        text += f"; no inversion helps {', '.join(lost)}. " if working and lost else ". "
        text += "The page says why the others do not, and which settings help."
    return Check(
        name="methods",
        status="warning" if cannot else "ok",
        text=text,
        values={
            "works": [[pair.inversion, pair.editor] for pair in working],
            "cannot": [[pair.inversion, pair.editor, pair.reason] for pair in cannot],
        },
        pairs=pairs,
    )


def _pair(inversion: str, editor: str, found: Offers) -> Pair:
    if not EDITORS[editor].fits(INVERSIONS[inversion]):
        return Pair(inversion=inversion, editor=editor, state="no pair")
    method = Method.model_validate({"inversion": {"method": inversion}, "editing": {"method": editor}})
    problems = [*method.model_problems(found)]
    return Pair(
        inversion=inversion,
        editor=editor,
        state="cannot" if problems else "works",
        reason=". ".join(problems),
    )
