"""Walking a trajectory down under one prediction per step: the loop of every editor that has one branch."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pipeline.diffusion.levels import Level, Prediction
from pipeline.editing.observing import StepRecord, observer
from pipeline.engine.calls import Conditioning, Steps
from pipeline.engine.halfway import SecondOrderWalk
from pipeline.engine.prompts import GuidedPrompt
from pipeline.errors import PrepareError
from pipeline.records import Trajectory


class Predict(Protocol):
    """A prediction for one branch."""

    def __call__(self, latents: Tensor, step: int, level: Level | None = None) -> Steps[Prediction]:
        """After model calls a prediction (C, h, w) for latents (C, h, w) of a step, at its own level or at another."""


def no_masks(latents: Tensor) -> Tensor:
    """(0, h, w) bool: the masks of an editor that has none."""
    return torch.zeros((0, *latents.shape[-2:]), dtype=torch.bool)


def inside_of(user_mask: Tensor) -> Tensor:
    """(h, w) bool: the latents that lie at least half inside a user's mask (h, w) in [0, 1].

    Raises:
        PrepareError: none does, although the mask is not black: nothing would be edited.
    """
    inside = user_mask >= 0.5
    if user_mask.any() and not inside.any():
        raise PrepareError(
            "the mask is too thin for this method: no latent lies at least half inside. Draw it wider, raise "
            "model.size, or use editing.method ledits_pp"
        )
    return inside


def take_step(
    trajectory: Trajectory, step: int, latents: Tensor, prediction: Prediction, previous: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step with the trajectory's own noise map: (next latents, data prediction)."""
    mean, sigma, data_pred = trajectory.solver.transition(step, latents, prediction, previous)
    if sigma > 0 and trajectory.noise_maps is not None:
        mean = mean + sigma * trajectory.noise_maps[step]
    return mean, data_pred


def start_of(trajectory: Trajectory, step: int) -> tuple[Tensor, Tensor | None]:
    """Stored latents before `step`, and the data prediction of the step before, which a multistep solver reads."""
    previous = None if step == 0 or trajectory.data_preds is None else trajectory.data_preds[step - 1]
    return trajectory.latents[step], previous


def guided(trajectory: Trajectory, prompt: GuidedPrompt) -> Predict:
    """Predict under a prompt at the trajectory's levels."""

    def predict(latents: Tensor, step: int, level: Level | None = None) -> Steps[Prediction]:
        return (yield from prompt.predict(latents, level or trajectory.levels[step]))

    return predict


def guided_against_brought(trajectory: Trajectory, prompt: Conditioning, guidance_scale: float) -> Predict:
    """Predict under a prompt, guided against the unconditional embeddings that the inversion brought."""

    def predict(latents: Tensor, step: int, level: Level | None = None) -> Steps[Prediction]:
        assert trajectory.uncond is not None
        uncond = trajectory.uncond[step]
        scale = 1.0 if uncond is prompt else guidance_scale  # there is no direction between a prompt and itself
        return (yield from GuidedPrompt(prompt, uncond, scale).predict(latents, level or trajectory.levels[step]))

    return predict


def walk(trajectory: Trajectory, first_step: int, predict: Predict) -> Steps[Tensor]:
    """From the stored latents of `first_step` to the end, by the rule that the trajectory was walked up by."""
    latents, previous = start_of(trajectory, first_step)
    halfway = None if trajectory.second_order is None else SecondOrderWalk(trajectory.second_order)
    for step in range(first_step, trajectory.num_steps):
        if halfway is not None:
            start, end = trajectory.solver.steps[step]
            latents = yield from halfway.step(latents, start, end, partial(_swapped, predict, step))
        else:
            prediction = yield from predict(latents, step)
            latents, previous = take_step(trajectory, step, latents, prediction, previous)
        if tell := observer():
            tell(StepRecord(step=step, latents=latents, masks=no_masks(latents)))
    return latents


def _swapped(predict: Predict, step: int, latents: Tensor, level: Level) -> Steps[Prediction]:
    return (yield from predict(latents, step, level))


def source_residuals(trajectory: Trajectory, prompt: GuidedPrompt, first_step: int) -> Steps[Tensor]:
    """(N - first_step, C, h, w): what the source's own steps miss its trajectory by, as far as it is put back.

    The steps start from stored latents, so that all are asked for at once.
    """
    steps = range(first_step, trajectory.num_steps)
    predictions = yield from prompt.predict_all(
        trajectory.latents[first_step:-1], [trajectory.levels[step] for step in steps]
    )
    missed = []
    for number, step in enumerate(steps):
        landed, _ = take_step(trajectory, step, trajectory.latents[step], predictions[number], None)
        share = 1.0 if trajectory.pin_shares is None else trajectory.pin_shares[step]
        missed.append(share * (trajectory.latents[step + 1] - landed))
    return torch.stack(missed)
