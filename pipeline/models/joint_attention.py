"""Joint attention over image and text, opened once when a model is loaded: a row may use another row's values, and what
image places attend to of the text can be watched. Outside of such calls the layers answer as they always did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


class Projection(NamedTuple):
    """A module that makes queries, keys or values, and where these lie among the channels of its output (R, N, D)."""

    module: Any
    part: slice = slice(None)

    def replaced(self, made: Tensor, rows: Tensor) -> Tensor:
        """What the module put out, with these channels of other rows, (R,)."""
        taken = made[..., self.part][rows]
        if self.part == slice(None):
            return taken
        return torch.cat([made[..., : self.part.start], taken, made[..., self.part.stop :]], dim=-1)


class JointLayer(NamedTuple):
    """One joint attention module of diffusers, and how its sequence is laid out."""

    attention: Any
    text_first: bool  # of the sequence; else the image comes first
    one_stream: bool  # text and image come in as one sequence already

    @property
    def values(self) -> list[Projection]:
        """What makes its values."""
        if fused := self._fused:
            return [fused["value"]]
        modules = [self.attention.to_v] if self.one_stream else [self.attention.to_v, self.attention.add_v_proj]
        return [Projection(module) for module in modules]

    @property
    def projections(self) -> dict[str, Projection]:
        """What makes its queries and keys, by the names below."""
        if fused := self._fused:
            return {name: fused[name] for name in ("query", "key")}
        names = {"query": "to_q", "key": "to_k"}
        if not self.one_stream:
            names |= {"text_key": "add_k_proj"}
        return {name: Projection(getattr(self.attention, module)) for name, module in names.items()}

    @property
    def _fused(self) -> dict[str, Projection]:
        """By name, where one module makes all, and what the block's feed-forward takes (FLUX.2); else none."""
        module = getattr(self.attention, "to_qkv_mlp_proj", None)
        if module is None:
            return {}
        width = self.attention.inner_dim
        return {
            name: Projection(module, slice(at * width, (at + 1) * width))
            for at, name in enumerate(("query", "key", "value"))
        }


class Watched(NamedTuple):
    """What is watched in one call."""

    layers: frozenset[int]
    weights: Tensor  # (R, S, L) of the text's keys
    image_places: int  # of the sequence, without a reference's


class OpenedJoint:
    """The joint attention of one transformer: see the module.

    Args:
        layers: by number, in order of execution.
    """

    def __init__(self, layers: Mapping[int, JointLayer]) -> None:
        self._swaps: Mapping[int, Tensor] = {}
        self._watch: Watched | None = None
        self._made: dict[str, Tensor] = {}
        self._sums: list[Tensor] = []
        for number, layer in layers.items():
            for projection in layer.values:
                projection.module.register_forward_hook(partial(self._take, number, projection))
            for name, projection in layer.projections.items():
                projection.module.register_forward_hook(partial(self._keep, number, name, projection))
            layer.attention.register_forward_hook(partial(self._look, number, layer), with_kwargs=True)

    @contextmanager
    def acting(self, swaps: Mapping[int, Tensor], watch: Watched | None) -> Iterator[None]:
        """For one call: by layer the rows (R,) whose values each row uses, and what is watched."""
        self._swaps, self._watch, self._sums = swaps, watch, []
        try:
            yield
        finally:
            self._swaps, self._watch = {}, None
            self._made.clear()

    @property
    def watched(self) -> Tensor:
        """Of the last call, (R, S, N) over N image places: the weighted sum of attention to the text, mean over heads
        and over the watched layers. The softmax is over all keys."""
        return torch.stack(self._sums).mean(dim=0)

    def _take(self, number: int, values: Projection, _module: Any, _inputs: Any, made: Tensor) -> Tensor:
        rows = self._swaps.get(number)
        return made if rows is None else values.replaced(made, rows)

    def _keep(self, number: int, name: str, projection: Projection, _module: Any, _inputs: Any, made: Tensor) -> None:
        if self._watch is not None and number in self._watch.layers:
            self._made[name] = made[..., projection.part]

    def _look(
        self, number: int, layer: JointLayer, attention: Any, _inputs: Any, given: Mapping[str, Any], _output: Any
    ) -> None:
        if self._watch is None or number not in self._watch.layers:
            return
        query, key = _queries_and_keys(layer, self._made, self._watch, given.get("image_rotary_emb"))
        there = given.get("encoder_hidden_states_mask")  # (R, L) of the text's keys, where a model masks its padding
        self._sums.append(attended(query, key, self._watch.weights, text_first=layer.text_first, there=there))
        self._made.clear()


def _queries_and_keys(
    layer: JointLayer, made: Mapping[str, Tensor], watch: Watched, rotation: Any
) -> tuple[Tensor, Tensor]:
    """Queries (R, heads, N, d) of image places, and all keys (R, heads, M, d), as the layer used them."""
    attention, num_text = layer.attention, watch.weights.shape[-1]

    def heads(states: Tensor, norm: Any) -> Tensor:  # (R, M, heads, d)
        split = states.unflatten(-1, (attention.heads, -1))
        return split if norm is None else norm(split)

    query, key = heads(made["query"], attention.norm_q), heads(made["key"], attention.norm_k)
    if not layer.one_stream:
        text = heads(made["text_key"], attention.norm_added_k)
        key = torch.cat([text, key] if layer.text_first else [key, text], dim=1)
        if layer.text_first:  # rotated by its place in the whole sequence
            query = torch.cat([query.new_zeros((len(query), num_text, *query.shape[2:])), query], dim=1)
    if rotation is not None:
        query, key = (_rotated(states, rotation) for states in (query, key))
    first = num_text if layer.text_first else 0
    return query[:, first : first + watch.image_places].transpose(1, 2), key.transpose(1, 2)


def _rotated(states: Tensor, rotation: Any) -> Tensor:
    """States (R, M, heads, d) turned by their places: as FLUX has it, by sines and cosines of the whole sequence; or
    as Qwen-Image has it, by complex numbers of the image's places and, apart, of the text's, which come first."""
    if rotation[0].is_complex():
        image, text = rotation
        turns = torch.cat([text, image])[:, None]  # (M, 1, d / 2)
        turned = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(turned * turns).flatten(-2).to(states.dtype)
    from diffusers.models.embeddings import apply_rotary_emb

    rotated: Tensor = apply_rotary_emb(states, rotation, sequence_dim=1)
    return rotated


def attended(query: Tensor, key: Tensor, weights: Tensor, *, text_first: bool, there: Tensor | None = None) -> Tensor:
    """Attention of places (R, heads, N, d) to M keys, summed by weights (R, S, L) of the text's; mean over heads,
    (R, S, N). `there` (R, L) bool: which of the text's keys are seen at all; None: all.

    A fused attention whose values are the weights: no map is held. They are as wide as a head, as kernels want it.
    """
    rows, heads, keys, width = key.shape
    sums, num_text = weights.shape[1:]
    if sums > width:
        parts = [attended(query, key, some, text_first=text_first, there=there) for some in weights.split(width, dim=1)]
        return torch.cat(parts, dim=1)
    others = keys - num_text
    values = weights.mT.to(key.dtype)  # (R, L, S)
    values = pad(values, (0, width - sums, *((0, others) if text_first else (others, 0))))
    mask = None
    if there is not None:
        mask = pad(there, (0, others) if text_first else (others, 0), value=True)[:, None, None]  # (R, 1, 1, M)
    seen = scaled_dot_product_attention(query, key, values[:, None].expand(rows, heads, keys, width), attn_mask=mask)
    return seen[..., :sums].to(weights.dtype).mean(dim=1).mT
