"""A result back at its original's size: image, masks, figures. Needs no model: done beside the engine, not in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
import torch

from pipeline.diffusion.masks import blended, with_soft_edge
from pipeline.errors import EditError, RowError, ShardeditError
from pipeline.evaluation.metrics import figures
from pipeline.reading.placement import restore, restore_mask
from pipeline.reading.requests import refusal_by
from pipeline.records import Decoded, Edited, Outcome, Rejected


def outcome_of(result: Decoded | Rejected, gates: Callable[[Edited], Edited] | None = None) -> Outcome:
    """What becomes of a result: restored, and judged by gates where there are any; or failed in stage "encode"."""
    if isinstance(result, Rejected):
        return result
    try:
        edited = restored(result)
        return edited if gates is None else gates(edited)
    except Exception as error:
        if isinstance(error, ShardeditError) and not isinstance(
            error, RowError
        ):  # a judge that cannot be asked: the run's
            raise
        return Rejected.by(refusal_by(error, "encode"), result.prepared.sample, result.edit, result.method)


def restored(decoded: Decoded) -> Edited:
    """A result at its original's size, with its figures."""
    prepared, placement = decoded.prepared, decoded.prepared.placement
    masks, union = regions(decoded)
    image = restore(decoded.pixels, placement, prepared.original)
    if decoded.edge is not None:
        image = _on_input(image, decoded, union, decoded.edge)
    return Edited(
        sample=prepared.sample,
        edit=decoded.edit,
        method=decoded.method,
        request=prepared.requests[decoded.edit],
        image=image,
        original=prepared.original,
        masks=masks,
        mask=union,
        seed=decoded.seed,
        basis=decoded.basis,
        recorded=decoded.recorded,
        inversion_psnr=decoded.inversion_psnr,
        stopped=decoded.stopped,
        denoise_gain=decoded.denoise_gain,
        attempt=prepared.attempt,
        answer=decoded.answer,
        figures={}
        if decoded.basis is not None or not decoded.is_compared
        else figures(
            original=prepared.original,
            round_trip=None  # or one that is held nowhere else
            if decoded.round_trip is None
            else restore(decoded.round_trip, placement, prepared.original),
            edited=image,
            mask=union,
        ),
    )


def _on_input(image: np.ndarray, decoded: Decoded, mask: np.ndarray | None, edge: int) -> np.ndarray:
    """A result laid on its input by its masks: beyond an edge of two latents around them it is the input.

    Raises:
        EditError: there is no input, or no mask.
    """
    prepared = decoded.prepared
    if prepared.sample.blank:
        raise EditError(
            "sink.background: input lays a result on its input, and the row brings no image. Set sink.background: "
            "result"
        )
    if mask is None and decoded.masks is None:
        raise EditError(
            "sink.background: input lays a result on its input by its mask, and this one has none. Give the row one "
            "(source.mask), use a method that finds one, or set sink.background: result"
        )
    if mask is None:  # a method that found nothing to change
        return prepared.original.copy()
    placement = prepared.placement
    radius = max(1, round(edge * placement.crop[2] / placement.scaled[0]))
    over, under, region = (torch.from_numpy(one.copy()) for one in (image, prepared.original, mask))
    return blended(over, under, with_soft_edge(region, radius)).numpy()


def regions(decoded: Decoded) -> tuple[tuple[np.ndarray | None, ...], np.ndarray | None]:
    """Where an edit acted, at its original's size: the masks that it found, and their union; None where nowhere.

    Cut to the user's mask here, for every method, and after scaling: no rounding lets a pixel out.
    """
    prepared = decoded.prepared
    allowed = prepared.allowed
    found = decoded.masks
    if found is None:  # it acted wherever it may: inside the user's mask; or everywhere, which is no region
        found = () if allowed is None else (np.ones(prepared.placement.canvas, dtype=bool),)
    at_original = [restore_mask(mask, prepared.placement) for mask in found]
    inside = at_original if allowed is None else [mask & allowed for mask in at_original]
    masks = tuple(mask if mask.any() else None for mask in inside)
    some = [mask for mask in masks if mask is not None]
    return masks if decoded.masks is not None else (), reduce(np.logical_or, some) if some else None
