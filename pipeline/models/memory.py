"""What a checkpoint needs of a device's memory, from its configuration files alone: no weight is fetched or read.

Bytes of the networks are counted on the true architectures, built without memory (torch's meta device). What a call
takes beside them is estimated from the widest tensors that it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from pipeline.models.checkpoint import Components, Configurations
from pipeline.models.offload import STAYS
from pipeline.models.placing import T5

if TYPE_CHECKING:
    from pipeline.models.families.base import Family

GIB = 2**30
SHOWN_FROM = GIB  # smaller models fit anywhere
# Tensors of a block's width that are held at once: what comes in, queries, keys, values, what attention gives, and the
# feed-forward's inner layer of four widths, before and after its activation.
HELD = 16
HELD_OF_PICTURES = 4  # of an autoencoder's widest level: what comes in, normalised, convolved, added
QUANTIZED = 1  # bytes of a parameter in 8 bit


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes on the device."""

    parts: Mapping[str, int]  # networks, by name
    in_8_bit: int = 0  # of the text encoders, what is loaded so, and stays
    block: int  # the largest block of the network
    rest: int  # of the network, what is in no block
    row: int  # estimated: what one row of a network call takes beside
    picture: int  # estimated: what decoding one picture takes beside

    @property
    def text(self) -> int:
        """All text encoders."""
        return sum(size for name, size in self.parts.items() if name.startswith("text_encoder"))

    @property
    def network(self) -> int:
        """The part that is called once per step."""
        return sum(self.parts.values()) - self.text - self.parts.get(STAYS, 0)

    def under(self, offload: str) -> int:
        """All networks that are on the device at once, at most, under a `model.offload`."""
        if offload == "none":
            return sum(self.parts.values())
        # One block works while the next one comes.
        network = self.network if offload == "components" else min(self.network, self.rest + 2 * self.block)
        return max(self.text - self.in_8_bit, network) + self.in_8_bit + self.parts.get(STAYS, 0)

    def in_words(self, offload: str, dtype: torch.dtype) -> str:
        """ "needs about 31.5 GiB ...": for a plan."""
        listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sorted(self.parts.items()))
        others = ", ".join(
            f"{'' if one == 'none' else 'model.offload: '}{one if one != 'none' else 'without offload'} "
            f"{self.under(one) / GIB:.1f} GiB"
            for one in ("none", "components", "layers")
            if one != offload
        )
        return (
            f"memory: needs about {self.under(offload) / GIB:.1f} GiB on the device for networks in "
            f"{str(dtype).removeprefix('torch.')} ({listed}), and by estimate {self.row / GIB:.2f} GiB for each row of "
            f"a call, {self.picture / GIB:.2f} GiB for a picture that is decoded; {others}"
        )


def needs_of(
    family: Family,
    configurations: Configurations,
    components: Components,
    *,
    size: int | None,
    dtype: torch.dtype,
    text_8bit: bool = False,
) -> Needs:
    """What a checkpoint of this family needs.

    Args:
        family: its own.
        configurations: its files.
        components: that are loaded.
        size: side of the images in pixels; None: the checkpoint's.
        dtype: of the networks.
        text_8bit: whether T5 is loaded in 8 bit.

    Raises:
        KeyError, TypeError, ValueError: the configurations make no such networks.
    """
    parts: dict[str, int] = {}
    block = rest = in_8_bit = 0
    of_pictures = family.autoencoder_dtype(configurations, dtype).itemsize
    for name, component in components.items():
        if component.kind != "network" or name not in configurations.parts:
            continue
        network = without_memory(component.library, component.classes[0], configurations.parts[name])
        parts[name] = (of_pictures if name == STAYS else dtype.itemsize) * _count(network)
        if text_8bit and component.classes[0] == T5:
            parts[name] = QUANTIZED * _count(network)
            in_8_bit += parts[name]
        if name != STAYS and not name.startswith("text_encoder"):
            lists = [group for group in network.children() if isinstance(group, torch.nn.ModuleList)]
            blocks = [_count(one) for group in lists for one in group]
            block, rest = dtype.itemsize * max(blocks, default=0), dtype.itemsize * (_count(network) - sum(blocks))
    levels = family.autoencoder_levels(configurations)
    scale = 2 ** (len(levels) - 1)
    side = size or scale * family.side(configurations)
    places, channels = family.widest(configurations, side // scale)
    return Needs(
        parts=parts,
        in_8_bit=in_8_bit,
        block=block,
        rest=rest,
        row=HELD * places * channels * dtype.itemsize,
        picture=HELD_OF_PICTURES * side * side * levels[min(1, len(levels) - 1)] * of_pictures,
    )


def without_memory(library: str, name: str, configuration: Mapping[str, Any]) -> torch.nn.Module:
    """A network of a library, of its true architecture, whose parameters take no memory."""
    cls = getattr(import_module(library), name)
    given = {key: value for key, value in configuration.items() if key != "dtype"}
    with torch.device("meta"):
        if library == "diffusers":
            network: torch.nn.Module = cls.from_config(given)
        else:
            network = cls(cls.config_class.from_dict(given))
    return network


def _count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
