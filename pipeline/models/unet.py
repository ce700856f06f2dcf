"""A UNet opened once: its attention layers, its decoder's residual blocks and its transformer blocks let a call's
controls in. After a call nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pipeline.engine.controls import (
    WATCHED_FACTOR,
    FreeU,
    Layer,
    NetworkPart,
    Openings,
    ResidualBlock,
    Transformer,
    Where,
)
from pipeline.engine.stacking import Stacked
from pipeline.engine.tuning import UNTUNED, Tuning
from pipeline.errors import ModelError
from pipeline.models.attention import Acting, attention_of_distinct_rows, explicit_attention, fused_attention
from pipeline.models.compiling import compiled
from pipeline.models.graphs import Replayed
from pipeline.models.kernels import (
    asking_first,
    exact_float32,
    join_projections,
    output_projection,
    projections,
    widen_heads,
)
from pipeline.models.unet_layout import decoder_of

PLACES: dict[str, NetworkPart] = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}  # as they are executed


@dataclass
class Now:
    """What acts in the network call that is being made; None outside of calls, and in calls without controls.

    diffusers hands keywords to attention layers only, so what acts in other blocks, too, is found here.
    """

    acting: Acting | None = None
    explicit: bool = False  # attention by its maps, for a call in forward mode
    alike: Tensor | None = None  # (R,), the first row that is the same until the text is read


class OpenedUNet:
    """diffusers' UNet with its insides open: see the module.

    Args:
        unet: is changed for good.

    Raises:
        ModelError: a layer is not the plain attention of a transformer block.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.tuning = UNTUNED
        self.openings = openings_of(unet)
        self._now = Now()
        _open_attention(unet, self._now)
        _open_residuals(unet, self._now)
        _open_transformers(unet, self._now)
        _open_decoder(unet, self._now)
        self._compiled: Callable[..., Any] | None = None

    def tune(self, tuning: Tuning) -> None:
        """Run in another way from now on. Calls that keep a graph for gradients are never compiled."""
        self.tuning = tuning
        memory = torch.channels_last if tuning.layout == "channels_last" else torch.contiguous_format
        self.unet.to(memory_format=memory)
        for name, layer in attention_layers(self.unet).items():
            attention = self.unet.get_submodule(name.removesuffix(".processor"))
            join_projections(attention, layer, tuning.projections == "joined")
        run = None if tuning.execution == "eager" else compiled(self._run)
        self._compiled = Replayed(run) if run is not None and tuning.execution == "graphs" else run

    @property
    def compiles(self) -> bool:
        """Whether the next call runs as a compiled graph."""
        return self._compiled is not None and not torch.is_grad_enabled()

    def predict(
        self,
        inputs: Tensor,
        times: Tensor,
        context: Tensor,
        controls: Stacked | None = None,
        added: Mapping[str, Tensor] | None = None,
        alike: Tensor | None = None,
        free_u: FreeU | None = None,
    ) -> tuple[Tensor, Tensor | None, dict[Where, Tensor]]:
        """One call of R rows. Everything lies on the network's device.

        Args:
            inputs: (R, C_in, h, w).
            times: (R,), what the network is told.
            context: (R, L, D) of cross-attention.
            controls: what acts inside.
            added: more conditioning, by the names that the network knows it by.
            alike: (R,), for each row the first one of the same latents and time, in a call without controls: what
                they have in common is then attended to once. None: they are taken to differ.
            free_u: factors of the decoder; None: none.

        Returns:
            The output (R, C, h, w), what was watched (R, S, h/4, w/4), and what was recorded, (slots, C, h', w') by
            block.
        """
        run = self._compiled if self._compiled is not None and self.compiles else self._run
        if self.tuning.layout == "channels_last":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        try:
            more = None if added is None else dict(added)
            if free_u is not None:
                self.unet.enable_freeu(*free_u)
            with asking_first(self.tuning.attention), exact_float32(inputs):
                output, watched, recorded = run(inputs, times, context, controls, more, alike)
        finally:
            self._now.acting = self._now.alike = None
            if free_u is not None:
                self.unet.disable_freeu()
        return output, watched, recorded

    def bottleneck(
        self, inputs: Tensor, times: Tensor, context: Tensor, added: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """What the middle block puts out, (R, C', h', w'): half of `predict`, without the decoder and without controls.

        The steps are those of `UNet2DConditionModel.forward` up to there; a test holds the two together.
        """
        unet = self.unet
        if unet.config.center_input_sample:
            inputs = 2.0 * inputs - 1.0
        time = unet.time_embedding(unet.get_time_embed(sample=inputs, timestep=times), None)
        more = unet.get_aug_embed(emb=time, encoder_hidden_states=context, added_cond_kwargs=added)
        time = time if more is None else time + more
        if unet.time_embed_act is not None:
            time = unet.time_embed_act(time)
        hidden = unet.conv_in(inputs)
        for block in unet.down_blocks:
            hidden, _ = block(hidden_states=hidden, temb=time, **_text_of(block, context))
        return cast(Tensor, unet.mid_block(hidden, time, **_text_of(unet.mid_block, context)))

    def push(
        self,
        inputs: Tensor,
        times: Tensor,
        context: Tensor,
        vectors: Tensor,
        added: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The bottleneck's Jacobian times vectors (R, C, h, w), in forward mode: (R, C', h', w')."""
        self._now.explicit = True
        try:
            with torch.no_grad(), exact_float32(inputs), forward_ad.dual_level():
                output = self.bottleneck(forward_ad.make_dual(inputs, vectors), times, context, added)
                return cast(Tensor, forward_ad.unpack_dual(output).tangent)
        finally:
            self._now.explicit = False

    def pull(
        self,
        inputs: Tensor,
        times: Tensor,
        context: Tensor,
        vectors: Tensor,
        added: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The bottleneck's transposed Jacobian times vectors (R, C', h', w'), in reverse mode: (R, C, h, w)."""
        with torch.enable_grad(), exact_float32(inputs):
            inputs = inputs.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.bottleneck(inputs, times, context, added), inputs, vectors)
        return found

    def _run(
        self,
        inputs: Tensor,
        times: Tensor,
        context: Tensor,
        controls: Stacked | None,
        added: dict[str, Tensor] | None,
        alike: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, dict[Where, Tensor]]:
        """What is compiled: tensors go in and come out, and nothing is decided by what they hold."""
        acting = None if controls is None else Acting(controls)
        self._now.acting, self._now.alike = acting, alike
        (output,) = self.unet(inputs, times, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)
        self._now.acting = self._now.alike = None
        if acting is None:
            return output, None, {}
        rooms = acting.layout.plan.records
        recorded = {rooms[number].where: tensor for number, tensor in acting.recorded.items()}
        return output, acting.watched(), recorded


