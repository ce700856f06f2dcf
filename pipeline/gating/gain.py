"""How much better the diffusion model itself explains a result by what was asked for than by what was there before.

A network that predicts noise is a classifier (Li et al., arXiv 2303.16203; Clark and Jaini, arXiv 2303.15233): of two
texts the one under which it predicts the noise in a picture better is the likelier one. `denoise_gain` is the mean,
over a few levels and noises that both texts share, of

    |eps - eps_hat(x_t, source)|^2 - |eps - eps_hat(x_t, target)|^2,        x_t = signal x_0 + noise eps,

per value of the latents x_0 of the decoded result inside its mask, or of all where there is none: above 0 where the
target text explains it better. Flow models give eps_hat by their level, like all else.

Levels and region were chosen on 50 drawn faces of seed 11 (area under the curve that tells 33 correct edits from 17
others): inside the mask 0.83 with these levels, 0.70 with 0.45, 0.6 and 0.75; of the whole image 0.60.

Cost: `2 * len(SHARES) * NOISES` network rows and one encoding per result. No further weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from pipeline.diffusion.levels import Level, Schedule
from pipeline.engine.calls import Conditioning, Denoise, Denoised, EncodeImage, EncodeText, Fork, Steps
from pipeline.errors import EditError
from pipeline.inversion.base import draw_from
from pipeline.reading.requests import refusal_by
from pipeline.recipe import Recipe
from pipeline.records import Decoded, DrawNoise, Rejected
from pipeline.seeds import seed_for
from pipeline.settings.gain import GAIN, ComparedTexts, compared_texts

SHARES = (0.6, 0.75, 0.87)
"""Of noise in x_t, 0..1 (`Level.share`)."""
NOISES = 2
"""Per level."""
GRID = 50
"""Steps of the schedule among whose levels those that are nearest to `SHARES` are taken."""


def gain_seed_of(recipe: Recipe) -> int | None:
    """Of the noise that `denoise_gain` is measured with, in all attempts; None: it is not measured."""
    return recipe.run.seed if recipe.measures_gain else None


def with_gains(
    results: Sequence[Decoded | Rejected], schedule: Schedule, run_seed: int
) -> Steps[list[Decoded | Rejected]]:
    """Results with their `denoise_gain`; None of those that have no texts to compare, or were not edited.

    Args:
        results: of one image.
        schedule: the checkpoint's.
        run_seed: of the run, whatever the attempt's is: all results of an image meet the same noise, so that they
            differ by what they show.
    """
    measured: list[Decoded | Rejected] = []
    gains = yield Fork(tuple(_gain_of(one, schedule, run_seed) for one in results))
    for one, gain in zip(results, gains, strict=True):
        if isinstance(one, Rejected):
            measured.append(one)
        elif isinstance(gain, Exception):
            refusal = refusal_by(gain, EditError.stage)
            measured.append(Rejected.by(refusal, one.prepared.sample, one.edit, one.method))
        else:
            measured.append(replace(one, denoise_gain=gain))
    return measured


def _gain_of(result: Decoded | Rejected, schedule: Schedule, run_seed: int) -> Steps[float | None]:
    if isinstance(result, Rejected) or result.stopped or result.basis is not None:
        return None
    prepared = result.prepared
    texts = compared_texts(prepared.requests[result.edit])
    if texts is None:
        return None
    latents = yield EncodeImage(result.pixels)
    draw = draw_from(seed_for(run_seed, prepared.sample.noise_id, GAIN), tuple(latents.shape), latents.dtype)
    return (yield from denoise_gain(latents, texts, schedule, draw, region_of(result, latents)))


def region_of(result: Decoded, latents: Tensor) -> Tensor:
    """Where a result is looked at, (h, w) in [0, 1] like its latents: in the masks that the method found and the user's
    own; everywhere where there is none, or nothing is left.
    """
    region = torch.ones(result.pixels.shape[:2])
    if result.masks is not None:
        region *= torch.from_numpy(np.logical_or.reduce((np.zeros_like(region, dtype=bool), *result.masks))).float()
    if result.prepared.mask is not None:
        region *= torch.from_numpy(result.prepared.mask)
    pooled = adaptive_avg_pool2d(region[None, None], (latents.shape[-2], latents.shape[-1]))[0, 0]
    return pooled if bool(pooled.any()) else torch.ones_like(pooled)


def denoise_gain(
    latents: Tensor, texts: ComparedTexts, schedule: Schedule, draw_noise: DrawNoise, region: Tensor
) -> Steps[float]:
    """The figure of clean latents (C, h, w): see the module.

    Args:
        latents: of the picture.
        texts: that are compared.
        schedule: the checkpoint's.
        draw_noise: drawn from once for each row of one text: the noises of the first level, then of the next.
        region: (h, w) in [0, 1], somewhere above 0: how much each place counts.

    Raises:
        EditError: the network's predictions are not finite.
    """
    levels = [level for level in levels_near(SHARES, schedule, latents) for _ in range(NOISES)]
    noises = torch.stack([draw_noise() for _ in levels])
    noised = torch.stack([level.noised(latents, noise) for level, noise in zip(levels, noises, strict=True)])
    texts_told: list[Conditioning] = yield EncodeText(tuple(texts))
    # A network that is told a guidance scale predicts unguided at 1: a guided prediction is no expectation of noise.
    source, target = (one.telling(1.0) for one in texts_told)
    denoised: Denoised = yield Denoise(
        torch.cat([noised, noised]), [*levels, *levels], [source] * len(levels) + [target] * len(levels)
    )
    squared = (denoised.predictions.noise - torch.cat([noises, noises])).square().mean(dim=1)  # (2 R, h, w)
    errors = (squared * region).sum(dim=(1, 2)) / region.sum()
    gain = float((errors[: len(levels)] - errors[len(levels) :]).mean())
    if not math.isfinite(gain):
        raise EditError("the network's predictions for denoise_gain are not finite. Try model.dtype float32")
    return gain


def levels_near(shares: Sequence[float], schedule: Schedule, latents: Tensor) -> list[Level]:
    """For each share of noise the nearest level of the checkpoint's own."""
    starts = [step.start for step in schedule.steps(GRID, (latents.shape[-2], latents.shape[-1]))]
    return [min(starts, key=lambda level: abs(level.share - share)) for share in shares]
