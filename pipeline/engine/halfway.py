"""Second-order steps along the straight line from image to noise: predict half-way, step along that prediction.

RF-Solver's Taylor step (Wang et al., arXiv 2411.04746, equation 9), as its code computes the derivative, is the
midpoint rule. FireFlow (Deng et al., arXiv 2412.07517, algorithm 1) reaches the half-way point along the prediction
that the step before made half-way, which saves one row of each step but the first.

Latents over `Level.scale` lie on a straight line from the image to the noise for every model, so that these are steps
of `Level.share`, the papers' time, on any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pipeline.diffusion.levels import Level, Prediction
from pipeline.diffusion.steps import is_straight
from pipeline.engine.calls import Steps

SecondOrder = Literal["rf_solver", "fireflow"]
Ask = Callable[[Tensor, Level], Steps[Prediction]]
"""Latents (C, h, w) and their level give, after model calls, a prediction (C, h, w)."""


def halfway(start: Level, end: Level) -> Level:
    """The level between two, either of which may be the noisier: by share of noise, and by what the network is told.

    Between levels of a variance-preserving model it is one of these; told times are taken to be evenly spaced there.
    """
    share = (start.share + end.share) / 2.0
    scale = 1.0 if is_straight(start) and is_straight(end) else 1.0 / math.hypot(1.0 - share, share)
    return Level((1.0 - share) * scale, share * scale, (told(start).timestep + told(end).timestep) / 2.0)


def told(level: Level) -> Level:
    """A level as a network can be told it: nothing is told below timestep 0."""
    return level._replace(timestep=max(level.timestep, 0.0))


def carried(latents: Tensor, velocity: Tensor, start: Level, end: Level) -> Tensor:
    """Latents (C, h, w) at `start` brought to `end` along a velocity (C, h, w)."""
    return end.scale * (latents / start.scale + (end.share - start.share) * velocity)


@dataclass(slots=True)
class SecondOrderWalk:
    """Steps in one direction, one after the other. A walk the other way is a new one."""

    kind: SecondOrder
    velocity: Tensor | None = None  # that the step before was taken along, half-way

    def step(self, latents: Tensor, start: Level, end: Level, ask: Ask) -> Steps[Tensor]:
        """Latents (C, h, w) at `end`: two predictions, one where the last step's serves for the first."""
        first = self.velocity if self.kind == "fireflow" else None
        if first is None:
            first = (yield from ask(latents, told(start))).velocity
        between = halfway(start, end)
        self.velocity = (yield from ask(carried(latents, first, start, between), between)).velocity
        return carried(latents, self.velocity, start, end)
