"""The schedule of a rectified-flow checkpoint: x = (1 - s) x0 + s n, and s runs from 1 to 0 along a shifted ramp.

As diffusers' `FlowMatchEulerDiscreteScheduler` computes it, to the last bit. A larger image keeps more of its content
under the same noise, so levels are shifted towards noise: by a constant (Esser et al., arXiv 2403.03206, section
5.3.2), or the more, the larger the image is (FLUX), which is why levels are asked for by size; of FLUX.2 the number of
steps has a say, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Level, Schedule, Step
from pipeline.errors import ModelError

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
TRAINED = 1000  # what a network is told of s = 1
PATCH = 2  # latents along a side of one of the network's image tokens
UNREADABLE = {
    "use_karras_sigmas": "its levels are Karras's",
    "use_exponential_sigmas": "its levels are exponential",
    "use_beta_sigmas": "its levels are those of a beta distribution",
    "stochastic_sampling": "it draws fresh noise at every step, which no inversion can follow",
    "invert_sigmas": "its levels run the other way",
}

Ramp = Literal["even", "to_lowest"]
"""Where the unshifted ramp of N levels from 1 ends. even: at 1 / N, as FLUX's pipeline hands it over; to_lowest: at the
scheduler's own lowest level, as Stable Diffusion 3's leaves it (with a constant shift that is shifted already, and
shifted once more: so it was published)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeShift:
    """A shift by the number of image tokens: mu runs on the straight line through two points, and beyond them."""

    base_shift: float = 0.5  # mu at `base_tokens`
    max_shift: float = 1.15  # mu at `max_tokens`
    base_tokens: int = 256
    max_tokens: int = 4096

    def mu(self, tokens: int, num_steps: int) -> float:
        """Of an image of so many tokens; the number of steps has no say."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return tokens * slope + (self.base_shift - slope * self.base_tokens)


class Line(NamedTuple):
    """mu by the number of image tokens."""

    slope: float
    at_none: float

    def mu(self, tokens: int) -> float:
        """Of an image of so many tokens."""
        return self.slope * tokens + self.at_none


OF_10_STEPS, OF_200_STEPS = Line(8.73809524e-05, 1.89833333), Line(0.00016927, 0.45666666)
LARGE = 4300  # tokens; above these


@dataclass(frozen=True, slots=True)
class FittedShift:
    """A shift by the number of image tokens and of steps, as FLUX.2's publishers fitted it (diffusers'
    `compute_empirical_mu`): mu has one line for 10 steps and one for 200, and runs straight through both by the number
    of steps. Of large images the number of steps has no say: the line of 200 holds."""

    def mu(self, tokens: int, num_steps: int) -> float:
        """Of an image of so many tokens, sampled in so many steps."""
        of_many = OF_200_STEPS.mu(tokens)
        if tokens > LARGE:
            return of_many
        slope = (of_many - OF_10_STEPS.mu(tokens)) / 190.0
        return slope * num_steps + (of_many - 200.0 * slope)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSchedule(Schedule):
    """Levels and conventions, as a checkpoint's scheduler configuration states them."""

    ramp: Ramp
    shift: float = 1.0  # constant; not read where there is a shift by size
    by_size: SizeShift | FittedShift | None = None
    shift_type: Literal["exponential", "linear"] = "exponential"  # of the shift by size
    terminal: float | None = None  # where the last level above 0 is stretched to

    @classmethod
    def from_config(cls, config: Mapping[str, Any], ramp: Ramp, fitted: FittedShift | None = None) -> FlowSchedule:
        """Read a diffusers scheduler configuration.

        Args:
            config: its file.
            ramp: where the unshifted ramp ends.
            fitted: of a family that shifts so where the file asks for a shift by size; None: by the file's numbers.

        Raises:
            ModelError: it asks for levels that the methods here cannot follow, or is malformed.
        """
        if (name := config.get("_class_name", SCHEDULER)) != SCHEDULER:
            raise ModelError(
                f"the checkpoint's scheduler is {name}; known for a flow-matching model is {SCHEDULER}. Use a "
                "checkpoint with the scheduler that it was trained for"
            )
        for key, reason in UNREADABLE.items():
            if config.get(key):
                raise ModelError(f"the checkpoint's scheduler has {key}: {reason}. Use a checkpoint without it")
        if (trained := config.get("num_train_timesteps", TRAINED)) != TRAINED:
            raise ModelError(
                f"the checkpoint's scheduler has num_train_timesteps {trained!r}; flow-matching networks are told "
                f"times up to {TRAINED}. Correct it"
            )
        kind = config.get("time_shift_type", "exponential")
        if kind not in ("exponential", "linear"):
            raise ModelError(
                f"the checkpoint's scheduler has time_shift_type {kind!r}; known are exponential, linear. Use a "
                "checkpoint with one of these"
            )
        terminal = config.get("shift_terminal")
        return cls(
            ramp=ramp,
            shift=_positive(config, "shift", 1.0),
            by_size=(fitted or _by_size(config)) if config.get("use_dynamic_shifting") else None,
            shift_type=kind,
            terminal=_positive(config, "shift_terminal", 0.0) if terminal else None,
        )

    def sigmas(self, num_steps: int, size: tuple[int, int]) -> list[float]:
        """N + 1 shares of noise, from 1 down to 0; each is a float32.

        Args:
            num_steps: N.
            size: (h, w) of the latents.

        Raises:
            ValueError: there are no so many steps.
        """
        if not 1 <= num_steps <= TRAINED:
            raise ValueError(f"{num_steps} steps asked for, possible are 1 to {TRAINED}")
        if self.ramp == "even":
            sigmas = _ramp(1.0, 1.0 / num_steps, num_steps).float()
        else:
            sigmas = _ramp(float(TRAINED), self._lowest * TRAINED, num_steps) / TRAINED
        if self.by_size is not None:
            mu = self.by_size.mu((size[0] // PATCH) * (size[1] // PATCH), num_steps)
            weight = torch.tensor(math.exp(mu) if self.shift_type == "exponential" else mu, dtype=sigmas.dtype)
            sigmas = weight / (weight + (1 / sigmas - 1))
        else:
            sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        if self.terminal is not None and num_steps > 1:
            sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - self.terminal))
        return [*sigmas.float().tolist(), 0.0]

    @property
    def _lowest(self) -> float:
        """Of the levels that the network was trained at, shifted where the shift is constant."""
        sigma = torch.tensor(1.0) / TRAINED
        if self.by_size is None:
            sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        return float(sigma)

    def level(self, timestep: int) -> Level:
        """That of a time which the network is told, 0 to 1000."""
        return level_of(timestep / TRAINED)

    @override
    def steps(
        self, num_steps: int, size: tuple[int, int], *, leading: bool = False, to_lowest: bool = False
    ) -> tuple[Step, ...]:
        """There is one spacing, and the last level is the clean one: nothing was trained below a lowest one."""
        levels = self.multistep_levels(num_steps, size, to_lowest=to_lowest)
        return tuple(Step(*pair) for pair in pairwise(levels))

    @override
    def multistep_levels(self, num_steps: int, size: tuple[int, int], *, to_lowest: bool) -> tuple[Level, ...]:
        return tuple(level_of(sigma) for sigma in self.sigmas(num_steps, size))