def _text_of(block: Any, context: Tensor) -> dict[str, Tensor]:
    """What a block takes beside hidden state and time."""
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


def _open_attention(unet: Any, now: Now) -> None:
    for name, layer in attention_layers(unet).items():
        attention = unet.get_submodule(name.removesuffix(".processor"))
        plain = (
            attention.group_norm is None
            and attention.spatial_norm is None
            and attention.norm_q is None
            and attention.norm_k is None
            and attention.norm_cross is None
            and attention.added_kv_proj_dim is None
            and not attention.residual_connection
            and attention.rescale_output_factor == 1.0
        )
        if not plain:
            raise ModelError(
                f"the UNet's attention layer '{name}' is not plain attention (it normalises, adds keys or has a "
                "residual of its own). Use a Stable Diffusion 1.x or 2.x checkpoint"
            )
        # In place of diffusers' own `forward`, which inspects its processor's signature at every call.
        attention.forward = partial(_attend, attention, layer, now)
        widen_heads(attention)


def _attend(
    attention: Any,
    layer: Layer,
    now: Now,
    hidden_states: Tensor,  # (R, N, D)
    encoder_hidden_states: Tensor | None = None,  # (R, L, D_text) in cross-attention
    attention_mask: None = None,
) -> Tensor:
    """One attention layer, (R, N, D)."""
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = (
        states.unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # (R, heads, N or L, d)
        for states in projections(attention, hidden_states, context)
    )
    acting = now.acting
    if now.explicit:
        attended = explicit_attention(query, key, value, attention.scale)
    elif now.alike is not None and layer.index == 0 and layer.kind == "self":
        attended = attention_of_distinct_rows(query, key, value, now.alike, attention.scale)
    elif acting is None:
        attended = fused_attention(query, key, value, None, attention.scale)
    else:
        attended = acting.attend(layer, query, key, value, attention.scale)
    return output_projection(attention, attended.transpose(1, 2).flatten(2))


def _open_residuals(unet: Any, now: Now) -> None:
    """Behind a block's second convolution, before its shortcut is added (Plug-and-Play, arXiv 2211.12572)."""
    blocks = [resnet for up_block in unet.up_blocks for resnet in up_block.resnets]
    for number, block in enumerate(blocks):
        block.conv2.forward = partial(_features, block.conv2.forward, number, now)


