"""Recordings: what blocks of the network wrote while an image was sampled, and which of it is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.interventions import BlockName, GuidanceBranch, Share

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


ATTENDED = "attended"
"""The column of where words were attended to."""


@dataclass(frozen=True, slots=True)
class RecordingKey:
    """What one autoencoder is trained on: a block at a time of the sampling, of one kind of row."""

    block: str
    time: float  # from 1, noise, to 0, the image
    branch: GuidanceBranch

    @property
    def column(self) -> str:
        """Its column in a run's rows; without dots, which Parquet reads as steps into a column."""
        return f"written-{self.block.replace('.', '-')}-{round(1000 * self.time):04d}-{self.branch}"


class Recording(BaseModel):
    """What is recorded of every sampled image: output minus input of blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    blocks: tuple[BlockName, ...] = Field(min_length=1)
    """Transformer blocks, as diffusers names them: up_blocks.1.attentions.0."""
    times: tuple[Share, ...] = Field(default=(1.0, 0.5, 0.0), min_length=1)
    """When: at the steps whose timesteps are nearest to these shares of 1000; 1 is noise, 0 the image."""
    branches: tuple[GuidanceBranch, ...] = Field(default=("cond",), min_length=1)
    """Of which rows: the prompt's, and those of what it is guided against."""
    positions: Annotated[int, Field(ge=1)] | None = 32
    """Places of each map that are kept, drawn at random for each image; none: all, as labelling needs them. Maps with
    fewer places are kept whole."""

    attention: bool = False
    """Whether it is recorded, too, where each word of the prompt is attended to: regions for labelling without other
    models."""

    @model_validator(mode="after")
    def _each_once(self) -> Recording:
        for name in ("blocks", "times", "branches"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has an entry twice: {', '.join(map(str, values))}. Write each once")
        columns = [key.column for key in self.all_keys()]
        if len(set(columns)) < len(columns):
            raise ValueError("times are told apart by thousandths. Leave out those that are nearer")
        return self

    def all_keys(self) -> Iterator[RecordingKey]:
        """Everything that is recorded of an image."""
        for block in self.blocks:
            for time in self.times:
                for branch in self.branches:
                    yield RecordingKey(block, time, branch)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attended:
    """Where the words of a prompt were attended to at one step, by the prompt's row."""

    words: tuple[str, ...]  # S
    maps: Tensor  # (S, h', w') float32, mean over heads and over the watched layers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """What one block wrote at one step, at some of its places."""

    key: RecordingKey
    step: int  # of the walk, from 0
    timestep: float
    shape: tuple[int, int, int]  # (D, h', w') of the block's map
    positions: tuple[int, ...]  # P places of the map, row by row, ascending
    vectors: Tensor  # (P, D), float32