def level_of(sigma: float) -> Level:
    """Rectified flow's level of a share of noise."""
    return Level(1.0 - sigma, sigma, float(torch.tensor(sigma) * TRAINED))


def _ramp(start: float, end: float, count: int) -> Tensor:
    """Evenly spaced float64, both ends included, as numpy rounds them (torch's own differs in the last digit)."""
    ramp = torch.arange(count, dtype=torch.float64) * ((end - start) / max(count - 1, 1)) + start
    if count > 1:
        ramp[-1] = end
    return ramp


def _by_size(config: Mapping[str, Any]) -> SizeShift:
    names = {"base_tokens": "base_image_seq_len", "max_tokens": "max_image_seq_len"}
    tokens = {ours: int(_positive(config, theirs, float(getattr(DEFAULT, ours)))) for ours, theirs in names.items()}
    shifts = {name: _positive(config, name, getattr(DEFAULT, name)) for name in ("base_shift", "max_shift")}
    if tokens["base_tokens"] >= tokens["max_tokens"]:
        raise ModelError(
            f"the checkpoint's scheduler has base_image_seq_len {tokens['base_tokens']}, which is not below "
            f"max_image_seq_len {tokens['max_tokens']}. Correct them"
        )
    return SizeShift(base_shift=shifts["base_shift"], max_shift=shifts["max_shift"], **tokens)


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelError(f"the checkpoint's scheduler has {key} {value!r}, which is no positive number. Correct it")
    return float(value)


DEFAULT = SizeShift()
