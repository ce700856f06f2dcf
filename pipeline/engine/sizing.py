"""How many rows a network call should have on this device: found by a probe when the model is loaded.

Too few leave a GPU idle, too many wait for rows, pad, and run out of memory. The size is part of a run's record, since
bits are equal within one call size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import NetworkCall

CANDIDATES = (4, 8, 16, 32, 64, 128)  # ascending
GOOD_ENOUGH = 0.95  # share of the best throughput at which the smaller call is preferred
ROUNDS = 3  # timed calls per size, after one that is not


def best_call_size(rows_per_second: Callable[[int], float | None]) -> int:
    """The smallest call whose throughput is within 5 % of the best.

    Args:
        rows_per_second: measures a call size; None where it does not fit into memory. Larger ones are then not tried.

    Returns:
        One of `CANDIDATES`; the smallest where none fits.
    """
    measured: dict[int, float] = {}
    for size in CANDIDATES:
        rate = rows_per_second(size)
        if rate is None:
            break
        measured[size] = rate
    if not measured:
        return CANDIDATES[0]
    # The autoencoder and fragmentation need memory, too: of sizes that ran into the limit the largest is not taken.
    if len(measured) < len(CANDIDATES) and len(measured) > 1:
        del measured[max(measured)]
    best = max(measured.values())
    return min(size for size, rate in measured.items() if rate >= GOOD_ENOUGH * best)


def probe_call_size(backbone: Backbone, image_size: int) -> int:
    """Time calls of several sizes on the model's own device, for square images of `image_size` pixels."""

    def rows_per_second(size: int) -> float | None:
        call = trial_call(backbone, image_size, size)
        prompt = call.conditioning[0]
        if prompt.positions and backbone.offers.watches:
            watch = torch.zeros((size, 1, prompt.length))
            watch[:, 0, prompt.positions[0]] = 1.0
            call = replace(call, watch=watch)
        try:
            started = 0.0
            for round_ in range(ROUNDS + 1):
                if round_ == 1:
                    started = time.perf_counter()
                # The answer is brought to the CPU, as the engine does: that waits for the device.
                backbone.denoise(call).predictions.both(torch.Tensor.cpu)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        return size * ROUNDS / (time.perf_counter() - started)

    return best_call_size(rows_per_second)


def trial_call(backbone: Backbone, image_size: int, rows: int) -> NetworkCall:
    """A plain call of rows of noise, each its own, for square images of about `image_size` pixels."""
    side = image_size // backbone.multiple * backbone.multiple // backbone.latent_scale
    shape = (rows, backbone.latent_channels, side, side)
    prompt = backbone.encode_text("a photo")
    level = backbone.schedule.steps(2, (side, side))[-1].start
    return NetworkCall(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        [level] * rows,
        [prompt] * rows,
        beside={name: torch.zeros((rows, 1 + shape[1], side, side)) for name in backbone.offers.inputs},
    )
