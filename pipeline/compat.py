"""What exists for parity with reference implementations alone: replays of their recordings need it, no edit does."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SETTINGS = {  # of the methods' settings, by method
    "ddpm": ("exact_last_step", "eta_form"),
    "null_text": ("learning_rate_steps",),
    "diffedit": ("background",),
    "fast_diffedit": ("background",),
    "plug_and_play": ("compat_shift",),
    "uni_inv": ("clean_end",),
    "uniedit_flow": ("cell",),
}
PUBLISHED = {"l0": "soft", "l1": "l1_compat"}  # ProxEdit's names in the published code: what they compute


def prox_by_what_it_computes(value: Any) -> Any:
    """The name here of what the published code of ProxEdit computes under a name of its own; others as they are."""
    if not isinstance(value, str) or value not in PUBLISHED:
        return value
    _note_published_name(value)
    return PUBLISHED[value]


@cache
def _note_published_name(name: str) -> None:
    log.warning(
        "prox: %s is the published code's name for what is prox: %s here. The paper's l0 is prox: hard",
        name,
        PUBLISHED[name],
    )


def shrunk_again(shrunk: Tensor, threshold: float) -> Tensor:
    """The second shrinking of ProxEdit's published l1, which turns the sign of some: in this order, on the result."""
    shrunk = torch.where(shrunk > 0, shrunk - threshold, shrunk)
    return torch.where(shrunk < 0, shrunk + threshold, shrunk)


def one_step_less_noisy(latents: Tensor) -> Tensor:
    """Latents (N + 1, C, h, w) of a walk as the published comparison of `ddim` with `direct` reads them."""
    return torch.cat([latents[1:], latents[-1:]])
