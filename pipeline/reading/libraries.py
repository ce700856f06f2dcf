"""Folders of sparse autoencoders and their dictionaries: read once per process, and whether a run can use them."""

from __future__ import annotations

import io
import json
import math
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.showing import describe, public_url
from pipeline.editing.concepts import Concepts
from pipeline.editing.recording import TIMESTEPS
from pipeline.engine.backbone import Backbone
from pipeline.engine.blocks import blocks_of
from pipeline.errors import ModelError, RecipeError, SourceError
from pipeline.interventions import (
    Autoencoders,
    BlockAutoencoder,
    ConceptFeatures,
    Intervention,
    Library,
    Telling,
    Template,
)
from pipeline.models.sparse_autoencoders import Origin, of_file
from pipeline.reading.storage import FileSystem, open_fs, retrying
from pipeline.reading.templates import TEMPLATES, TEMPLATES_FILE, template_of
from pipeline.recipe import Method, Recipe

CONCEPTS_FILE = "concepts.parquet"
CONCEPT_COLUMNS: dict[str, pa.DataType] = {
    "block": pa.string(),
    "time": pa.float64(),
    "branch": pa.string(),
    "concept": pa.string(),
    "features": pa.list_(pa.int64()),
    "weights": pa.list_(pa.float64()),
    "threshold": pa.float64(),
    "iou": pa.float64(),
    "amounts": pa.list_(pa.float64()),
    "place_features": pa.list_(pa.int64()),
    "place_weights": pa.list_(pa.float64()),
    "place_threshold": pa.float64(),
    "place_iou": pa.float64(),
}
"""Those that are read; others may stand beside them."""


def libraries_of(recipe: Recipe) -> Mapping[str, Library]:
    """Every folder of autoencoders that the methods of a recipe read.

    Raises:
        SourceError: one cannot be read.
        ModelError: one holds no autoencoders, or damaged ones.
    """
    options = options_text(recipe.source.storage_options)
    urls = dict.fromkeys(method.editing.library for method in recipe.all_methods.values() if method.editing.library)
    return {url: read_library(url, options) for url in urls}


def options_text(options: Mapping[str, Any]) -> str:
    """Options of a file system as `read_library` takes them: as JSON, which can be a key of its cache."""
    return json.dumps(options, sort_keys=True, default=str)


@lru_cache(maxsize=16)
def read_library(url: str, options: str = "{}", *, named: bool = True) -> Autoencoders:
    """The autoencoders of a folder, with the names that its dictionary gives their features.

    Args:
        url: of the folder.
        options: of its file system, as JSON.
        named: whether the dictionary is read. Who writes a new one does not ask for the old one, which may be damaged.

    Raises:
        SourceError, ModelError: see `libraries_of`.
    """
    where = public_url(url)
    try:
        fs, root = open_fs(url, json.loads(options))
        paths = [path for path in sorted(retrying()(fs.find, root)) if _is_autoencoder(path.removeprefix(root))]
        read = [_read_one(fs, path) for path in paths]
        rows = _rows(fs, f"{root}/{CONCEPTS_FILE}", list(CONCEPT_COLUMNS)) if named else []
        templates = _rows(fs, f"{root}/{TEMPLATES_FILE}", TEMPLATES.names) if named else []
    except (OSError, pa.ArrowException, ValueError) as error:
        raise SourceError(
            f"editing.autoencoders '{where}' cannot be read ({describe(error)}). Give a folder of `shardedit sae train`"
        ) from error
    if not read:
        raise ModelError(f"'{where}' holds no .safetensors file. Give a folder of `shardedit sae train`")
    return Autoencoders(tuple(_named(read, rows, templates, where)), where)


def _rows(fs: FileSystem, path: str, columns: list[str]) -> list[dict[str, Any]]:
    """Of a table; none where there is no such file."""
    if not fs.exists(path):
        return []
    found: list[dict[str, Any]] = pq.read_table(io.BytesIO(fs.cat_file(path)), columns=columns).to_pylist()
    return found


def _is_autoencoder(path: str) -> bool:
    """Whether a file of the folder is one; the state of a training, in a folder that begins with _, is none."""
    return path.endswith(".safetensors") and "/_" not in path


def _read_one(fs: FileSystem, path: str) -> tuple[BlockAutoencoder, Origin]:
    beside = f"{posixpath.dirname(path)}/config.json"
    config = fs.cat_file(beside) if fs.exists(beside) else None
    autoencoder, origin = of_file(retrying()(fs.cat_file, path), path, config)
    entry = BlockAutoencoder(
        autoencoder=autoencoder,
        block=origin.block,
        branch=origin.branch,
        timestep=origin.timestep,
        model=origin.model,
        model_digest=origin.model_digest,
    )
    return entry, origin


