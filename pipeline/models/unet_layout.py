"""Where attention and decoder blocks are in diffusers' UNet, told by its configuration alone, without building it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.engine.backbone import Bottleneck
from pipeline.engine.controls import (
    WATCHED_FACTOR,
    DecoderBlock,
    Layer,
    NetworkPart,
    Openings,
    ResidualBlock,
    Transformer,
)

WITHOUT_ATTENTION = ("DownBlock2D", "UpBlock2D", "UNetMidBlock2D", None)
WITH_ATTENTION = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn")
KNOWN_BLOCKS = (*WITHOUT_ATTENTION, *WITH_ATTENTION)


def block_types(unet: Mapping[str, Any]) -> list[Any]:
    """The classes of a UNet's blocks, in order of execution; None: no middle."""
    return [*unet["down_block_types"], _middle(unet), *unet["up_block_types"]]


def _middle(unet: Mapping[str, Any]) -> Any:
    return unet.get("mid_block_type", "UNetMidBlock2DCrossAttn")


def attention_layers_of(unet: Mapping[str, Any]) -> tuple[Layer, ...]:
    """A UNet's attention layers in order of execution: of every transformer block its self-, then its cross-attention.

    Raises:
        KeyError, TypeError, IndexError: the configuration is none of a UNet.
    """
    layers: list[Layer] = []
    counts: dict[NetworkPart, int] = {"down": 0, "mid": 0, "up": 0}
    for place, factor, depths in _transformers(unet):
        for _ in range(sum(depths)):
            index, index_in_place = len(layers) // 2, counts[place]
            layers += [Layer("self", index, place, index_in_place, factor)]
            layers += [Layer("cross", index, place, index_in_place, factor)]
            counts[place] += 1
    return tuple(layers)


def _transformers(unet: Mapping[str, Any]) -> Iterator[tuple[NetworkPart, int, Sequence[int]]]:
    """Of each block with attention its place, the latents' side over its own, and the depths of its transformers."""
    down, up = unet["down_block_types"], unet["up_block_types"]
    levels = len(down)
    layers = _per_level(unet.get("layers_per_block", 2), levels)
    depths = _per_level(unet.get("transformer_layers_per_block") or 1, levels)
    upwards = unet.get("reverse_transformer_layers_per_block") or depths[::-1]
    for level, kind in enumerate(down):
        if kind in WITH_ATTENTION:
            yield "down", 2**level, _per_level(depths[level], layers[level])
    if _middle(unet) in WITH_ATTENTION:
        yield "mid", 2 ** (levels - 1), _per_level(depths[-1], 1)[:1]
    for at, kind in enumerate(up):
        if kind in WITH_ATTENTION:
            yield "up", 2 ** (levels - 1 - at), _per_level(upwards[at], layers[levels - 1 - at] + 1)


def _per_level(value: Any, count: int) -> list[Any]:
    return [value] * count if isinstance(value, int) else list(value)


def openings_of_config(unet: Mapping[str, Any]) -> Openings:
    """Where a UNet of this configuration will let controls in, as `openings_of` tells of the built one.

    Raises:
        KeyError, TypeError, IndexError: the configuration is none of a UNet.
    """
    layers = attention_layers_of(unet)
    return Openings(
        layers=tuple(layer for layer in layers if layer.kind == "self"),
        watched=frozenset(
            layer.index
            for layer in layers
            if layer.kind == "cross" and layer.place != "mid" and layer.factor == WATCHED_FACTOR
        ),
        residuals=_residuals(unet),
        transformers=_stacks(unet),
        decoder=decoder_of(unet),
    )


def bottleneck_of_config(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Bottleneck | None:
    """The narrowest place of a UNet on an autoencoder's latents; None: it has no middle.

    Raises:
        KeyError, TypeError: the configurations are none of these.
    """
    if _middle(unet) is None:
        return None
    channels = unet["block_out_channels"]
    return Bottleneck(
        layer="mid_block",
        channels=int(channels[-1]),
        factor=int(2 ** (len(channels) - 1)),
        latent_channels=int(vae.get("latent_channels", 4)),
        latent_scale=int(2 ** (len(vae.get("block_out_channels", (64,))) - 1)),
        side=int(unet["sample_size"]),
    )


def _residuals(unet: Mapping[str, Any]) -> tuple[ResidualBlock, ...]:
    levels = len(unet["up_block_types"])
    layers = _per_level(unet.get("layers_per_block", 2), levels)[::-1]
    places = ((index, within) for index in range(levels) for within in range(layers[index] + 1))
    return tuple(ResidualBlock(index, within, 2 ** (levels - 1 - index)) for index, within in places)


def decoder_of(unet: Mapping[str, Any]) -> tuple[DecoderBlock, ...]:
    """A UNet's blocks of the decoder, in order of execution: all but the last double the side."""
    channels = list(unet["block_out_channels"])[::-1]
    last = len(channels) - 1
    return tuple(DecoderBlock(2 ** max(0, last - at - 1), count) for at, count in enumerate(channels))


def _stacks(unet: Mapping[str, Any]) -> tuple[Transformer, ...]:
    channels = unet["block_out_channels"]
    stacks: list[Transformer] = []
    counts: dict[NetworkPart, int] = {"down": 0, "mid": 0, "up": 0}
    for place, factor, depths in _transformers(unet):
        for _ in depths:
            stacks.append(Transformer(place, counts[place], factor, channels[factor.bit_length() - 1]))
            counts[place] += 1
    return tuple(stacks)
