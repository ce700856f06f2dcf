"""Directions in which an image's latents are moved: what a request says of them, and what a file of them holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.records import EditRequest

LONGEST_NAME = 64  # characters of an edit's
Vector = Annotated[int, Field(ge=0, le=4095)]
Strength = Annotated[int, Field(ge=-1000, le=1000)]


class Direction(BaseModel):
    """Along which directions an image is moved, and how far; one result for each of both."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    vectors: tuple[Vector, ...] = Field(default=(0,), min_length=1, max_length=64)
    """Which vectors of the image's own basis, from 0, the strongest first."""
    stored: Annotated[str, StringConstraints(strip_whitespace=True, max_length=200)] = ""
    """Name of a direction in the file editing.directions, which is carried to the image by parallel transport; "": one
    of the image's own."""
    strengths: tuple[Strength, ...] = Field(default=(16,), min_length=1, max_length=64)
    """Moves along the direction; negative: the other way; 0: the unmoved image. Several: a result for each, with the
    number behind the edit's name."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Direction:
        if self.stored and "vectors" in self.model_fields_set and self.vectors != (0,):
            raise ValueError("vectors and stored both choose a direction. Remove one of them")
        for name, values in (("vectors", self.vectors), ("strengths", self.strengths)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a number twice: {', '.join(map(str, values))}. Write each once")
        return self

    @property
    def vector(self) -> int:
        """Of a direction that is one."""
        return self.vectors[0]

    @property
    def strength(self) -> int:
        """Of a direction of one strength."""
        return self.strengths[0]

    @property
    def count(self) -> int:
        """Results that it asks for."""
        return len(self.vectors) * len(self.strengths)

    def parts(self) -> Mapping[str, Direction]:
        """One direction of one strength for each result, by what is put behind the edit's name."""
        found = {}
        for vector in self.vectors:
            for strength in self.strengths:
                name = f"-v{vector}" * (len(self.vectors) > 1) + f"{strength:+d}" * (len(self.strengths) > 1)
                found[name] = self.model_copy(update={"vectors": (vector,), "strengths": (strength,)})
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDirection:
    """A direction of the bottleneck, of one image or the mean of several, and where it was found."""

    name: str
    feature: Tensor  # (M,), unit length
    shape: tuple[int, ...]  # (C', h', w') of the bottleneck
    layer: str
    timestep: float | None  # None: it serves any, as what only counts rows has it
    model_digest: str
    model: str  # its name, for errors


def one_per_result(requests: Mapping[str, EditRequest]) -> dict[str, EditRequest]:
    """Requests for several directions or strengths, as one for each: every result has an edit of its own.

    Raises:
        ValueError: a name becomes too long, or is there twice.
    """
    found: dict[str, EditRequest] = {}
    for name, request in requests.items():
        direction = request.direction
        parts = {"": direction} if direction is None or direction.count == 1 else direction.parts()
        for ending, part in parts.items():
            whole = f"{name}{ending}"
            if len(whole) > LONGEST_NAME or whole in found:
                reason = "is longer than 64 characters" if len(whole) > LONGEST_NAME else "stands there twice"
                raise ValueError(f"the name '{whole}', made of '{name}' and its direction, {reason}. Rename the edit")
            found[whole] = request if part is direction else request.model_copy(update={"direction": part})
    return found
