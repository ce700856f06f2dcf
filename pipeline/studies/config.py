"""The configuration of `shardedit geometry`: which bases are compared, how, and where to."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from pipeline.settings.sections import FolderSink, OneOrMany, Section, StorageOptions

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
    sink: FolderSink
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
