"""What an inversion is: settings, and one generator that turns an encoded image into a trajectory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from pipeline.engine.calls import Steps
from pipeline.records import DrawNoise, Source, Trajectory


def draw_from(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> DrawNoise:
    """Noise of one image: drawn on the CPU in float32 from a generator of its own, so nothing else has a say."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)


class Inversion(BaseModel, ABC):
    """Turns an image into a trajectory. Fields are its settings in the recipe; a subclass is final."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    method: str  # its name in INVERSIONS; a subclass says which
    num_steps: int  # N: steps of its trajectory

    exact: ClassVar[str]  # how well replaying its trajectory returns the image, in a few words
    paper: ClassVar[str]

    @property
    def schedule_steps(self) -> int:
        """S: steps of the whole schedule, those left out at its noisy end included."""
        return self.num_steps

    @property
    def brings_uncond(self) -> bool:
        """Whether its trajectory brings unconditional embeddings that a target's rows take, too."""
        return False

    @abstractmethod
    def invert(self, source: Source) -> Steps[Trajectory]:
        """Yield model calls; return the trajectory of one image."""
