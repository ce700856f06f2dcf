"""What a network call makes the host wait for, and what the device computes beside the network: counted, not timed.

The model lies on torch's meta device, which computes nothing and refuses tensors of others; the layers are those of the
tiny checkpoints, all of them, since a copy in a layer is what must not be. A copy blocks unless it asks not to: torch
then waits for the device. That a copy's memory is page-locked cannot be seen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from benchmarks.jobs import Job, from_latents
from pipeline.engine.engine import Engine
from pipeline.models.loading import load_backbone
from pipeline.models.stable_diffusion import StableDiffusion
from pipeline.recipe import ModelConfig

aten = torch.ops.aten
SIDE = 16  # of the latents; how many copies and kernels there are does not depend on it
IMAGES = 3
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.lift_fresh)


class Counts(NamedTuple):
    """Of one network call, on average."""

    blocking_copies: float  # to the device and back
    kernels_outside: float  # that the device runs beside the network


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of torch, as it is dispatched."""

    function: Any
    given: list[torch.Tensor]
    made: list[torch.Tensor]
    non_blocking: bool

    @property
    def copies(self) -> bool:
        """Whether numbers go to the device or come from it."""
        given, made = ({one.is_meta for one in tensors} for tensors in (self.given, self.made))
        return self.function in (aten._to_copy.default, aten.copy_.default) and len(given | made) == 2

    @property
    def is_kernel(self) -> bool:
        """Whether the device computes something."""
        touches = any(one.is_meta for one in self.made)
        return touches and not self.function.is_view and self.function.overloadpacket not in ALLOCATIONS


class Counting(TorchDispatchMode):
    """Counts what happens under it; what comes from the device is made up, small random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.blocking = self.kernels = 0
        self._inside = False
        self._generator = torch.Generator().manual_seed(0)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        given = [one for one in tree_leaves((args, named)) if isinstance(one, torch.Tensor)]
        made = self._from_device(func, args, named)
        if made is None:
            made = func(*args, **named)
        results = [one for one in tree_leaves(made) if isinstance(one, torch.Tensor)]
        non_blocking = bool(named.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
        self._count(Operation(func, given, results, non_blocking))
        return made

    def _from_device(self, func: Any, args: Any, named: Any) -> torch.Tensor | None:
        """What a copy to the CPU gives; None: it is none."""
        to = named.get("device")
        if func is aten._to_copy.default and args[0].is_meta and to is not None and to.type == "cpu":
            made = torch.empty(args[0].shape, dtype=named.get("dtype") or args[0].dtype)
        elif func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            made = args[0]
        else:
            return None
        return made.normal_(generator=self._generator).mul_(0.01) if made.is_floating_point() else made.zero_()

    def _count(self, operation: Operation) -> None:
        if operation.copies:
            self.blocking += not operation.non_blocking
        # A backward pass is the network's as well; torch runs it within a task of its own.
        elif operation.is_kernel and not self._inside and torch._C._current_graph_task_id() == -1:
            self.kernels += 1

    @contextmanager
    def watching(self, network: torch.nn.Module) -> Iterator[None]:
        """Tell the network's own kernels from others, and count its calls."""

        def enter(*_: Any) -> None:
            self.calls += 1
            self._inside = True

        def leave(*_: Any) -> None:
            self._inside = False

        hooks = (network.register_forward_pre_hook(enter), network.register_forward_hook(leave))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()


@cache
def on_meta(folder: str) -> StableDiffusion:
    """A tiny checkpoint on the meta device."""
    backbone = load_backbone(ModelConfig(name=folder), device="meta")
    assert isinstance(backbone, StableDiffusion)
    return backbone


def counts(job: Job, folder: str, call_size: int, steps: int = 5) -> Counts:
    """Of a job on a tiny checkpoint, over so few steps that every kind of call is among them."""
    few, model = job.smaller(steps=steps), on_meta(folder)
    engine = Engine(model, call_size=call_size)

    def edit(images: int) -> None:
        for finished in engine.run(from_latents(few, model, images, (SIDE, SIDE))):
            if finished.error is not None:
                raise finished.error

    with Counting():
        edit(1)  # prompts are encoded once a run, not once a call
    counting = Counting()
    with counting.watching(model.unet):
        edit(IMAGES)
    return Counts(counting.blocking / counting.calls, counting.kernels / counting.calls)
