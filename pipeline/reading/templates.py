"""Templates of concepts as rows of a table: codes that are not zero, with their places and features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.interventions import Template

TEMPLATES_FILE = "templates.parquet"
TEMPLATES = pa.schema(
    {
        "block": pa.string(),
        "time": pa.float64(),
        "branch": pa.string(),
        "concept": pa.string(),
        "height": pa.int64(),  # of the map
        "width": pa.int64(),
        "features": pa.list_(pa.int32()),  # of every code
        "places": pa.list_(pa.int32()),  # row by row of the map
        "codes": pa.list_(pa.float32()),
    }
)


def row_of(template: Template) -> dict[str, Any]:
    """The columns of one template, but for those that say whose it is."""
    _, height, width = template.maps.shape
    number, place = template.maps.flatten(1).nonzero(as_tuple=True)
    return {
        "height": height,
        "width": width,
        "features": torch.tensor(template.features)[number].tolist(),
        "places": place.tolist(),
        "codes": template.maps.flatten(1)[number, place].tolist(),
    }


def template_of(row: Mapping[str, Any], num_features: int) -> Template:
    """The template that a row holds.

    Raises:
        ValueError: it has codes of features or places that there are not, or not as many of either.
    """
    features, places, codes = (np.asarray(row[name], dtype=kind) for name, kind in _LISTS.items())
    height, width = row["height"], row["width"]
    if not len(features) == len(places) == len(codes):
        raise ValueError(f"{len(codes)} codes have {len(features)} features and {len(places)} places")
    if len(codes) and not (0 <= features.min() <= features.max() < num_features):
        raise ValueError(f"it names feature {features.max()}, and the autoencoder has {num_features}")
    if len(codes) and not (0 <= places.min() <= places.max() < height * width):
        raise ValueError(f"it names place {places.max()}, and its map has {height * width}")
    if not np.isfinite(codes).all():
        raise ValueError("it holds numbers that are not finite")
    used, number = np.unique(features, return_inverse=True)
    maps = torch.zeros((len(used), height * width))
    maps[torch.from_numpy(number), torch.from_numpy(places)] = torch.from_numpy(codes)
    return Template(features=tuple(used.tolist()), maps=maps.unflatten(1, (height, width)))


_LISTS = {"features": np.int64, "places": np.int64, "codes": np.float32}
