"""Which kernels a network's layers run as: what `engine/tuning.py` chooses between, and what is never chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, pad

from pipeline.engine.controls import Layer

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
JOINED = ("to_q", "to_k", "to_v")
VECTOR_WIDTH = 16  # float32 numbers that fill a CPU's vector registers well


def asking_first(attention: str) -> AbstractContextManager[None]:
    """Let attention use these kernels where they can do what a layer wants, else those that come next; all are exact.

    Args:
        attention: a key of `BACKENDS`, or default for torch's own order.
    """
    if attention == "default":
        return nullcontext()
    first = BACKENDS[attention]
    others = [backend for backend in BACKENDS.values() if backend != first]
    return sdpa_kernel([first, *others, SDPBackend.MATH], set_priority=True)


class Wide(NamedTuple):
    """Weights of a layer whose heads are filled up with zeros."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


@contextmanager
def exact_float32(inputs: Tensor) -> Iterator[None]:
    """Products of float32 are products of float32: on a GPU torch's convolutions would keep ten bits of each factor
    (TF32). Who wants the speed of that sets `model.dtype: bfloat16`."""
    if inputs.dtype != torch.float32 or inputs.device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def widen_heads(attention: Any) -> None:
    """On a CPU, let a layer's projections fill heads of fewer than 16 numbers up with zeros, which change no sum.

    Attention over 1,024 positions is 1.45 times as fast with heads of 16 as with heads of 8, and as part of the weights
    the zeros cost no copy of queries, keys, values and results.

    Args:
        attention: the module. Its own weights stay as they are: a reference may run on them.
    """
    heads, width = attention.heads, attention.to_q.out_features // attention.heads
    more = VECTOR_WIDTH - width
    chosen = [getattr(attention, name) for name in JOINED]
    attention.wide = None
    if more <= 0 or attention.to_q.weight.device.type != "cpu" or any(one.bias is not None for one in chosen):
        return
    out = attention.to_out[0].weight.data.unflatten(1, (heads, width))
    query, key, value = (
        pad(one.weight.data.unflatten(0, (heads, width)), (0, 0, 0, more)).flatten(0, 1) for one in chosen
    )
    attention.wide = Wide(query, key, value, pad(out, (0, more)).flatten(1))


def join_projections(attention: Any, layer: Layer, joined: bool) -> None:
    """Lay out the weights of what reads the same states as one matrix, or forget that they are.

    Args:
        attention: the module; its projections have no bias.
        layer: in self-attention queries, keys and values read the same; in cross-attention keys and values do.
        joined: which of both.
    """
    attention.joined = None
    if not joined:
        widen_heads(attention)
        return
    chosen = [getattr(attention, name) for name in JOINED[layer.kind == "cross" :]]
    if any(one.bias is not None for one in chosen):
        return
    weight = torch.cat([one.weight.data for one in chosen])
    for one, own in zip(chosen, weight.split([one.out_features for one in chosen]), strict=True):
        one.weight.data = own  # a view: the matrix is held once
    attention.joined, attention.wide = weight, None


def projections(attention: Any, hidden: Tensor, context: Tensor) -> Sequence[Tensor]:
    """Queries (R, N, D), keys and values (R, N or L, D) of one layer, before they are split into heads."""
    if (wide := attention.wide) is not None:
        return linear(hidden, wide.query), linear(context, wide.key), linear(context, wide.value)
    weight = getattr(attention, "joined", None)
    if weight is None:
        return attention.to_q(hidden), attention.to_k(context), attention.to_v(context)
    widths = [getattr(attention, name).out_features for name in JOINED]
    if weight.shape[0] == sum(widths):
        return linear(hidden, weight).split(widths, dim=-1)
    return (attention.to_q(hidden), *linear(context, weight).split(widths[1:], dim=-1))


def output_projection(attention: Any, attended: Tensor) -> Tensor:
    """What one layer puts out, (R, N, D'), from its heads side by side (R, N, D)."""
    out = attention.to_out[0]
    made = out(attended) if attention.wide is None else linear(attended, attention.wide.out, out.bias)
    dropped: Tensor = attention.to_out[1](made)
    return dropped
