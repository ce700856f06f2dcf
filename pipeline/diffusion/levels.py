"""Levels of noise, and what a network says of latents at one, twice: as a prediction of the noise and of the data.

Every model here mixes x = signal * x0 + noise * n. Variance-preserving diffusion (signal^2 + noise^2 = 1) and rectified
flow (signal + noise = 1) are both that. Whatever a network was trained to put out is an affine function of either
prediction, so that solvers and guidance work on the pair and divide by neither amplitude.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.diffusion.copying import to_device

OutputKind = Literal["epsilon", "v_prediction", "velocity"]
"""What a network puts out: n, v = signal n - noise x0 (arXiv 2202.00512), or flow's n - x0 (arXiv 2209.03003)."""


class Level(NamedTuple):
    """Latents at it are `signal * x0 + noise * n`, with x0 the clean ones and n unit noise."""

    signal: float  # amplitude, not power: 0 at pure noise
    noise: float  # amplitude: 0 at the clean latents
    timestep: float  # what the network is told, from 0 to about 1000

    @property
    def scale(self) -> float:
        """Latents over it lie on the straight line from the clean ones to the noise; 1 for rectified flow."""
        return self.signal + self.noise

    @property
    def share(self) -> float:
        """Where on that line: 0 at the clean latents, 1 at the noise. Rectified flow's sigma."""
        return self.noise / self.scale

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Clean latents brought to this level: the forward process."""
        return self.signal * clean + self.noise * noise


class Step(NamedTuple):
    """One step of a sampler: from the noisier level down to the other."""

    start: Level
    end: Level


class Schedule(Protocol):
    """The levels that a checkpoint is walked along. For flow models they depend on the latents' size."""

    def steps(
        self, num_steps: int, size: tuple[int, int], *, leading: bool = False, to_lowest: bool = False
    ) -> tuple[Step, ...]:
        """N steps of a one-step sampler (DDIM, Euler), noisiest first.

        Args:
            num_steps: N, at least 1.
            size: (h, w) of the latents.
            leading: timesteps at the start of their strides, whatever the checkpoint's own spacing; where there is a
                choice.
            to_lowest: end at the least noisy level that the model was trained at, where it has one, instead of the
                checkpoint's own last level.

        Raises:
            ValueError: there are no so many steps.
        """

    def multistep_levels(self, num_steps: int, size: tuple[int, int], *, to_lowest: bool) -> tuple[Level, ...]:
        """The N + 1 levels of DPM-Solver++, noisiest first; the last as `steps` says, or clean.

        Raises:
            ValueError: there are no so many steps.
        """


@dataclass(frozen=True, slots=True)
class Prediction:
    """A network's prediction at one level, or what guidance made of several: both halves are like the latents.

    Sums whose weights add up to 1 are predictions again; the difference of two is a direction. Both halves of a
    direction are the same up to a factor of the level.
    """

    noise: Tensor
    data: Tensor

    def both(self, function: Callable[[Tensor], Tensor]) -> Prediction:
        """A linear function of either half."""
        return Prediction(function(self.noise), function(self.data))

    def __add__(self, other: Prediction) -> Prediction:
        return Prediction(self.noise + other.noise, self.data + other.data)

    def __sub__(self, other: Prediction) -> Prediction:
        return Prediction(self.noise - other.noise, self.data - other.data)

    def __mul__(self, factor: float | Tensor) -> Prediction:
        return Prediction(self.noise * factor, self.data * factor)

    __rmul__ = __mul__

    def __getitem__(self, rows: int | slice | Tensor) -> Prediction:
        """Rows of predictions (R, C, h, w)."""
        return Prediction(self.noise[rows], self.data[rows])

    @property
    def velocity(self) -> Tensor:
        """Rectified flow's: from the data towards the noise, the change of `latents / scale` with `share`."""
        return self.noise - self.data

    @property
    def contrast(self) -> Tensor:
        """Of a direction: what tells strong places from weak ones at every level.

        Without signal the noise half of a direction is zero everywhere, without noise the data half.
        """
        return self.noise - self.data


def stacked(predictions: Sequence[Prediction]) -> Prediction:
    """R predictions (C, h, w) as one, (R, C, h, w)."""
    return Prediction(torch.stack([one.noise for one in predictions]), torch.stack([one.data for one in predictions]))


def prediction_of(kind: OutputKind, output: Tensor, latents: Tensor, levels: Sequence[Level]) -> Prediction:
    """What a network's output (R, C, h, w) for latents of the same shape at R levels predicts.

    A level of no signal makes the network's noise meaningless: with "epsilon" its data is not finite.
    """

    # One tensor, so that a device is sent one.
    amplitudes = to_device(torch.tensor([level[:2] for level in levels], dtype=latents.dtype), latents.device)
    signal, noise = (one[:, None, None, None] for one in amplitudes.unbind(dim=1))
    match kind:
        case "epsilon":
            return Prediction(output, (latents - noise * output) / signal)
        case "v_prediction":
            return Prediction(signal * output + noise * latents, signal * latents - noise * output)
        case "velocity":
            return Prediction(latents + signal * output, latents - noise * output)