def _named(
    read: list[tuple[BlockAutoencoder, Origin]],
    rows: list[dict[str, Any]],
    templates: list[dict[str, Any]],
    where: str,
) -> Iterator[BlockAutoencoder]:
    keys = [(origin.block, origin.time, origin.branch) for _, origin in read]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ModelError(f"'{where}' has two autoencoders of {twice[0]}. Keep one of them in the folder")
    concepts: dict[Any, dict[str, ConceptFeatures]] = {key: {} for key in keys}
    by_concept = {(row["block"], row["time"], row["branch"], row["concept"]): row for row in templates}
    sizes = {key: entry.autoencoder.num_features for key, (entry, _) in zip(keys, read, strict=True)}
    for row in rows:
        key = (row["block"], row["time"], row["branch"])
        if key not in concepts:
            raise ModelError(
                f"{CONCEPTS_FILE} in '{where}' is of an autoencoder of {key}, which is not there. "
                "Label the folder again"
            )
        template = by_concept.get((*key, row["concept"]))
        concepts[key][row["concept"]] = ConceptFeatures(
            telling=_telling(row, ""),
            amounts=tuple(row["amounts"]),
            placing=_telling(row, "place_"),
            template=None if template is None else _template(template, sizes[key], where),
        )
    for (entry, _), key in zip(read, keys, strict=True):
        most = entry.autoencoder.num_features
        for name, one in concepts[key].items():
            if beyond := [number for number in (*one.features, *one.placing.features) if number >= most]:
                raise ModelError(
                    f"the concept '{name}' of '{where}' names feature {beyond[0]}, and the autoencoder has {most}. "
                    "Label the folder again"
                )
        yield replace(entry, concepts=concepts[key])


def _template(row: Mapping[str, Any], num_features: int, where: str) -> Template:
    try:
        return template_of(row, num_features)
    except ValueError as error:
        raise ModelError(
            f"the template of '{row['concept']}' in '{where}' is damaged ({error}). Label the folder again"
        ) from None


def _telling(row: Mapping[str, Any], prefix: str) -> Telling:
    return Telling(
        features=tuple(row[f"{prefix}features"]),
        weights=tuple(row[f"{prefix}weights"]),
        threshold=row[f"{prefix}threshold"],
        iou=row[f"{prefix}iou"],
    )


def refuse_other_autoencoders(recipe: Recipe, backbone: Backbone) -> None:
    """See that autoencoders are of this model, of blocks that it has, as wide as these, know what the recipe's edits
    name, and are of steps near those of their windows. What rows name of their own is seen when it is their turn.

    Raises:
        RecipeError: names those that are not, and the way out.
        SourceError, ModelError: a folder cannot be read.
    """
    libraries = libraries_of(recipe)
    problems = [
        (f"methods.{name}.editing" if recipe.methods else "editing", text)
        for name, method in recipe.all_methods.items()
        if method.editing.library
        for text in _problems(recipe, method, libraries[method.editing.library], backbone)
    ]
    if problems:
        raise RecipeError("recipe", problems)


def _problems(recipe: Recipe, method: Method, library: Library, backbone: Backbone) -> Iterator[str]:
    assert isinstance(library, Autoencoders), "what is read from a folder"
    known, digest = blocks_of(backbone.offers.openings), backbone.record.digest
    for entry in library.entries:
        if entry.model_digest and entry.model_digest != digest:
            yield (
                f"the autoencoder of '{entry.block}' in '{library.where}' is of the model '{entry.model}' "
                f"({entry.model_digest}), and this is '{backbone.record.name}' ({digest}). Train one of this model"
            )
        elif entry.block not in known:
            yield (
                f"'{library.where}' has an autoencoder of the block '{entry.block}', which the model lacks. It has: "
                f"{', '.join(known)}"
            )
        elif entry.autoencoder.size != known[entry.block].channels:
            yield (
                f"the autoencoder of '{entry.block}' in '{library.where}' is for {entry.autoencoder.size} channels, "
                f"and the model's block has {known[entry.block].channels}. Train one of this model"
            )
    for edit, request in recipe.edits.items():
        for one in request.interventions:
            for name in one.names:
                if name not in library.names:
                    yield f"edits.{edit}: {library.unknown(name)}"
            if without := library.untemplated(one):
                yield f"edits.{edit}: {library.lacking_template(without)}"
    yield from _far_steps(recipe, method, library, backbone)


def _far_steps(recipe: Recipe, method: Method, library: Autoencoders, backbone: Backbone) -> Iterator[str]:
    """Edits that write to a block without an autoencoder, or at a step without one near enough: the first such step of
    each. The steps of `ddpm` are its own, and seen at their turn."""
    editor, inversion = method.editing, method.inversion
    assert isinstance(editor, Concepts), "who else reads a library"
    reach = math.inf if inversion.method == "ddpm" else editor.reach * TIMESTEPS
    side = (recipe.model.size or backbone.image_size) // backbone.latent_scale
    steps = backbone.schedule.steps(inversion.schedule_steps, (side, side))[-inversion.num_steps :]
    for edit, request in recipe.edits.items():
        for one in request.interventions:
            acting = [step for number, step in enumerate(steps) if one.in_window(number, len(steps))]
            told = [text for step in acting for text in _far(library, one, step.start.timestep, reach)]
            yield from (f"edits.{edit}: {text}" for text in told[:1])


def _far(library: Autoencoders, wanted: Intervention, timestep: float, reach: float) -> Iterator[str]:
    """What is said of a step that has no autoencoder near enough."""
    for block in library.blocks_of(wanted):
        try:
            library.nearest(block, wanted.row, timestep, reach)
        except ValueError as error:
            yield str(error)
