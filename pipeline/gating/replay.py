"""The gate before the edit: what an inversion's trajectory gives back when it is replayed without any edit.

Cost: one network row per step and trajectory (two with a guided source prompt) and one decoding, whatever the number of
edits that read it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.calls import DecodeLatents, Steps
from pipeline.errors import InvertError
from pipeline.evaluation.metrics import psnr
from pipeline.records import Decoded, EditRequest, Prepared, Trajectory


class Replayed(NamedTuple):
    """A trajectory's own picture."""

    pixels: np.ndarray  # (h, w, 3) uint8 at model size
    psnr: float  # dB, against the input at model size


def replay(trajectory: Trajectory, prepared: Prepared) -> Steps[Replayed]:
    """Walk a trajectory back under the inversion's own predictions, and compare.

    Raises:
        InvertError: its values are not finite.
    """
    back = yield from Reconstruct().edit(trajectory, EditRequest())
    if not bool(torch.isfinite(back.latents).all()):
        raise InvertError("the replayed trajectory is not finite. Try model.dtype float32 or other settings")
    pixels = yield DecodeLatents(back.latents)
    found = psnr(prepared.pixels, pixels)
    assert found is not None, "a picture has pixels"
    return Replayed(pixels, found)


def stopped(prepared: Prepared, replayed: Replayed, edit: str, name: str, seed: int) -> Decoded:
    """A result that is no edit: its trajectory does not give the image back."""
    return Decoded(
        prepared=prepared,
        edit=edit,
        method=name,
        pixels=replayed.pixels,
        round_trip=None,
        masks=None,
        seed=seed,
        inversion_psnr=replayed.psnr,
        stopped=True,
    )
