"""Steps of a bridge by Doob's h-transform (h-Edit, Nguyen et al., arXiv 2503.02187): mathematics of one image.

A reverse step is a base point, which alone brings the source back, and moves along directions of log h, which alone
carry the edit and add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.diffusion.levels import Level, Prediction
from pipeline.diffusion.steps import Solver

NEARLY_ZERO = 1e-8  # beside the gradient's size, as in the authors' code; of 16,384 numbers it is 1.6e-4 of that


def rms(values: Float[Tensor, "*shape"]) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


def edit_move(solver: Solver, step: int, direction: Prediction, *, multistep: bool = False) -> Float[Tensor, "C h w"]:
    """By how much a direction in the prediction moves the result of a step: kappa_t f.

    Steps are linear in latents and predictions together, so this is the step of the direction alone; for DDIM kappa is
    sqrt(1 - a' - omega^2) - sqrt(1 - a) sqrt(a' / a), never positive.

    Args:
        solver: of the trajectory.
        step: which of its steps.
        direction: (C, h, w), both halves at the level that the step starts from.
        multistep: whether the step reads the data prediction of the one before.
    """
    nothing = torch.zeros_like(direction.noise)
    return solver.transition(step, nothing, direction, nothing if multistep else None).mean


def at_level(direction: Float[Tensor, "C h w"], level: Level) -> Prediction:
    """A direction of the noise, which may have been found at another level, as one of both halves at a level.

    The level must have signal.
    """
    return Prediction(direction, direction * (-level.noise / level.signal))


def reconstruction_pull(
    latents: Float[Tensor, "C h w"], base: Float[Tensor, "C h w"], direction: Float[Tensor, "C h w"], weight: float
) -> Float[Tensor, "C h w"]:
    """Pull latents of an inner step back to the base point: `weight` times the size of the direction, by signs.

    In closed form the step along the gradient g of mean |latents - base|: weight rms(f) / (rms(g) + 1e-8) g.
    """
    signs = (latents - base).sign()
    count = signs.numel()
    apart = int(signs.count_nonzero())
    size = math.sqrt(apart / count) / count  # of the gradient signs / count
    return latents - (weight * rms(direction) / (size + NEARLY_ZERO) / count) * signs


def combined(predictions: Sequence[Prediction], weights: Sequence[float]) -> Prediction:
    """The weighted sum of at least one prediction: again one if the weights add up to 1, a direction if to 0."""
    first, *others = zip(predictions, weights, strict=True)
    total = first[0] * first[1]
    for prediction, weight in others:
        total = total + prediction * weight
    return total
