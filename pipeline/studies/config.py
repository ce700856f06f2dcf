"""The configuration of `shardedit geometry`: which bases are compared, how, and where to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, field_validator

from pipeline.errors import RecipeError
from pipeline.settings.explain import problems_in_words
from pipeline.settings.overrides import apply_overrides
from pipeline.settings.sections import Location, OneOrMany, Section, StorageOptions
from pipeline.settings.yaml_file import UnusableFileError, read_yaml_file

Named = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]


class OneDirection(Section):
    """A basis vector of one sample, stored under a name."""

    id: Named
    """Of the sample."""
    edit: Named = "edit"
    """Of the prompt, as the basis run names it."""
    method: Named = "riemannian"
    """Of the level, as the basis run names it."""
    vector: int = Field(default=0, ge=0)
    """Which vector, from 0, the strongest first."""


class GeometrySink(Section):
    """Where tables, pictures and directions go."""

    folder: Location = Field(min_length=1)
    """fsspec URL; created where missing."""
    storage_options: StorageOptions = Field(default_factory=dict, repr=False)
    """Options for the fsspec file system. Secrets belong in the environment."""


class GeometryConfig(Section):
    """Distances between bases, spectra of their vectors, and directions to keep."""

    bases: OneOrMany = Field(min_length=1)
    """Folders of runs of `shardedit basis`, all of one model."""
    storage_options: StorageOptions = Field(default_factory=dict, repr=False)
    """Options for the fsspec file system of `bases`. Secrets belong in the environment."""
    space: Literal["features", "tangents"] = "features"
    """What is compared. features: the bottleneck's, as in the paper; tangents: the latents'."""
    num_vectors: Annotated[int, Field(ge=1)] | None = None
    """Leading vectors of each basis; none: all."""
    mean_directions: int = Field(default=1, ge=0)
    """Mean directions over the samples of each prompt and level, kept as mean-PROMPT-LEVEL-0 and so on; 0: none."""
    directions: dict[Named, OneDirection] = Field(default_factory=dict)
    """Basis vectors to keep, and to carry to all other samples of their prompt and level, by the name that they get."""
    block_size: int = Field(default=64, ge=1)
    """Samples that are held at once, twice: what is lost by a kill is the comparison of two blocks."""
    sink: GeometrySink
    """Where results go."""

    @field_validator("bases", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def hash(self) -> str:
        """SHA-256 of what decides results, first 16 hexadecimal digits."""
        data = self.model_dump(mode="json", exclude={"sink": True, "storage_options": True})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def load_geometry(path: str | Path, overrides: Sequence[str] = ()) -> GeometryConfig:
    """Read a YAML configuration and apply overrides such as `sink.folder=out`; values are YAML.

    Raises:
        RecipeError: lists every problem.
    """
    where = str(path)
    try:
        data = read_yaml_file(path)
    except UnusableFileError as error:
        raise RecipeError(where, [("geometry", str(error))]) from None
    data = {} if data is None else data
    apply_overrides(data, overrides, where)
    return geometry_from(data, where)


def geometry_from(data: Any, where: str = "geometry") -> GeometryConfig:
    """Build a configuration from plain data.

    Raises:
        RecipeError: lists every problem.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(where, [("geometry", f"should be a mapping, is {type(data).__name__}")])
    try:
        return GeometryConfig.model_validate(data)
    except ValidationError as error:
        raise RecipeError(where, problems_in_words(error, GeometryConfig)) from error
