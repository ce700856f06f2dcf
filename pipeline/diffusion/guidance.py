"""Guidance: how several predictions of one image become one. Weights add up to 1, so both halves follow one rule; or a
rule is one of the velocity, from which both follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.diffusion.flow_schedule import PATCH
from pipeline.diffusion.levels import Level, Prediction


def classifier_free_guidance(uncond: Prediction, cond: Prediction, guidance_scale: float) -> Prediction:
    """Classifier-free guidance (arXiv 2207.12598): 1 is the conditional prediction, 0 the unconditional one."""
    return uncond + guidance_scale * (cond - uncond)


def with_norm_of(cond: Prediction, guided: Prediction, levels: Sequence[Level]) -> Prediction:
    """Guided predictions of R rows whose velocity is as long, token by token, as the conditional one's (Qwen-Image,
    arXiv 2508.02324, as diffusers samples it): guidance turns it, and makes no contrast stronger.

    Args:
        cond: (R, C, h, w), of rectified flow.
        guided: like it.
        levels: R.
    """
    velocity = guided.velocity
    wanted, found = (_token_norms(one) for one in (cond.velocity, velocity))
    # What guidance has taken all of stays nothing.
    change = velocity * (wanted / found.clamp_min(torch.finfo(found.dtype).tiny) - 1.0)
    signal, noise = (
        torch.tensor([level[part] for level in levels], dtype=velocity.dtype)[:, None, None, None] for part in (0, 1)
    )
    # The latents are signal * data + noise * noise: they stay while the velocity changes.
    return Prediction(guided.noise + signal * change, guided.data - noise * change)


def _token_norms(velocity: Float[Tensor, "R C h w"]) -> Float[Tensor, "R 1 h w"]:
    """At each place the length of the token that it lies in: all channels of two by two latents."""
    squares = velocity.square().sum(dim=1, keepdim=True)
    rows, columns = (side // PATCH for side in squares.shape[-2:])
    tokens = squares.unflatten(2, (rows, PATCH)).unflatten(4, (columns, PATCH)).sum(dim=(3, 5)).sqrt()
    return tokens.repeat_interleave(PATCH, dim=2).repeat_interleave(PATCH, dim=3)


def edit_directions(
    uncond: Prediction,
    edits: Prediction,
    edit_guidance_scales: Float[Tensor, "E"],
    user_mask: Float[Tensor, "h w"] | None = None,
) -> Prediction:
    """Scaled direction of each of E concepts, before its own mask (LEDITS++, arXiv 2311.16711, equation 6).

    A negative scale removes its concept. The user's mask, in [0, 1], comes in here, before the noise mask's
    quantile is taken, as in the maintained implementation.

    Args:
        uncond: (C, h, w).
        edits: (E, C, h, w).
        edit_guidance_scales: one per concept.
        user_mask: None: everywhere.

    Returns:
        (E, C, h, w).
    """
    directions = (edits - uncond) * edit_guidance_scales[:, None, None, None]
    return directions if user_mask is None else directions * user_mask


def multi_edit_guidance(
    uncond: Prediction, directions: Prediction, masks: Bool[Tensor, "E h w"], weights: Float[Tensor, "E"]
) -> Prediction:
    """Add the masked directions (E, C, h, w) of E concepts to one image's prediction (LEDITS++, section 3.2).

    Where all masks are false, `uncond` (C, h, w) stays. `weights`, at least 0, scale after masking.
    """
    acting = directions * masks[:, None] * weights[:, None, None, None]
    return uncond + acting.both(lambda one: one.sum(dim=0))
