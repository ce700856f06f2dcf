"""The UNet's attention layers and decoder blocks, opened once, and the control that travels with a call.

A layer computes fused attention. What a call brings along may route queries, keys and values between the rows of a
group before that, and look at the result after it; watched cross-attention layers also compute their probabilities,
beside the fused result and without touching it. After a call nothing is left behind: all state is in what came along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from pipeline.engine.controls import Block, Hook, Layer, NetworkPart, attention_probabilities
from pipeline.errors import ModelError

VECTOR_WIDTH = 16  # float32 numbers that fill a CPU's vector registers well
FEW_KEYS = 64  # filling up fewer costs more than it saves
WATCHED_FACTOR = 4  # latent side over map side of the layers that masks are read from (LEDITS++, section 3.3)

PLACES: dict[str, NetworkPart] = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}  # as they are executed


@dataclass(slots=True)
class CallControl:
    """What comes along with one network call of R rows, and what was seen.

    `token_weights` is (R, L) or None; each watched layer adds its heads' mean of the probabilities, summed over the
    weighted tokens, as (R, positions) to `seen`. `hooks` act on a group of rows each.
    """

    token_weights: Tensor | None
    hooks: Sequence[tuple[slice, Hook]] = ()
    first_alike: Tensor | None = None  # (R,), the first row that is the same before the text is read; not with hooks
    seen: list[Tensor] = field(default_factory=list)

    def mean(self, height: int, width: int) -> Tensor | None:
        """Mean over the watched layers, (R, h/4, w/4) for latents of (height, width); None where nothing is watched."""
        if not self.seen:
            return None
        return torch.stack(self.seen).mean(dim=0).unflatten(1, (height // WATCHED_FACTOR, width // WATCHED_FACTOR))

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
        """Fused attention (R, heads, N, d), with every hook's routes before it and its changes after it."""
        if layer.index == 0 and layer.kind == "self" and self.first_alike is not None:
            # Nothing has read the text yet: rows of the same latents and timestep are still the same.
            attended: Tensor = attention_of_distinct_rows(query, key, value, self.first_alike, scale)
            return attended
        attended = fused_attention(*self._routed(layer, (query, key, value)), mask, scale)
        for rows, hook in self.hooks:
            own = attended[rows]
            changed = hook.attend(layer, query[rows], key[rows], value[rows], scale, own)
            if changed is not own:
                attended[rows] = changed
        return attended

    def _routed(self, layer: Layer, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each row's from the row that its hook names. One gather for all groups."""
        routes = [(rows.start, hook.routes(layer)) for rows, hook in self.hooks]
        if all(route is None for _, route in routes):
            return tensors
        routed: list[Tensor] = []
        for which, tensor in enumerate(tensors):
            order = list(range(len(tensor)))
            for start, route in routes:
                for row, source in enumerate(() if route is None else route[which]):
                    order[start + row] = start + source
            changed = order != list(range(len(tensor)))
            routed.append(tensor[torch.tensor(order, device=tensor.device)] if changed else tensor)
        query, key, value = routed
        return query, key, value

    def watch(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Record a watched layer."""
        if self.token_weights is not None:
            probabilities = attention_probabilities(query, key, scale).mean(dim=1)  # (R, N, L)
            self.seen.append((probabilities @ self.token_weights.to(probabilities)[..., None])[..., 0])

    def features(self, block: Block, hidden: Tensor) -> Tensor:
        """A decoder block's hidden state (R, C, h', w'), with every hook's changes."""
        for rows, hook in self.hooks:
            own = hidden[rows]
            changed = hook.features(block, own)
            if changed is not own:
                hidden = hidden.clone()
                hidden[rows] = changed
        return hidden


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention (R, heads, N, d) that never holds a map.

    On a CPU what does not fit the width of vector instructions is filled up, which changes no sum: heads narrower than
    16 numbers with zeros (1.45 times as fast for 8 numbers and 1,024 positions), and a prompt's 77 keys with three that
    nobody attends to (1.1 to 1.5 times as fast for heads of 8 to 160 numbers and 64 to 4,096 positions).
    """
    if query.device.type != "cpu":
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    width, keys = query.shape[-1], key.shape[-2]
    wider = max(0, VECTOR_WIDTH - width)
    fills_keys = mask is None and keys >= FEW_KEYS and query.dtype != torch.float64  # which is for parity, not speed
    more = -keys % VECTOR_WIDTH if fills_keys else 0
    if wider:
        query = pad(query, (0, wider))
    if wider or more:
        key, value = (pad(states, (0, wider, 0, more)) for states in (key, value))
    if more:
        mask = pad(query.new_zeros((1, 1, 1, keys)), (0, more), value=float("-inf"))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)[..., :width]


@torch.library.custom_op(
    "shardedit::attention_of_distinct_rows",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor first_alike, float scale) -> Tensor",
)
def attention_of_distinct_rows(query: Tensor, key: Tensor, value: Tensor, first_alike: Tensor, scale: float) -> Tensor:
    """Fused attention (R, heads, N, d) of rows of which row r has the inputs of row `first_alike[r]`.

    An operator of its own, opaque to the compiler: how many rows differ changes from call to call, and every other
    shape stays the same.
    """
    distinct, place = first_alike.unique(return_inverse=True)
    return fused_attention(query[distinct], key[distinct], value[distinct], None, scale)[place].contiguous()


