"""One step of a sampler, and its inverse: DDIM and the second-order SDE DPM-Solver++.

A step takes latents x_i and a noise prediction to a mean and a noise scale; the next latents are
`mean + sigma * noise_map`. Inversion solves the same equation for the noise map (edit-friendly DDPM inversion,
arXiv 2304.06140; LEDITS++, arXiv 2311.16711), or runs DDIM upwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from pipeline.diffusion.schedule import NoiseSchedule


class Transition(NamedTuple):
    """One step: the next latents are `mean + sigma * noise_map`."""

    mean: Tensor  # like the latents
    sigma: float  # >= 0
    data_pred: Tensor  # prediction of the clean latents, wanted by the next step of a multistep solver


@runtime_checkable
class Solver(Protocol):
    """N steps down a list of timesteps. Immutable; holds numbers only."""

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The N timesteps, descending."""

    def transition(self, step: int, latents: Tensor, noise_pred: Tensor, previous: Tensor | None) -> Transition:
        """Step `step` of N. `previous` is the data prediction of the step before, None at the first step taken."""

    def add_noise(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        """Clean latents at the noise level that step `step` starts from."""


def ddim_data_pred(latents: Tensor, noise_pred: Tensor, alpha_bar: float) -> Tensor:
    """Clean latents implied by a noise prediction (DDIM, arXiv 2010.02502, equation 9)."""
    return (latents - math.sqrt(1.0 - alpha_bar) * noise_pred) / math.sqrt(alpha_bar)


def ddim_move(latents: Tensor, noise_pred: Tensor, alpha_bar_from: float, alpha_bar_to: float) -> Tensor:
    """Carry latents from one noise level to another along a prediction, up or down (DDIM, equation 12 with eta 0).

    `ddim_move(ddim_move(x, e, a, b), e, b, a)` is x.
    """
    clean = ddim_data_pred(latents, noise_pred, alpha_bar_from)
    return math.sqrt(alpha_bar_to) * clean + math.sqrt(1.0 - alpha_bar_to) * noise_pred


@dataclass(frozen=True, slots=True, kw_only=True)
class DDIM:
    """DDIM with variance `eta`: 0 is deterministic, 1 is DDPM-like (arXiv 2010.02502, equations 12 and 16)."""

    timesteps: tuple[int, ...]
    alpha_bars: tuple[float, ...]  # N levels that the steps start from
    # N levels that the steps end at. With spacings that round unevenly diffusers does not step to the next
    # timestep's level but one stride down, in both directions; so do we.
    target_alpha_bars: tuple[float, ...]
    eta: float = 0.0
    # The authors of edit-friendly inversion put eta, not its square, under the root of the direction's weight.
    # The two agree at 0 and 1; theirs is for parity only.
    eta_squared: bool = True
    zero_last_sigma: bool = False  # the last step adds no noise: parity with what the authors' code does

    @classmethod
    def from_schedule(
        cls,
        schedule: NoiseSchedule,
        timesteps: tuple[int, ...],
        stride: int,
        *,
        eta: float = 0.0,
        eta_squared: bool = True,
        zero_last_sigma: bool = False,
    ) -> DDIM:
        """Steps along `timesteps`, each to the level `stride` timesteps below it, whatever the spacing."""
        return cls(
            timesteps=timesteps,
            alpha_bars=tuple(schedule.alpha_bar(t) for t in timesteps),
            target_alpha_bars=tuple(schedule.alpha_bar(t - stride) for t in timesteps),
            eta=eta,
            eta_squared=eta_squared,
            zero_last_sigma=zero_last_sigma,
        )

    def transition(self, step: int, latents: Tensor, noise_pred: Tensor, previous: Tensor | None) -> Transition:
        """See `Solver`; a single-step method, `previous` is not read."""
        a, b = self.alpha_bars[step], self.target_alpha_bars[step]
        variance = (1.0 - b) / (1.0 - a) * (1.0 - a / b)
        in_direction = variance * (self.eta**2 if self.eta_squared else self.eta)
        data_pred = ddim_data_pred(latents, noise_pred, a)
        mean = math.sqrt(b) * data_pred + math.sqrt(max(1.0 - b - in_direction, 0.0)) * noise_pred
        last = step == len(self.timesteps) - 1
        sigma = 0.0 if last and self.zero_last_sigma else self.eta * math.sqrt(variance)
        return Transition(mean, sigma, data_pred)

    def inverse(self, step: int, latents: Tensor, noise_pred: Tensor) -> Tensor:
        """Undo step `step` for eta 0: latents after it, and a prediction, give the latents before it."""
        return ddim_move(latents, noise_pred, self.target_alpha_bars[step], self.alpha_bars[step])

    def add_noise(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        """See `Solver`."""
        a = self.alpha_bars[step]
        return math.sqrt(a) * latents + math.sqrt(1.0 - a) * noise


@dataclass(frozen=True, slots=True, kw_only=True)
class SDEDPMSolver:
    """SDE DPM-Solver++, second order, midpoint (arXiv 2211.01095, algorithm 2 and its SDE form, appendix).

    Levels are (signal, noise) amplitudes a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar). The level after the last step
    is either timestep 0's, and the step is stochastic and invertible, or (1, 0), and the step returns the data
    prediction: what diffusers calls final_sigmas_type "sigma_min" and "zero".
    """

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]  # N + 1 signal amplitudes
    sigmas: tuple[float, ...]  # N + 1 noise amplitudes

    @classmethod
    def from_schedule(
        cls, schedule: NoiseSchedule, timesteps: tuple[int, ...], *, zero_last_sigma: bool
    ) -> SDEDPMSolver:
        """Steps along `timesteps` and then to timestep 0, or to no noise at all."""
        alpha_bars = [schedule.alpha_bar(t) for t in timesteps]
        alpha_bars.append(1.0 if zero_last_sigma else schedule.alpha_bar(0))
        return cls(
            timesteps=timesteps,
            alphas=tuple(math.sqrt(a) for a in alpha_bars),
            sigmas=tuple(math.sqrt(1.0 - a) for a in alpha_bars),
        )

    def _lambda(self, level: int) -> float:
        return math.log(self.alphas[level]) - math.log(self.sigmas[level])

    def transition(self, step: int, latents: Tensor, noise_pred: Tensor, previous: Tensor | None) -> Transition:
        """See `Solver`. Without `previous` the step is of first order."""
        data_pred = (latents - self.sigmas[step] * noise_pred) / self.alphas[step]
        if self.sigmas[step + 1] == 0.0:
            return Transition(data_pred, 0.0, data_pred)
        h = self._lambda(step + 1) - self._lambda(step)
        corrected = data_pred
        if previous is not None:
            ratio = (self._lambda(step) - self._lambda(step - 1)) / h
            corrected = data_pred + (data_pred - previous) / (2.0 * ratio)
        mean = (self.sigmas[step + 1] / self.sigmas[step] * math.exp(-h)) * latents
        mean = mean + (self.alphas[step + 1] * -math.expm1(-2.0 * h)) * corrected
        return Transition(mean, self.sigmas[step + 1] * math.sqrt(-math.expm1(-2.0 * h)), data_pred)

    def add_noise(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        """See `Solver`."""
        return self.alphas[step] * latents + self.sigmas[step] * noise
