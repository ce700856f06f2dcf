"""Network calls as captured CUDA graphs: a thousand kernels launched at once.

A graph is bound to the memory that it was captured with. So what a call is given is copied there first, and what it
answers lies there until the next call of its kind: the device works on both in the order in which they were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from typing_extensions import override

CALLS_BEFORE = 2  # of a function, before it is captured: libraries choose kernels and set up handles in the first ones


class Capture(Protocol):
    """Captures what a function launches."""

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Returns how to launch it again, and the function's answer, which every launch fills anew."""


class Replayed:
    """A function of tensors that is captured once per kind of call, and launched again from then on.

    Args:
        function: nothing that it does may be decided by what tensors hold, and nothing may wait for the device.
        capture: how; by CUDA graphs.
    """

    def __init__(self, function: Callable[..., Any], capture: Capture | None = None) -> None:
        self._function = function
        self._capture = capture or CudaGraphs()
        self._calls: dict[Hashable, _Captured] = {}

    def __call__(self, *given: Any) -> Any:
        """Launch it; what it answers lies where the next call of the same kind will write."""
        leaves, spec = tree_flatten(given)
        kind = (spec, tuple(map(_kind_of, leaves)))
        captured = self._calls.get(kind)
        if captured is None:
            captured = self._calls[kind] = self._captured(leaves, spec)
        return captured.launch(leaves)

    def _captured(self, leaves: Sequence[Any], spec: TreeSpec) -> _Captured:
        places = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        given = tree_unflatten(places, spec)
        for _ in range(CALLS_BEFORE):
            self._function(*given)
        return _Captured(places, *self._capture(lambda: self._function(*given)))


class _Captured:
    """One kind of call."""

    def __init__(self, places: Sequence[Any], again: Callable[[], None], answer: Any) -> None:
        self._places, self._again, self._answer = places, again, answer

    def launch(self, leaves: Sequence[Any]) -> Any:
        for place, leaf in zip(self._places, leaves, strict=True):
            if isinstance(leaf, Tensor):
                place.copy_(leaf, non_blocking=True)
        self._again()
        return self._answer


class CudaGraphs(Capture):
    """By CUDA graphs, all in one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    @override
    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads encode pictures meanwhile, and may allocate page-locked memory.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            answer = function()
        return graph.replay, answer


def _kind_of(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf  # a layout, which all calls of its kind share, or None
    return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
