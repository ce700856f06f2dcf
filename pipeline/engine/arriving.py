"""Answers on their way from the model's device to the CPU, where methods compute: begun at once, waited for later.

A GPU works through what it was given in order, and copies into page-locked memory by itself. So the host begins a copy
behind a call, marks the place, and does other things until the GPU has got there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.copying import copies_by_itself

Wait = Callable[[], None]
"""Returns once the device has got to a place that was marked."""


@dataclass(frozen=True, slots=True)
class Arriving:
    """An answer whose tensors are being copied; they may be read after `wait`."""

    answer: Any
    wait: Wait


def begin_copy(tensor: Tensor) -> Tensor:
    """The tensor on the CPU. From a GPU it arrives by and by: mark the place behind, and wait for it."""
    if not copies_by_itself(tensor.device):
        return tensor.cpu()
    if tensor.device.type != "cuda":
        return tensor.to("cpu", non_blocking=True)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def mark(device: torch.device) -> Wait:
    """Mark the end of what a device has been given so far."""
    if device.type != "cuda":
        return _there_already
    event = torch.cuda.Event(blocking=True)  # the thread sleeps meanwhile: others prepare and encode
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def _there_already() -> None:
    """Other devices are waited for by the copy itself."""
