"""The noise schedule of a checkpoint: how much signal is left at each timestep, and which timesteps are walked.

Symbols follow diffusers: `alpha_bar` is `alphas_cumprod`, the share of signal *power*, in (0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pipeline.errors import ModelError

PredictionType = Literal["epsilon", "v_prediction"]
Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """Signal shares and conventions, as the checkpoint's scheduler configuration states them."""

    alpha_bars: tuple[float, ...]  # by timestep, descending in value
    final_alpha_bar: float  # level below timestep 0
    prediction_type: PredictionType = "epsilon"
    spacing: Spacing = "leading"
    steps_offset: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers scheduler configuration.

        Betas are computed in float32, as diffusers does, so that the levels agree to the last bit.

        Raises:
            ModelError: the configuration asks for something that the methods here cannot follow.
        """
        num = int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
        kind = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
        elif kind == "linear":
            betas = torch.linspace(start, end, num, dtype=torch.float32)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, num, dtype=torch.float32) ** 2
        else:
            raise ModelError(
                f"the checkpoint's scheduler has beta_schedule '{kind}'; known are linear, scaled_linear and "
                "trained_betas. Use a checkpoint with one of these"
            )
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in get_args(PredictionType):
            raise ModelError(
                f"the checkpoint predicts '{prediction_type}'; known are {', '.join(get_args(PredictionType))}"
            )
        spacing = config.get("timestep_spacing", "leading")
        if spacing not in get_args(Spacing):
            raise ModelError(
                f"the scheduler's timestep_spacing is '{spacing}'; known are {', '.join(get_args(Spacing))}"
            )
        if config.get("rescale_betas_zero_snr", False):
            raise ModelError(
                "the scheduler has rescale_betas_zero_snr: its noisiest level holds no signal, so that no inversion "
                "can divide by it. Use a checkpoint without it"
            )
        if config.get("thresholding", False) or config.get("clip_sample", False):
            raise ModelError(
                "the scheduler clips its samples (clip_sample or thresholding), which makes inversion inexact and is "
                "wrong for latents. Set both to false in scheduler_config.json"
            )
        alpha_bars = torch.cumprod(1.0 - betas, dim=0).tolist()
        return cls(
            alpha_bars=tuple(alpha_bars),
            final_alpha_bar=1.0 if config.get("set_alpha_to_one", True) else alpha_bars[0],
            prediction_type=prediction_type,
            spacing=spacing,
            steps_offset=int(config.get("steps_offset", 0)),
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

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """The forward process: latents of any shape and unit noise of the same, brought to a timestep's level."""
        alpha_bar = self.alpha_bar(timestep)
        return math.sqrt(alpha_bar) * latents + math.sqrt(1.0 - alpha_bar) * noise

    def to_noise_pred(self, output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Turn a network's output (R, C, h, w) at timesteps (R,) into epsilon, whatever the network was trained for."""
        if self.prediction_type == "epsilon":
            return output
        alpha_bar = torch.tensor(self.alpha_bars, dtype=torch.float64)[timesteps.cpu()].to(latents)[:, None, None, None]
        return alpha_bar.sqrt() * output + (1.0 - alpha_bar).sqrt() * latents
