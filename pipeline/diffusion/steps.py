"""One step of a sampler, and its inverse: DDIM and the second-order SDE DPM-Solver++.

A step takes latents x_i and a prediction to a mean and a noise scale; the next latents are `mean + sigma * noise_map`.
Inversion solves the same equation for the noise map (edit-friendly DDPM inversion, arXiv 2304.06140; LEDITS++, arXiv
2311.16711), or runs DDIM upwards. Nothing here divides by the signal of a level, which may be 0 at the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Level, Prediction, Step


class Transition(NamedTuple):
    """One step: the next latents are `mean + sigma * noise_map`."""

    mean: Tensor  # like the latents
    sigma: float  # >= 0
    data_pred: Tensor  # prediction of the clean latents, wanted by the next step of a multistep solver


@runtime_checkable
class Solver(Protocol):
    """N steps down a list of levels. Immutable; holds numbers only."""

    steps: tuple[Step, ...]  # N, noisiest first

    def transition(self, step: int, latents: Tensor, prediction: Prediction, previous: Tensor | None) -> Transition:
        """Step `step` of N. `previous` is the data prediction of the step before, None at the first step taken."""


def half_log_snr(level: Level) -> float:
    """Half the logarithm of the signal-to-noise ratio; minus infinity without signal, which the formulas can take."""
    return math.log(level.signal) - math.log(level.noise) if level.signal > 0 else -math.inf


def ddim_move(prediction: Prediction, level: Level) -> Tensor:
    """Carry latents to another level along their prediction, up or down (DDIM, arXiv 2010.02502, equation 12, eta 0).

    For rectified flow this is Euler's step. Moving there and back along one prediction of the noise gives the latents.
    """
    return level.signal * prediction.data + level.noise * prediction.noise


def along(latents: Tensor, prediction: Prediction, start: Level, end: Level) -> Tensor:
    """Carry latents from one level to another along a prediction that was made for other latents at one of these.

    What is kept of the prediction is what the network puts out: rectified flow's velocity between levels of that, and
    else the noise, as in DDIM. Up or down; nothing is divided by the signal of a rectified flow's level.
    """
    if is_straight(start) and is_straight(end):
        return latents + (end.noise - start.noise) * prediction.velocity
    kept = end.signal / start.signal
    return kept * latents + (end.noise - kept * start.noise) * prediction.noise


def is_straight(level: Level) -> bool:
    """Whether a level is one of rectified flow; the clean one is of every model."""
    return abs(level.scale - 1.0) < 1e-6


LastMap = Literal["as others", "residual", "none"]
"""The noise map of the last step. residual: where the step ends at clean latents, and so scales no noise, its map is
whatever is missing there; none: it adds nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DDIM(Solver):
    """DDIM with variance `eta`: 0 is deterministic, 1 is DDPM-like (arXiv 2010.02502, equations 12 and 16)."""

    steps: tuple[Step, ...]
    eta: float = 0.0
    last_map: LastMap = "as others"
    # For parity with the authors' code of edit-friendly inversion: see compat.py.
    power_of_eta: int = 2

    @override
    def transition(self, step: int, latents: Tensor, prediction: Prediction, previous: Tensor | None) -> Transition:
        """A single-step method: `previous` is not read."""
        start, end = self.steps[step]
        kept = start.signal * end.noise / (end.signal * start.noise)  # of the noise, where none is added
        variance = end.noise**2 * max(1.0 - kept**2, 0.0)
        in_direction = variance * self.eta**self.power_of_eta
        mean = ddim_move(prediction, end._replace(noise=math.sqrt(max(end.noise**2 - in_direction, 0.0))))
        sigma = self.eta * math.sqrt(variance)
        if step == len(self.steps) - 1 and self.last_map != "as others":
            sigma = 0.0 if self.last_map == "none" else sigma or 1.0
        return Transition(mean, sigma, prediction.data)

    def inverse(self, step: int, prediction: Prediction) -> Tensor:
        """Undo step `step` for eta 0: a prediction for the latents after it gives the latents before it."""
        return ddim_move(prediction, self.steps[step].start)

    def level_below(self, step: int) -> Level:
        """Where the latents after step `step` stand, for a network that is told the timestep before it.

        DDIM inversion predicts there: the latents that it looks for do not exist yet.
        """
        start, end = self.steps[step]
        return end._replace(timestep=start.timestep)


@dataclass(frozen=True, slots=True, kw_only=True)
class SDEDPMSolver(Solver):
    """SDE DPM-Solver++, second order, midpoint (arXiv 2211.01095, algorithm 2 and its SDE form, appendix).

    The last level is either the least noisy one that the model knows, and the step to it is stochastic and invertible;
    or clean, and the step returns the data prediction: diffusers' final_sigmas_type "sigma_min" and "zero".
    """

    steps: tuple[Step, ...]
    last_map: LastMap = "as others"

    @classmethod
    def along(cls, levels: Sequence[Level], last_map: LastMap = "as others") -> SDEDPMSolver:
        """N steps along N + 1 levels."""
        return cls(steps=tuple(Step(*pair) for pair in pairwise(levels)), last_map=last_map)

    @override
    def transition(self, step: int, latents: Tensor, prediction: Prediction, previous: Tensor | None) -> Transition:
        """Without `previous` the step is of first order."""
        data_pred, (start, end) = prediction.data, self.steps[step]
        if end.noise == 0.0:
            return Transition(data_pred, 1.0 if self.last_map == "residual" else 0.0, data_pred)
        h = half_log_snr(end) - half_log_snr(start)
        corrected = data_pred
        if previous is not None:
            ratio = (half_log_snr(start) - half_log_snr(self.steps[step - 1].start)) / h
            corrected = data_pred + (data_pred - previous) / (2.0 * ratio)
        mean = (end.noise / start.noise * math.exp(-h)) * latents
        mean = mean + (end.signal * -math.expm1(-2.0 * h)) * corrected
        return Transition(mean, end.noise * math.sqrt(-math.expm1(-2.0 * h)), data_pred)
