"""A comparison of bases from its begin to its end: `shardedit geometry`.

Parts (parts.py) are computed one by one, each committed as a file of its own; the same command goes on where an earlier
one stopped. Once all are there, they become tables, pictures and directions. Nothing here needs a model or a GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.common import stopping
from pipeline.common.partition import WHOLE, Partition
from pipeline.common.showing import public_url
from pipeline.diffusion.subspaces import mean_directions, transported
from pipeline.errors import RecipeError, SinkError
from pipeline.reading.storage import FileSystem, open_fs
from pipeline.studies.bases import Bases, BasisRow, fingerprint
from pipeline.studies.config import GeometryConfig
from pipeline.studies.parts import Part, computed, parts_of
from pipeline.studies.tables import (
    DIRECTIONS,
    DISTANCES,
    RECORD_FILE,
    SPECTRA,
    TRANSPORT,
    as_parquet,
    pictures,
    rows_in,
    summary_of,
)
from pipeline.writing.files import from_json, get, list_folder, put

PARTS = "_parts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How far a comparison is."""

    folder: str
    bases: int
    parts: int
    computed_now: int
    missing: int  # parts of others
    summary: dict[str, Any] | None  # None while parts are missing


def compare(config: GeometryConfig, *, partition: Partition = WHOLE) -> Geometry:
    """Compute what is missing of a partition's parts; where none is missing any more, write the results.

    Two commands may do so at once: what both write is the same.

    Raises:
        SinkError: there are no bases, they do not belong together, or the folder holds another comparison.
        RecipeError: a direction is named that no basis has.
    """
    bases = Bases(config)
    model, rows = bases.model, bases.rows
    digest = hashlib.sha256((config.hash + model.digest + fingerprint(rows)).encode()).hexdigest()[:16]
    chosen = {name: _row_of(name, config, rows) for name in config.directions}
    fs, root = open_fs(config.sink.folder, config.sink.storage_options)
    _claim(fs, root, config, digest)
    parts = parts_of(rows, config, digest)
    there = {path.rpartition("/")[2] for path in list_folder(fs, f"{root}/{PARTS}")}
    mine = [part for part in parts[partition.index :: partition.count] if f"{part.name}.json" not in there]
    for part in mine:
        stopping.check()
        found = computed(part, rows, bases, config)
        put(fs, f"{root}/{PARTS}/{part.name}.json", json.dumps(found).encode())
    there |= {f"{part.name}.json" for part in mine}
    there |= {path.rpartition("/")[2] for path in list_folder(fs, f"{root}/{PARTS}")}
    missing = [part for part in parts if f"{part.name}.json" not in there]
    summary = None if missing else _finish(fs, root, config, bases, parts, chosen)
    return Geometry(
        folder=config.sink.folder,
        bases=len(rows),
        parts=len(parts),
        computed_now=len(mine),
        missing=len(missing),
        summary=summary,
    )


def _row_of(name: str, config: GeometryConfig, rows: Sequence[BasisRow]) -> BasisRow:
    wanted = config.directions[name]
    for row in rows:
        if row.key == (wanted.id, wanted.edit, wanted.method):
            if wanted.vector < (config.num_vectors or row.num_vectors):
                return row
            text = f"vector {wanted.vector} is asked for, and the basis has {row.num_vectors}. Choose a smaller one"
            raise RecipeError("geometry", [(f"directions.{name}.vector", text)])
    text = f"no basis of ('{wanted.id}', edit '{wanted.edit}', method '{wanted.method}'). The first is {rows[0].key}"
    raise RecipeError("geometry", [(f"directions.{name}", text)])


def _claim(fs: FileSystem, root: str, config: GeometryConfig, digest: str) -> None:
    """Say what the folder is for, or see that it is for this."""
    before = get(fs, f"{root}/{RECORD_FILE}")
    if before is None:
        record = {"comparison": digest, "config": config.model_dump(mode="json", exclude=_SECRETS)}
        put(fs, f"{root}/{RECORD_FILE}", json.dumps(record, indent=1).encode())
        return
    known = from_json(before)
    if not isinstance(known, dict) or known.get("comparison") != digest:
        raise SinkError(
            f"{public_url(config.sink.folder)} holds another comparison: other bases, or other settings. Set another "
            "sink.folder"
        )


