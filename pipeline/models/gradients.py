"""Gradients of what methods make of a prediction, with respect to the text that the network read; and of what they make
of pixels, with respect to the latents that were decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.diffusion.copying import to_device
from pipeline.diffusion.levels import Prediction, stacked
from pipeline.engine.calls import PixelFunction


def gradients(
    predictions: Prediction, embeddings: Tensor, cotangents: Sequence[Callable[[Prediction], Prediction]]
) -> Tensor:
    """Of a function of each row's prediction, with respect to the row's embedding: (R, L, D).

    Args:
        predictions: (R, C, h, w), computed from `embeddings` with their history kept.
        embeddings: (R, L, D).
        cotangents: R; take a row's prediction, on the CPU, to the function's gradient there.
    """
    # Both halves at once: for the copy to the CPU the host waits.
    answered = Prediction(*torch.stack([predictions.noise, predictions.data]).detach().cpu())
    wanted = stacked([cotangent(answered[row]) for row, cotangent in enumerate(cotangents)])
    both = to_device(torch.stack([wanted.noise, wanted.data]).to(predictions.noise.dtype), predictions.noise.device)
    (found,) = torch.autograd.grad([predictions.noise, predictions.data], embeddings, list(both))
    return found


def pulled_back(latents: Tensor, decode: Callable[[Tensor], Tensor], function: PixelFunction) -> tuple[Tensor, Tensor]:
    """A function's value () at decoded pixels, and its gradient at the latents (C, h, w): see `DecodeGradient`.

    Args:
        latents: (C, h, w), on the model's device.
        decode: takes them to pixels (3, H, W), differentiably.
        function: of the pixels.
    """
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_()
        pixels = decode(leaf)
        value, gradient = function(pixels.detach())
        (found,) = torch.autograd.grad(pixels, leaf, gradient.to(pixels))
    return value.detach(), found
