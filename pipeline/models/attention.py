"""The UNet's attention layers, opened once, and the control that travels with a call.

A layer computes fused attention. Where a call carries a control, the cross-attention layers that it watches also
compute their probabilities, beside the fused result and without touching it: watching changes no prediction.
After a call nothing is left behind, since all state is in the control.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipeline.errors import ModelError

WATCHED_FACTOR = 4  # latent side over map side of the layers that masks are read from (LEDITS++, section 3.3)


@dataclass(slots=True)
class Watch:
    """Which tokens to watch in each row of one call, and what was seen.

    `token_weights` is (R, L); each watched layer adds its heads' mean of the probabilities, summed over the weighted
    tokens, as (R, positions).
    """

    token_weights: Tensor
    seen: list[Tensor] = field(default_factory=list)

    def mean(self, height: int, width: int) -> Tensor:
        """Mean over the layers, (R, height, width)."""
        return torch.stack(self.seen).mean(dim=0).unflatten(1, (height, width))


class ControlledAttention:
    """The processor of one attention layer of a transformer block.

    diffusers' own processors have no place for a control that comes with the call; this one takes it as the keyword
    `control` of `cross_attention_kwargs`.
    """

    def __init__(self, watched: bool) -> None:
        self.watched = watched

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # (R, N, D)
        encoder_hidden_states: Tensor | None = None,  # (R, L, D_text) in cross-attention
        attention_mask: Tensor | None = None,
        control: Watch | None = None,
    ) -> Tensor:
        """Attention of one layer, (R, N, D)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (R, heads, N or L, d)
            for states in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        attended = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=attn.scale)
        if control is not None and self.watched:
            scores = (query @ key.transpose(-1, -2)) * attn.scale  # (R, heads, N, L)
            dtype = torch.promote_types(scores.dtype, torch.float32)
            probabilities = scores.softmax(dim=-1, dtype=dtype).mean(dim=1)
            control.seen.append((probabilities @ control.token_weights.to(dtype)[..., None])[..., 0])
        attended = attended.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](attended))


def open_attention(unet: Any) -> None:
    """Install the processors. Called once, when the model is loaded.

    Raises:
        ModelError: a layer is not the plain attention of a transformer block.
    """
    levels = len(unet.config.block_out_channels)
    processors = {}
    for name in unet.attn_processors:
        layer = unet.get_submodule(name.removesuffix(".processor"))
        plain = (
            layer.group_norm is None
            and layer.spatial_norm is None
            and layer.norm_q is None
            and layer.norm_k is None
            and layer.norm_cross is None
            and layer.added_kv_proj_dim is None
            and not layer.residual_connection
            and layer.rescale_output_factor == 1.0
        )
        if not plain:
            raise ModelError(
                f"the UNet's attention layer '{name}' is not plain attention (it normalises, adds keys or has a "
                "residual of its own). Use a Stable Diffusion 1.x or 2.x checkpoint"
            )
        processors[name] = ControlledAttention(".attn2." in name and downsampling(name, levels) == WATCHED_FACTOR)
    unet.set_attn_processor(processors)


def downsampling(name: str, levels: int) -> int | None:
    """Latent side over map side of the layer of that name; None in the mid block, which no mask is read from.

    Layers are told by name, never by counting calls, so that other depths and image sizes work.
    """
    place, level, *_ = name.split(".")
    if place == "down_blocks":
        return 2 ** int(level)
    if place == "up_blocks":
        return 2 ** (levels - 1 - int(level))
    return None


def cross_attention_factors(unet: Any) -> tuple[int, ...]:
    """Downsampling factors at which the UNet has cross-attention outside its mid block, ascending."""
    levels = len(unet.config.block_out_channels)
    factors = {downsampling(name, levels) for name in unet.attn_processors if ".attn2." in name}
    return tuple(sorted(factor for factor in factors if factor is not None))
