"""Which kernels a network's layers run as: what `engine/tuning.py` chooses between, and what is never chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear

from pipeline.engine.controls import Layer

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
JOINED = ("to_q", "to_k", "to_v")


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


def join_projections(attention: Any, layer: Layer, joined: bool) -> None:
    """Lay out the weights of what reads the same states as one matrix, or forget that they are.

    Args:
        attention: the module; its projections have no bias.
        layer: in self-attention queries, keys and values read the same; in cross-attention keys and values do.
        joined: which of both.
    """
    attention.joined = None
    if not joined:
        return
    chosen = [getattr(attention, name) for name in JOINED[layer.kind == "cross" :]]
    if any(one.bias is not None for one in chosen):
        return
    weight = torch.cat([one.weight.data for one in chosen])
    for one, own in zip(chosen, weight.split([one.out_features for one in chosen]), strict=True):
        one.weight.data = own  # a view: the matrix is held once
    attention.joined = weight


def projections(attention: Any, hidden: Tensor, context: Tensor) -> Sequence[Tensor]:
    """Queries (R, N, D), keys and values (R, N or L, D) of one layer, before they are split into heads."""
    weight = getattr(attention, "joined", None)
    if weight is None:
        return attention.to_q(hidden), attention.to_k(context), attention.to_v(context)
    widths = [getattr(attention, name).out_features for name in JOINED]
    if weight.shape[0] == sum(widths):
        return linear(hidden, weight).split(widths, dim=-1)
    return (attention.to_q(hidden), *linear(context, weight).split(widths[1:], dim=-1))