def _features(forward: Callable[..., Tensor], number: int, now: Now, hidden: Tensor) -> Tensor:
    hidden = forward(hidden)
    return hidden if now.acting is None else now.acting.features(number, hidden)


def _open_transformers(unet: Any, now: Now) -> None:
    for module, transformer in _transformers(unet):
        where = (transformer.place, transformer.index_in_place)
        module.forward = partial(_transform, module.forward, where, now)


def _transform(
    forward: Callable[..., Any], where: Where, now: Now, hidden_states: Tensor, *given: Any, **named: Any
) -> Any:
    (output,) = forward(hidden_states, *given, **named)
    return (output if now.acting is None else now.acting.wrote(where, hidden_states, output),)


def _open_decoder(unet: Any, now: Now) -> None:
    """Behind the upsampler: the features of DIFT (arXiv 2306.03881). Of blocks of one factor the first is opened."""
    first: dict[int, Any] = {}
    for block, described in zip(unet.up_blocks, decoder_of(unet.config), strict=True):
        first.setdefault(described.factor, block)
    for factor, block in first.items():
        block.forward = partial(_put_out, block.forward, ("decoder", factor), now)


def _put_out(forward: Callable[..., Tensor], where: Where, now: Now, *given: Any, **named: Any) -> Tensor:
    output = forward(*given, **named)
    if now.acting is not None:
        now.acting.put_out(where, output)
    return output


def openings_of(unet: Any) -> Openings:
    """Where a UNet lets controls in."""
    layers = list(attention_layers(unet).values())
    levels = len(unet.config.block_out_channels)
    return Openings(
        layers=tuple(layer for layer in layers if layer.kind == "self"),
        watched=frozenset(
            layer.index
            for layer in layers
            if layer.kind == "cross" and layer.place != "mid" and layer.factor == WATCHED_FACTOR
        ),
        residuals=tuple(
            ResidualBlock(index, index_in_block, 2 ** (levels - 1 - index))
            for index, up_block in enumerate(unet.up_blocks)
            for index_in_block in range(len(up_block.resnets))
        ),
        transformers=tuple(transformer for _, transformer in _transformers(unet)),
        decoder=decoder_of(unet.config),
    )


def attention_layers(unet: Any) -> dict[str, Layer]:
    """All attention layers of a UNet by the name of their processor, in order of execution.

    Layers are told by name, never by counting calls, so that other depths and image sizes work.
    """

    def position(name: str) -> tuple[int, ...]:
        return (list(PLACES).index(name.split(".")[0]), *(int(part) for part in name.split(".") if part.isdigit()))

    layers: dict[str, Layer] = {}
    transformers: dict[str, Layer] = {}  # by the name of the transformer block, its self-attention
    counts: dict[NetworkPart, int] = {"down": 0, "mid": 0, "up": 0}
    for name in sorted(unet.attn_processors, key=lambda name: (*position(name), name)):
        block, _, which = name.removesuffix(".processor").rpartition(".")
        known = transformers.get(block)
        if known is None:
            place = PLACES[name.split(".")[0]]
            known = transformers[block] = Layer("self", len(transformers), place, counts[place], factor_of(unet, name))
            counts[place] += 1
        layers[name] = known if which == "attn1" else replace(known, kind="cross")
    return layers


def factor_of(unet: Any, name: str) -> int:
    """Latents' side over the side of the hidden state in a module, by its name."""
    levels = len(unet.config.block_out_channels)
    start, level, *_ = name.split(".")
    if start == "mid_block":
        return int(2 ** (levels - 1))
    return int(2 ** int(level) if start == "down_blocks" else 2 ** (levels - 1 - int(level)))


def _transformers(unet: Any) -> list[tuple[Any, Transformer]]:
    """The stacks of transformer layers, in order of execution."""
    found = []
    for start, place in PLACES.items():
        part = getattr(unet, start)
        blocks = [("mid_block", part)] if place == "mid" else [(f"{start}.{n}", block) for n, block in enumerate(part)]
        modules = [(name, one) for name, block in blocks for one in getattr(block, "attentions", ())]
        modules = [(name, one) for name, one in modules if hasattr(one, "transformer_blocks")]
        for number, (name, module) in enumerate(modules):
            channels = int(module.in_channels)
            found.append((module, Transformer(place, number, factor_of(unet, f"{name}.0"), channels)))
    return found


def cross_attention_factors(unet: Any) -> tuple[int, ...]:
    """Downsampling factors at which the UNet has cross-attention outside its mid block, ascending."""
    layers = attention_layers(unet).values()
    return tuple(sorted({layer.factor for layer in layers if layer.kind == "cross" and layer.place != "mid"}))
