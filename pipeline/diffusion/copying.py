"""Copies to the model's device that do not wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copies_by_itself(device: torch.device) -> bool:
    """Whether a device copies in its own time, in the order of what it was given. Torch's meta device stands for one
    where there is none, to count what would be waited for."""
    return device.type in ("cuda", "meta")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. To a GPU it goes from page-locked memory, behind what the GPU has been given already:
    from any other memory the host would wait until the GPU gets there."""
    if not copies_by_itself(device) or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def stacked_on(device: torch.device, tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape, stacked on a device: one copy for all that lie elsewhere."""
    away = [number for number, tensor in enumerate(tensors) if tensor.device.type != device.type]
    if not away:
        return torch.stack(list(tensors))
    there = list(tensors)
    moved = to_device(torch.stack([tensors[number] for number in away]), device)
    for number, tensor in zip(away, moved, strict=True):
        there[number] = tensor
    return torch.stack(there) if len(away) < len(there) else moved
