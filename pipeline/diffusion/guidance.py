"""Guidance: how several predictions of one image become one. Weights add up to 1, so both halves follow one rule."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.diffusion.levels import Prediction


def classifier_free_guidance(uncond: Prediction, cond: Prediction, guidance_scale: float) -> Prediction:
    """Classifier-free guidance (arXiv 2207.12598): 1 is the conditional prediction, 0 the unconditional one."""
    return uncond + guidance_scale * (cond - uncond)


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