@attention_of_distinct_rows.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, first_alike: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape)


class ControlledAttention:
    """The processor of one attention layer of a transformer block.

    diffusers' own processors have no place for a control that comes with the call; this one takes it as the keyword
    `control` of `cross_attention_kwargs`.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.watched = layer.kind == "cross" and layer.place != "mid" and layer.factor == WATCHED_FACTOR

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # (R, N, D)
        encoder_hidden_states: Tensor | None = None,  # (R, L, D_text) in cross-attention
        attention_mask: Tensor | None = None,
        control: CallControl | None = None,
    ) -> Tensor:
        """Attention of one layer, (R, N, D)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (R, heads, N or L, d)
            for states in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        if control is None:
            attended = fused_attention(query, key, value, attention_mask, attn.scale)
        else:
            attended = control.attend(self.layer, query, key, value, attention_mask, attn.scale)
            if self.watched:
                control.watch(query, key, attn.scale)
        attended = attended.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](attended))


def open_attention(unet: Any) -> None:
    """Install the processors. Called once, when the model is loaded.

    Raises:
        ModelError: a layer is not the plain attention of a transformer block.
    """
    layers = attention_layers(unet)
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
        processors[name] = ControlledAttention(layers[name])
        # Past diffusers' own `forward`, which inspects its processor's signature at every call.
        layer.forward = partial(processors[name], layer)
    unet.set_attn_processor(processors)


def attention_layers(unet: Any) -> dict[str, Layer]:
    """All attention layers of a UNet by the name of their processor, in order of execution.

    Layers are told by name, never by counting calls, so that other depths and image sizes work.
    """
    levels = len(unet.config.block_out_channels)

    def position(name: str) -> tuple[int, ...]:
        return (list(PLACES).index(name.split(".")[0]), *(int(part) for part in name.split(".") if part.isdigit()))

    layers: dict[str, Layer] = {}
    transformers: dict[str, Layer] = {}  # by the name of the transformer block, its self-attention
    counts: dict[NetworkPart, int] = {"down": 0, "mid": 0, "up": 0}
    for name in sorted(unet.attn_processors, key=lambda name: (*position(name), name)):
        block, _, which = name.removesuffix(".processor").rpartition(".")
        known = transformers.get(block)
        if known is None:
            start, level, *_ = name.split(".")
            place = PLACES[start]
            halvings = {"down": int(level) if level.isdigit() else 0, "mid": levels - 1}.get(place)
            factor = 2 ** (levels - 1 - int(level) if halvings is None else halvings)
            known = transformers[block] = Layer("self", len(transformers), place, counts[place], factor)
            counts[place] += 1
        layers[name] = known if which == "attn1" else dataclasses.replace(known, kind="cross")
    return layers


def open_decoder_blocks(unet: Any) -> None:
    """Let the calls' hooks see the features of the decoder's residual blocks. Called once, when the model is loaded.

    The hook sits behind a block's second convolution, before its shortcut is added (Plug-and-Play, arXiv 2211.12572).
    diffusers hands `cross_attention_kwargs` to attention layers only, so the control comes by `unet.shardedit_control`,
    which `StableDiffusion.denoise` sets for the length of a call.
    """
    resnets = [resnet for up_block in unet.up_blocks for resnet in up_block.resnets]
    for block, resnet in zip(decoder_blocks(unet), resnets, strict=True):

        def change(module: Any, given: Any, hidden: Tensor, block: Block = block) -> Tensor | None:
            control: CallControl | None = unet.shardedit_control
            return None if control is None or not control.hooks else control.features(block, hidden)

        resnet.conv2.register_forward_hook(change)
    unet.shardedit_control = None


def decoder_blocks(unet: Any) -> tuple[Block, ...]:
    """The residual blocks of a UNet's decoder, in order of execution."""
    levels = len(unet.config.block_out_channels)
    return tuple(
        Block(index, index_in_block, 2 ** (levels - 1 - index))
        for index, up_block in enumerate(unet.up_blocks)
        for index_in_block in range(len(up_block.resnets))
    )


def cross_attention_factors(unet: Any) -> tuple[int, ...]:
    """Downsampling factors at which the UNet has cross-attention outside its mid block, ascending."""
    layers = attention_layers(unet).values()
    return tuple(sorted({layer.factor for layer in layers if layer.kind == "cross" and layer.place != "mid"}))
