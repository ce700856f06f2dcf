"""The variance-preserving schedule of a checkpoint: how much signal is left at each timestep, and which are walked.

Symbols follow diffusers: `alpha_bar` is `alphas_cumprod`, the share of signal *power*, in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Level, Schedule, Step
from pipeline.errors import ModelError

PredictionType = Literal["epsilon", "v_prediction"]
Spacing = Literal["leading", "trailing", "linspace"]
# Samplers of one and the same diffusion: how they step does not matter here, only the levels that they step along.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)


UNREADABLE = {
    "thresholding": "it clips what the model predicts, which is wrong for latents and makes inversion inexact",
    "use_flow_sigmas": "its levels are those of flow matching",
}


def _choice(config: Mapping[str, Any], key: str, known: tuple[str, ...], default: str) -> Any:
    value = config.get(key, default)
    if value not in known:
        raise ModelError(
            f"the checkpoint's scheduler has {key} '{value}'; known are {', '.join(known)}. Use a checkpoint with one "
            "of these"
        )
    return value


def _number(config: Mapping[str, Any], key: str, default: float, least: float, most: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ModelError(
            f"the checkpoint's scheduler has {key} {value!r}, which is no number from {least:g} to {most:g}. Correct it"
        )
    return float(value)


def _betas(config: Mapping[str, Any]) -> Tensor:
    """Noise that each timestep adds, (T,) in float32."""
    if (trained := config.get("trained_betas")) is not None:
        if not isinstance(trained, (list, tuple)) or not trained:
            raise ModelError("the checkpoint's scheduler has trained_betas that are no list of numbers. Correct them")
        return torch.tensor(
            [_number({"trained_betas": beta}, "trained_betas", 0.0, 0.0, 1.0) for beta in trained], dtype=torch.float32
        )
    num = int(_number(config, "num_train_timesteps", 1000.0, 1.0, 100_000.0))
    start, end = _number(config, "beta_start", 0.0001, 0.0, 1.0), _number(config, "beta_end", 0.02, 0.0, 1.0)
    if _choice(config, "beta_schedule", ("linear", "scaled_linear"), "linear") == "linear":
        return torch.linspace(start, end, num, dtype=torch.float32)
    return torch.linspace(start**0.5, end**0.5, num, dtype=torch.float32) ** 2


def _without_signal_at_the_end(betas: Tensor) -> Tensor:
    """Betas whose last level holds no signal: amplitudes are shifted and stretched so that the first one stays.

    Lin et al., arXiv 2305.08891, algorithm 1.
    """
    signal = torch.cumprod(1.0 - betas, dim=0).sqrt()
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    power = signal**2
    return 1.0 - torch.cat([power[:1], power[1:] / power[:-1]])


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule(Schedule):
    """Signal shares and conventions, as the checkpoint's scheduler configuration states them."""

    alpha_bars: tuple[float, ...]  # by timestep, descending in value
    final_alpha_bar: float  # level below timestep 0
    prediction_type: PredictionType = "epsilon"
    spacing: Spacing = "leading"
    steps_offset: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers scheduler configuration as Stable Diffusion is to be sampled.

        Many checkpoints were saved with a scheduler's own defaults, which are not made for Stable Diffusion; diffusers'
        pipelines correct `steps_offset` to 1 and `clip_sample` to false when they are built, whatever the file says. So
        does this. `set_alpha_to_one` counts where it is stated; left out, the last level is timestep 0's.

        Raises:
            ModelError: the configuration asks for something that the methods here cannot follow, or is malformed.
        """
        if (name := config.get("_class_name", SCHEDULERS[0])) not in SCHEDULERS:
            raise ModelError(
                f"the checkpoint's scheduler is {name}, whose noise levels the methods here cannot follow; known are "
                f"{', '.join(SCHEDULERS)}. Use a checkpoint that was trained for one of these"
            )
        prediction_type = _choice(config, "prediction_type", get_args(PredictionType), "epsilon")
        spacing = _choice(config, "timestep_spacing", get_args(Spacing), "leading")
        for key, reason in UNREADABLE.items():
            if config.get(key):
                raise ModelError(f"the checkpoint's scheduler has {key}: {reason}. Use a checkpoint without it")
        betas = _betas(config)
        if config.get("rescale_betas_zero_snr"):
            if prediction_type == "epsilon":
                raise ModelError(
                    "the checkpoint's scheduler has rescale_betas_zero_snr with prediction_type epsilon: at a level "
                    "without signal the noise says nothing of the image. Use a checkpoint of v_prediction"
                )
            betas = _without_signal_at_the_end(betas)
        # In float32, as diffusers computes them, so that the levels agree to the last bit.
        alpha_bars = torch.cumprod(1.0 - betas, dim=0).tolist()
        return cls(
            alpha_bars=tuple(alpha_bars),
            final_alpha_bar=1.0 if config.get("set_alpha_to_one", False) else alpha_bars[0],
            prediction_type=prediction_type,
            spacing=spacing,
            steps_offset=1,
        )

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps that the model was trained on, usually 1000."""
        return len(self.alpha_bars)

    def alpha_bar(self, timestep: int) -> float:
        """Share of signal power at a timestep; the final level below 0."""
        return self.alpha_bars[timestep] if timestep >= 0 else self.final_alpha_bar

    def ddim_timesteps(self, num_steps: int, spacing: Spacing | None = None) -> tuple[int, ...]:
        """`num_steps` descending timesteps; the spacing defaults to the checkpoint's.

        Raises:
            ValueError: more steps than training timesteps, or fewer than one.
        """
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise ValueError(f"{num_steps} steps asked for, possible are 1 to {total}")
        match spacing or self.spacing:
            case "leading":
                stride = total // num_steps
                steps = [(num_steps - 1 - j) * stride + self.steps_offset for j in range(num_steps)]
            case "trailing":
                # Python and numpy both round halves to even.
                steps = [round(total - j * total / num_steps) - 1 for j in range(num_steps)]
            case "linspace":
                span = total - 1
                ascending = [round(j * span / (num_steps - 1)) if num_steps > 1 else 0 for j in range(num_steps)]
                steps = ascending[::-1]
        if steps[0] >= total:
            raise ValueError(
                f"{num_steps} leading steps with offset {self.steps_offset} start at timestep {steps[0]}, but the "
                f"model knows 0 to {total - 1}. Use fewer steps"
            )
        return tuple(steps)

    def dpm_timesteps(self, num_steps: int) -> tuple[int, ...]:
        """`num_steps` descending timesteps of DPM-Solver++ with leading spacing; the smallest is not the offset."""
        total = self.num_train_timesteps
        if not 1 <= num_steps < total:
            raise ValueError(f"{num_steps} steps asked for, possible are 1 to {total - 1}")
        stride = total // (num_steps + 1)
        return tuple((num_steps - j) * stride + self.steps_offset for j in range(num_steps))

    def level(self, timestep: int) -> Level:
        """A timestep's level; the checkpoint's last one below 0."""
        alpha_bar = self.alpha_bar(timestep)
        return Level(math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar), timestep)

    @override
    def steps(
        self, num_steps: int, size: tuple[int, int], *, leading: bool = False, to_lowest: bool = False
    ) -> tuple[Step, ...]:
        # With spacings that round unevenly diffusers does not step to the next timestep's level but one stride down, in
        # both directions; so do we.
        stride = self.num_train_timesteps // num_steps
        timesteps = self.ddim_timesteps(num_steps, "leading" if leading else None)
        ends = [max(t - stride, 0) if to_lowest else t - stride for t in timesteps]
        return tuple(Step(self.level(t), self.level(end)) for t, end in zip(timesteps, ends, strict=True))

    @override
    def multistep_levels(self, num_steps: int, size: tuple[int, int], *, to_lowest: bool) -> tuple[Level, ...]:
        last = self.level(0) if to_lowest else Level(1.0, 0.0, 0)
        return (*(self.level(t) for t in self.dpm_timesteps(num_steps)), last)
