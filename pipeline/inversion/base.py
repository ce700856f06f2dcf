"""What an inversion is: settings, and one generator that turns an encoded image into a trajectory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from typing_extensions import override

from pipeline.diffusion.levels import Schedule, Step
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import Steps
from pipeline.records import DrawNoise, Source, Trajectory, UncondScope

TIMESTEPS = 1000  # of a model: a schedule has no more steps


def draw_from(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> DrawNoise:
    """Noise of one image: drawn on the CPU in float32 from a generator of its own, so nothing else has a say."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)


Provision = Literal["noise maps", "DDIM steps", "path", "faithful source", "levels alone", "upward velocities"]
"""What a trajectory has for an editor. noise maps: one per step; DDIM steps: its solver is DDIM; path: replayed, it
returns the image, at least about; faithful source: a source branch follows it without guidance; levels alone: it took
no network row, for editors that read nothing but image and levels; upward velocities: it tells along what it went up,
step by step."""
Demand = Literal["displaced target", "source branch", "unconditional prompt"]
"""What a trajectory is made for, and wasted on an editor without: a target that is predicted where the inversion
predicted; a branch that shows the source; a prompt to guide away from, in whose place the inversion's own embeddings
stand."""


class Inversion(BaseModel, ABC):
    """Turns an image into a trajectory. Fields are its settings in the recipe; a subclass is final."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    method: str  # its name in INVERSIONS; a subclass says which
    num_steps: int  # N: steps of its trajectory

    provides: ClassVar[frozenset[Provision]]
    demands: ClassVar[frozenset[Demand]] = frozenset()
    exact: ClassVar[str]  # how well replaying its trajectory returns the image, in a few words
    paper: ClassVar[str]

    @property
    def schedule_steps(self) -> int:
        """S: steps of the whole schedule, those left out at its noisy end included."""
        return self.num_steps

    @property
    def uncond_for(self) -> UncondScope | None:
        """Which rows take the unconditional embeddings that its trajectory brings; None: it brings none."""
        return None

    @property
    def made_for_guidance(self) -> float | None:
        """The one guidance scale that its trajectory serves; None: any."""
        return None

    def model_problems(self, offers: Offers) -> Iterator[str]:
        """Why it cannot run on a model that offers this, and the way out."""
        if offers.distilled and "path" in self.provides:
            yield (
                f"{offers.distilled}: such a model cannot be walked backwards, as inversion.method '{self.method}' "
                "does. Use inversion.method noise, or the checkpoint that it was distilled from"
            )

    @abstractmethod
    def invert(self, source: Source) -> Steps[Trajectory]:
        """Yield model calls; return the trajectory of one image."""


class SkippingInversion(Inversion):
    """Leaves out steps at the noisy end of the schedule."""

    skip_steps: int  # a subclass says why, and how many by default

    @model_validator(mode="after")
    def _schedule_is_possible(self) -> Self:
        if self.schedule_steps > TIMESTEPS:
            raise ValueError(
                f"num_steps {self.num_steps} and skip_steps {self.skip_steps} make a schedule of {self.schedule_steps} "
                f"steps, possible are {TIMESTEPS}. Lower one of them"
            )
        return self

    @property
    @override
    def schedule_steps(self) -> int:
        return self.num_steps + self.skip_steps

    def steps_on(self, schedule: Schedule, size: tuple[int, int]) -> tuple[Step, ...]:
        """The N steps that are walked on a checkpoint's schedule, for latents of (h, w)."""
        return schedule.steps(self.schedule_steps, size)[self.skip_steps :]
