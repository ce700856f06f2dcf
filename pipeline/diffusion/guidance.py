"""Guidance: how several noise predictions of one image become one."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def classifier_free_guidance(
    noise_pred_uncond: Float[Tensor, "C h w"], noise_pred_cond: Float[Tensor, "C h w"], guidance_scale: float
) -> Float[Tensor, "C h w"]:
    """Classifier-free guidance (arXiv 2207.12598): 1 is the conditional prediction, 0 the unconditional one."""
    return noise_pred_uncond + guidance_scale * (noise_pred_cond - noise_pred_uncond)


def edit_directions(
    noise_pred_uncond: Float[Tensor, "C h w"],
    noise_pred_edits: Float[Tensor, "E C h w"],
    edit_guidance_scales: Float[Tensor, "E"],
    user_mask: Float[Tensor, "h w"] | None = None,
) -> Float[Tensor, "E C h w"]:
    """Scaled direction of each of E concepts, before its own mask (LEDITS++, arXiv 2311.16711, equation 6).

    A negative scale removes its concept. The user's mask, in [0, 1], comes in here, before the noise mask's
    quantile is taken, as in the maintained implementation.
    """
    directions = (noise_pred_edits - noise_pred_uncond) * edit_guidance_scales[:, None, None, None]
    return directions if user_mask is None else directions * user_mask


def multi_edit_guidance(
    noise_pred_uncond: Float[Tensor, "C h w"],
    directions: Float[Tensor, "E C h w"],
    masks: Bool[Tensor, "E h w"],
    weights: Float[Tensor, "E"],
) -> Float[Tensor, "C h w"]:
    """Add the masked directions of E concepts to one image's prediction (LEDITS++, section 3.2).

    Where all masks are false, `noise_pred_uncond` stays. `weights`, at least 0, scale after masking.
    """
    return noise_pred_uncond + (directions * masks[:, None] * weights[:, None, None, None]).sum(dim=0)