_SECRETS: Any = {"storage_options": True, "sink": {"storage_options": True}}


def _finish(
    fs: FileSystem,
    root: str,
    config: GeometryConfig,
    bases: Bases,
    parts: Sequence[Part],
    chosen: dict[str, BasisRow],
) -> dict[str, Any]:
    """Tables, pictures, directions."""
    distances: list[dict[str, Any]] = []
    spectra: list[dict[str, Any]] = []
    for part in parts:
        data = get(fs, f"{root}/{PARTS}/{part.name}.json")
        if data is None:
            raise SinkError(f"{PARTS}/{part.name}.json has gone. Run the same command again")
        found = from_json(data)
        distances += found["distances"]
        spectra += found["spectra"]
    distances.sort(key=lambda row: [row[name] for name in DISTANCES.names[:7]])
    spectra.sort(key=lambda row: (row["id"], row["prompt"], row["timestep"]))
    directions = [*_chosen_directions(config, bases, chosen), *_means(config, bases)]
    carried = [one for name, row in chosen.items() for one in _carried(name, row, config, bases)]
    for name, rows, schema in (
        ("distances.parquet", distances, DISTANCES),
        ("spectra.parquet", spectra, SPECTRA),
        ("directions.parquet", directions, DIRECTIONS),
        ("transport.parquet", carried, TRANSPORT),
    ):
        put(fs, f"{root}/{name}", as_parquet(rows, schema))
    summary = summary_of(distances, spectra, carried)
    for name, content in pictures(summary).items():
        put(fs, f"{root}/{name}", content)
    put(fs, f"{root}/geometry.md", rows_in(summary).encode())
    put(fs, f"{root}/geometry.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _direction(name: str, feature: torch.Tensor, row: BasisRow, bases: Bases) -> dict[str, Any]:
    return {
        "name": name,
        "layer": bases.model.layer,
        "timestep": row.timestep,
        "model": bases.model.name,
        "model_digest": bases.model.digest,
        "feature_shape": list(row.feature_shape),
        "feature": feature.float().tolist(),
        "prompt": row.prompt,
    }


def _chosen_directions(config: GeometryConfig, bases: Bases, chosen: dict[str, BasisRow]) -> list[dict[str, Any]]:
    return [
        _direction(name, bases.load([row])[row.key].features[config.directions[name].vector], row, bases)
        for name, row in chosen.items()
    ]


def _conditions(rows: Sequence[BasisRow]) -> dict[tuple[str, str], list[BasisRow]]:
    """Rows by prompt and level, as their runs name them."""
    found: dict[tuple[str, str], list[BasisRow]] = {}
    for row in rows:
        found.setdefault((row.edit, row.method), []).append(row)
    return found


def _means(config: GeometryConfig, bases: Bases) -> list[dict[str, Any]]:
    """Mean directions of every prompt and level, over all of its samples."""
    if not config.mean_directions:
        return []
    found = []
    for (edit, method), rows in _conditions(bases.rows).items():
        loaded = bases.load(rows)
        count = min(len(basis.stretches) for basis in loaded.values())
        stacked = torch.stack([basis.features[:count] for basis in loaded.values()])
        keep = min(config.mean_directions, count * len(rows))
        for number, feature in enumerate(mean_directions(stacked, keep)):
            found.append(_direction(f"mean-{edit}-{method}-{number}", feature, rows[0], bases))
    return found


def _carried(name: str, row: BasisRow, config: GeometryConfig, bases: Bases) -> list[dict[str, Any]]:
    """A chosen direction at every other sample of its prompt and level."""
    feature = bases.load([row])[row.key].features[config.directions[name].vector]
    found = []
    for other in _conditions(bases.rows)[row.edit, row.method]:
        if other.id == row.id:
            continue
        basis = bases.load([other])[other.key]
        carried = transported(feature, basis)
        found.append(
            {
                "name": name,
                "id": other.id,
                "prompt": other.prompt,
                "timestep": other.timestep,
                "kept": carried.kept,
                "latent_shape": list(other.latent_shape),
                "direction": carried.direction.half().numpy(),
            }
        )
    return found
