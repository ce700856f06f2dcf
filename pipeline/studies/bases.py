"""The rows of basis runs: which there are, read without their vectors; and the vectors of those that are wanted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.common.showing import public_url
from pipeline.diffusion.subspaces import Leading
from pipeline.errors import SinkError
from pipeline.looking.results import RunFolder
from pipeline.recipe import SinkConfig
from pipeline.studies.config import GeometryConfig
from pipeline.writing.basis_columns import basis_of
from pipeline.writing.merged import Span
from pipeline.writing.spans import table_of

INDEX = (
    *("id", "edit", "method", "target_prompt", "timestep", "layer", "num_vectors", "latent_shape", "feature_shape"),
    *("prompt_vector", "model", "model_digest"),
)
VECTORS = ("num_vectors", "singular_values", "tangents", "features")


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisRow:
    """One basis, without its vectors."""

    run: int  # of `Bases.folders`
    span: Span
    row: int  # of its span
    id: str
    edit: str  # name of the prompt
    method: str  # name of the level
    prompt: str
    timestep: float
    num_vectors: int
    latent_shape: tuple[int, ...]  # C, h, w
    feature_shape: tuple[int, ...]  # C', h', w'
    prompt_vector: tuple[float, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """Which it is, in all runs."""
        return self.id, self.edit, self.method


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What all bases must have in common to be compared."""

    name: str
    digest: str
    layer: str
    feature_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]


class Bases:
    """The bases of several runs.

    Raises:
        SinkError: a folder holds no bases, two runs are of different models or sizes, or a basis is there twice.
    """

    def __init__(self, config: GeometryConfig) -> None:
        self._config = config
        self._folders = [
            RunFolder(SinkConfig(folder=folder, storage_options=config.storage_options)) for folder in config.bases
        ]

    @cached_property
    def rows(self) -> list[BasisRow]:
        """All of them, sorted by key."""
        found: dict[tuple[str, str, str], BasisRow] = {}
        for number, folder in enumerate(self._folders):
            where = public_url(folder.sink.folder)
            if folder.record["recipe"].get("job") != "basis":
                raise SinkError(
                    f"{where} holds edited images, and no bases. Give the folder of a `shardedit basis` run"
                )
            for span in folder.spans("data"):
                for at, row in enumerate(table_of(folder.fs, folder.root, span, INDEX).to_pylist()):
                    one = _row(number, span, at, row)
                    if one.key in found:
                        raise SinkError(f"{where} has {one.key} a second time. Leave one of the runs out of bases")
                    found[one.key] = one
        if not found:
            raise SinkError("bases holds no row. See `shardedit status` of the runs")
        return [found[key] for key in sorted(found)]

    @cached_property
    def model(self) -> Model:
        """Of all of them."""
        models: dict[Model, str] = {}
        for folder in self._folders:
            for span in folder.spans("data"):
                columns = ("model", "model_digest", "layer", "feature_shape", "latent_shape")
                for row in table_of(folder.fs, folder.root, span, columns).to_pylist():
                    model = Model(
                        name=row["model"],
                        digest=row["model_digest"],
                        layer=row["layer"],
                        feature_shape=tuple(row["feature_shape"]),
                        latent_shape=tuple(row["latent_shape"]),
                    )
                    models.setdefault(model, public_url(folder.sink.folder))
        if len(models) > 1:
            texts = [
                f"\n  {where}: {one.name} ({one.digest}), {one.layer} of {_by_sides(one.feature_shape)}, latents of "
                f"{_by_sides(one.latent_shape)}"
                for one, where in models.items()
            ]
            raise SinkError(f"bases of different models or sizes have no distance:{''.join(texts)}")
        return next(iter(models))

    def load(self, rows: Sequence[BasisRow]) -> dict[tuple[str, str, str], Leading]:
        """The vectors of some, by key; as many as the configuration compares."""
        return {row.key: self._load(row) for row in rows}

    def _load(self, row: BasisRow) -> Leading:
        folder = self._folders[row.run]
        one = replace(row.span, start=row.span.start + row.row, rows=1)
        (found,) = _as_arrays(table_of(folder.fs, folder.root, one, VECTORS))
        basis = basis_of(found)
        keep = self._config.num_vectors or len(basis.stretches)
        if keep > len(basis.stretches):
            raise SinkError(
                f"num_vectors is {keep}, and the basis of {row.id} has {len(basis.stretches)}. Lower num_vectors, or "
                "run `shardedit basis` with editing.num_vectors that high"
            )
        return Leading(basis.tangents[:keep], basis.stretches[:keep], basis.features[:keep])


def _as_arrays(table: Any) -> list[Mapping[str, Any]]:
    """Rows whose lists are arrays: as Python numbers a basis takes a hundred times as much."""
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    return [
        {
            name: column[at].as_py() if name == "num_vectors" else np.asarray(column[at].values)
            for name, column in columns.items()
        }
        for at in range(table.num_rows)
    ]


def _row(run: int, span: Span, at: int, row: Mapping[str, Any]) -> BasisRow:
    return BasisRow(
        run=run,
        span=span,
        row=at,
        id=row["id"],
        edit=row["edit"],
        method=row["method"],
        prompt=row["target_prompt"],
        timestep=row["timestep"],
        num_vectors=row["num_vectors"],
        latent_shape=tuple(row["latent_shape"]),
        feature_shape=tuple(row["feature_shape"]),
        prompt_vector=tuple(row["prompt_vector"]),
    )


def _by_sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def fingerprint(rows: Sequence[BasisRow]) -> str:
    """Which rows there are, as text: other rows are another comparison."""
    return json.dumps([[*row.key, row.timestep] for row in rows])
