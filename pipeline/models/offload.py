"""Networks that take turns on the device, for checkpoints that are larger than its memory.

Text encoders and the network are never wanted at once: whoever is called comes to the device, and the other goes back
to memory. The autoencoder is small and stays. Of a network that is larger than the device, its blocks come one by one,
as diffusers does it (`enable_group_offload`). Nothing is computed otherwise: a result has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch

from pipeline.engine.backbone import Backbone

T = TypeVar("T")
Offload = Literal["none", "components", "layers"]
Part = Literal["text", "network"]
STAYS = "vae"
CALLS: dict[str, Part] = {
    "encode_text": "text",
    "encode_texts": "text",
    "encode_text_of": "text",
    "denoise": "network",
    "product": "network",
}
"""Calls of a backbone, and what must be on the device for them."""


class Turns:
    """Who is on the device. Called from one thread at a time, like a backbone.

    Args:
        device: where networks work.
        layers: whether the network's blocks come one by one.
    """

    def __init__(self, device: torch.device, *, layers: bool) -> None:
        self._device, self.layers = device, layers
        self._parts: dict[Part, list[Any]] = {"text": [], "network": []}
        self._there: Part | None = None

    def add(self, name: str, network: Any) -> None:
        """Take care of a network of a checkpoint, which lies in memory."""
        if name == STAYS:
            network.to(self._device)
        elif name.startswith("text_encoder"):
            if not getattr(network, "is_quantized", False):  # that one stays where it was loaded
                self._parts["text"].append(network)
        elif self.layers:
            network.enable_group_offload(
                onload_device=self._device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=self._device.type == "cuda",
            )
        else:
            self._parts["network"].append(network)

    def take(self, part: Part) -> None:
        """Bring a part to the device, once the other has left it."""
        if self._there == part:
            return
        for other, networks in self._parts.items():
            if other != part:
                for network in networks:
                    network.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # a freed block of another size is of no use to the one that comes
        for network in self._parts[part]:
            network.to(self._device)
        self._there = part

    def before(self, part: Part, call: Callable[..., T]) -> Callable[..., T]:
        """A call that finds a part on the device."""

        def taking_its_turn(*arguments: Any, **named: Any) -> T:
            self.take(part)
            return call(*arguments, **named)

        return taking_its_turn


def take_turns(backbone: Backbone, turns: Turns) -> None:
    """Let every call of a backbone find what it needs on the device."""
    for name, part in CALLS.items():
        setattr(backbone, name, turns.before(part, getattr(backbone, name)))
    if turns.layers:  # a block that has left the device takes no part in a way back through the network
        backbone.offers = replace(backbone.offers, embedding_gradients=False, bottleneck=None)
