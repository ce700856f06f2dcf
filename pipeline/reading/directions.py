"""Files of stored directions: Parquet with a row for each, read once per process, and whether a run can use them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.common.showing import describe, public_url
from pipeline.directions import StoredDirection
from pipeline.editing.riemannian import Riemannian
from pipeline.engine.backbone import Backbone
from pipeline.errors import RecipeError, SourceError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.reading.storage import open_fs, retrying
from pipeline.recipe import Method, Recipe

COLUMNS: dict[str, pa.DataType] = {
    "name": pa.string(),
    "layer": pa.string(),
    "timestep": pa.float64(),
    "model": pa.string(),
    "model_digest": pa.string(),
    "feature_shape": pa.list_(pa.int64()),  # C', h', w'
    "feature": pa.list_(pa.float32()),  # flat, of unit length
}
"""Those that are read; others may stand beside them."""

Stored = Mapping[str, Mapping[str, StoredDirection]]
"""Directions by file and name."""


def stored_directions(recipe: Recipe) -> Stored:
    """Every file of directions that the methods of a recipe read.

    Raises:
        SourceError: one cannot be read, or holds no directions.
    """
    options = json.dumps(recipe.source.storage_options, sort_keys=True, default=str)
    urls = dict.fromkeys(method.editing.reads for method in recipe.all_methods.values() if method.editing.reads)
    return {url: _read(url, options) for url in urls}


@lru_cache(maxsize=16)
def _read(url: str, options: str) -> Mapping[str, StoredDirection]:
    where = public_url(url)
    try:
        fs, path = open_fs(url, json.loads(options))
        data: bytes = retrying()(fs.cat_file, path)
        rows = pq.read_table(io.BytesIO(data), columns=list(COLUMNS)).to_pylist()
    except SourceError:
        raise
    except (OSError, pa.ArrowException, ValueError) as error:
        raise SourceError(
            f"editing.directions '{where}' cannot be read ({describe(error)}). Give a Parquet file of directions, as "
            "`shardedit geometry` writes it"
        ) from error
    return {row["name"]: _direction(row, where) for row in rows}


def _direction(row: Mapping[str, Any], where: str) -> StoredDirection:
    feature = torch.from_numpy(np.asarray(row["feature"], dtype=np.float64))
    shape = tuple(row["feature_shape"])
    length = float(feature.norm())
    if feature.numel() != np.prod(shape) or not 0.0 < length < float("inf"):
        raise SourceError(
            f"the direction '{row['name']}' in '{where}' has {feature.numel()} numbers of length {length:g}, and "
            f"should have {int(np.prod(shape))}, not all 0. Write the file again with `shardedit geometry`"
        )
    return StoredDirection(
        name=row["name"],
        feature=feature / length,
        shape=shape,
        layer=row["layer"],
        timestep=row["timestep"],
        model_digest=row["model_digest"],
        model=row["model"],
    )


def refuse_other_directions(recipe: Recipe, backbone: Backbone) -> None:
    """See that files of directions are of this model and layer, and that those are there, and of the edit's level, that
    the recipe's edits name. What rows name of their own is seen when it is their turn.

    Raises:
        RecipeError: names those that are not, and the way out.
        SourceError: a file cannot be read.
    """
    problems = [
        (f"methods.{name}.editing.directions" if recipe.methods else "editing.directions", text)
        for name, method in recipe.all_methods.items()
        if isinstance(method.editing, Riemannian) and method.editing.reads
        for text in _problems(recipe, method, method.editing, backbone)
    ]
    if problems:
        raise RecipeError("recipe", problems)


def _problems(recipe: Recipe, method: Method, editor: Riemannian, backbone: Backbone) -> list[str]:
    known = stored_directions(recipe)[editor.reads]
    named = [request.direction.stored for request in recipe.edits.values() if request.direction]
    missing = [name for name in dict.fromkeys(named) if name and name not in known]
    found = [f"'{public_url(editor.reads)}' has no direction '{name}'. It has: {', '.join(known)}" for name in missing]
    side = (recipe.model.size or backbone.image_size) // backbone.latent_scale
    assert isinstance(method.inversion, DDIMInversion), "riemannian needs DDIM steps"
    levels = [step.start for step in method.inversion.steps_on(backbone.schedule, (side, side))]
    timestep = levels[editor.step_among(levels)].timestep
    layer = backbone.offers.bottleneck.layer if backbone.offers.bottleneck else ""
    for direction in known.values():
        if direction.model_digest != backbone.record.digest:
            found.append(
                f"the direction '{direction.name}' is of the model '{direction.model}' ({direction.model_digest}), and "
                f"this is '{backbone.record.name}' ({backbone.record.digest}). Compute it anew: shardedit basis, "
                "shardedit geometry"
            )
        elif direction.layer != layer:
            found.append(
                f"the direction '{direction.name}' is of the layer '{direction.layer}', and the edit's bottleneck is "
                f"'{layer}'. Compute it anew: shardedit basis, shardedit geometry"
            )
        elif direction.name in named and direction.timestep != timestep:
            found.append(
                f"the direction '{direction.name}' was found at timestep {direction.timestep:g}, and images are moved "
                f"at {timestep:g}. Set editing.edit_time and inversion.num_steps as they were there"
            )
    return found
