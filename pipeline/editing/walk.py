"""Walking a trajectory down under one prediction per step: the loop of every editor that has one branch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.engine.calls import Steps
from pipeline.records import StepRecord, Trajectory

Predict = Callable[[Tensor, int], Steps[Tensor]]
"""Latents (C, h, w) and a timestep give, after model calls, a noise prediction (C, h, w)."""


def no_masks(latents: Tensor) -> Tensor:
    """(0, h, w) bool: the masks of an editor that has none."""
    return torch.zeros((0, *latents.shape[-2:]), dtype=torch.bool)


def take_step(
    trajectory: Trajectory, step: int, latents: Tensor, noise_pred: Tensor, previous: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step with the trajectory's own noise map: (next latents, data prediction)."""
    mean, sigma, data_pred = trajectory.solver.transition(step, latents, noise_pred, previous)
    if sigma > 0 and trajectory.noise_maps is not None:
        mean = mean + sigma * trajectory.noise_maps[step]
    return mean, data_pred


def start_of(trajectory: Trajectory, step: int) -> tuple[Tensor, Tensor | None]:
    """Stored latents before `step`, and the data prediction of the step before, which a multistep solver reads."""
    previous = None if step == 0 or trajectory.data_preds is None else trajectory.data_preds[step - 1]
    return trajectory.latents[step], previous


def walk(
    trajectory: Trajectory, first_step: int, predict: Predict, *, keep_history: bool = False
) -> Steps[tuple[Tensor, tuple[StepRecord, ...]]]:
    """From the stored latents of `first_step` to the end."""
    latents, previous = start_of(trajectory, first_step)
    history = []
    for step in range(first_step, len(trajectory.timesteps)):
        noise_pred = yield from predict(latents, trajectory.timesteps[step])
        latents, previous = take_step(trajectory, step, latents, noise_pred, previous)
        if keep_history:
            history.append(StepRecord(step=step, latents=latents, masks=no_masks(latents), attention=None))
    return latents, tuple(history)
