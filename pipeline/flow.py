"""READ FIRST. One unit of work on its way, top to bottom; every other folder serves a line of this file.

    reading    a chunk of one shard becomes samples
    prepare    a sample becomes pixels at model size, and the requests that apply to it
    inversion  pixels become a trajectory, once per image and inversion setting
    editing    a trajectory and a request become edited latents and masks
    restore    edited latents become an image and masks at the original's size
    writing    outcomes become rows, files and, last, the manifest that commits them

The functions here are generators over one image. The engine runs those of many images at once (engine/engine.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import DecodeLatents, EncodeImage, Fork, Steps
from pipeline.engine.engine import Engine
from pipeline.errors import BlackImageError, ClusterError, EditError, InvertError, RowError, Stage
from pipeline.evaluation.metrics import figures
from pipeline.inversion.base import Inversion, draw_from
from pipeline.reading.ahead import Ahead
from pipeline.reading.decoder import Decodes
from pipeline.reading.prepare import prepare, requests_of, restore, restore_mask
from pipeline.recipe import Method, Recipe
from pipeline.records import (
    Decoded,
    Edited,
    EditedLatents,
    InversionPrompts,
    Outcome,
    Prepared,
    Rejected,
    Sample,
    Source,
    Trajectory,
    Unreadable,
)

NEARLY_BLACK = 8  # of 255: what compression leaves of a black image


def edit_rows(
    rows: Iterable[Sample | Unreadable], recipe: Recipe, engine: Engine, decoder: Decodes
) -> Iterator[Decoded | Rejected]:
    """Edit the rows of a unit: every (image, edit, method) asked for comes back once, as `Decoded` or `Rejected`.

    Outcomes come in whatever order they finish. Several units may run on one engine, from several threads.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        ready = Ahead(rows, lambda row: prepare_row(row, recipe, engine.backbone, decoder))
        pool.submit(ready.fill)
        steps = (None if one is None else _edit_ready(one, recipe, engine.backbone) for one in ready)
        try:
            for finished in engine.run(steps):
                if finished.error is not None:  # a fault of ours, not of a row: those become outcomes
                    raise finished.error
                yield from finished.value
                ready.let_go(finished.index)
        finally:
            ready.close()


def edit_row(
    row: Sample | Unreadable, recipe: Recipe, backbone: Backbone, decoder: Decodes
) -> Steps[list[Decoded | Rejected]]:
    """All edits of one row by all methods of the recipe."""
    return (yield from _edit_ready(prepare_row(row, recipe, backbone, decoder), recipe, backbone))


def _edit_ready(
    ready: Prepared | list[Decoded | Rejected], recipe: Recipe, backbone: Backbone
) -> Steps[list[Decoded | Rejected]]:
    if not isinstance(ready, Prepared):
        return ready
    return (yield from edit_prepared(ready, recipe.all_methods, recipe.run.seed, backbone))


def prepare_row(
    row: Sample | Unreadable, recipe: Recipe, backbone: Backbone, decoder: Decodes
) -> Prepared | list[Decoded | Rejected]:
    """Decode and check one row; or everything that was asked of it, rejected."""
    if isinstance(row, Unreadable):
        return [
            Rejected(
                sample=row.sample,
                edit=edit,
                method=method,
                stage="read",
                error_class=row.error_class,
                message=row.message,
            )
            for edit, method in asked_without(recipe)
        ]
    try:
        requests = requests_of(row, recipe)
    except Exception as error:
        return [rejected(row, edit, method, "prepare", error) for edit, method in asked_without(recipe)]
    try:
        size = recipe.model.size or backbone.image_size
        return prepare(row, recipe, size=size, multiple=backbone.multiple, decoder=decoder)
    except ClusterError:  # no decoder can be started: no row is to blame
        raise
    except Exception as error:
        return [rejected(row, edit, method, "decode", error) for edit in requests for method in recipe.all_methods]


def asked_without(recipe: Recipe) -> list[tuple[str, str]]:
    """What is asked of a row whose own edits are not known: the job's edits, or one without a name."""
    return [(edit, method) for edit in (list(recipe.edits) or [""]) for method in recipe.all_methods]


def edit_prepared(
    prepared: Prepared, methods: dict[str, Method], run_seed: int, backbone: Backbone
) -> Steps[list[Decoded | Rejected]]:
    """Invert once per inversion and prompts that it runs under, then edit by every request and method, side by side."""
    sample = prepared.sample
    groups: dict[tuple[Inversion, InversionPrompts], list[tuple[str, str]]] = {}
    outcomes: list[Decoded | Rejected] = []
    for edit, request in prepared.requests.items():
        for name, method in methods.items():
            try:
                method.editing.check(request, method.inversion, masked=prepared.mask is not None)
            except Exception as error:
                outcomes.append(rejected(sample, edit, name, "prepare", error))
                continue
            groups.setdefault((method.inversion, method.editing.inverts_under(request)), []).append((edit, name))
    if not groups:
        return outcomes
    try:
        latents = yield EncodeImage(prepared.pixels)
        round_trip = yield DecodeLatents(latents)
    except Exception as error:
        return outcomes + [rejected(sample, *pair, "invert", error) for pairs in groups.values() for pair in pairs]

    children = []
    for (inversion, prompts), pairs in groups.items():
        seed = seed_for(run_seed, sample.id, inversion.method)
        source = Source(
            latents=latents,
            prompt=prompts.prompt,
            negative_prompt=prompts.negative_prompt,
            schedule=backbone.schedule,
            draw_noise=draw_from(seed, tuple(latents.shape), latents.dtype),
            editing_noise=partial(
                draw_from, seed_for(run_seed, sample.id, "editing"), tuple(latents.shape), latents.dtype
            ),
            pixels=prepared.pixels,
            placement=prepared.placement,
        )
        children.append(_invert_and_edit(prepared, inversion, source, pairs, methods, seed, round_trip))
    for result in (yield Fork(tuple(children))):
        if isinstance(result, Exception):
            raise result
        outcomes += result
    return outcomes


def _invert_and_edit(
    prepared: Prepared,
    inversion: Inversion,
    source: Source,
    pairs: Sequence[tuple[str, str]],
    methods: dict[str, Method],
    seed: int,
    round_trip: np.ndarray,
) -> Steps[list[Decoded | Rejected]]:
    """One trajectory, and every edit that reads it."""
    sample = prepared.sample
    try:
        trajectory: Trajectory = yield from inversion.invert(source)
        if not bool(torch.isfinite(trajectory.latents).all()):
            raise InvertError(
                "the inversion gave values that are not finite. Try model.dtype float32 or other settings"
            )
    except Exception as error:
        return [rejected(sample, edit, name, "invert", error) for edit, name in pairs]
    mask = latent_mask(prepared.mask, source.latents)
    edits = tuple(
        _edit(prepared, methods[name], trajectory, edit, name, seed, mask, round_trip) for edit, name in pairs
    )
    results = yield Fork(edits)
    return [
        rejected(sample, edit, name, "edit", result) if isinstance(result, Exception) else result
        for (edit, name), result in zip(pairs, results, strict=True)
    ]


def _edit(
    prepared: Prepared,
    method: Method,
    trajectory: Trajectory,
    edit: str,
    name: str,
    seed: int,
    mask: Tensor | None,
    round_trip: np.ndarray,
) -> Steps[Decoded]:
    """One edit, at model size."""
    edited: EditedLatents = yield from method.editing.edit(trajectory, prepared.requests[edit], mask)
    if not bool(torch.isfinite(edited.latents).all()):
        raise EditError("the edit gave values that are not finite. Try lower guidance scales or model.dtype float32")
    pixels = yield DecodeLatents(edited.latents)
    # A decoder's NaN becomes 0 in uint8: finite latents alone do not tell.
    if not pixels.any() and prepared.pixels.max() > NEARLY_BLACK:
        raise BlackImageError("the result is black all over. Try model.dtype float32 or lower guidance scales")
    return Decoded(
        prepared=prepared,
        edit=edit,
        method=name,
        pixels=pixels,
        round_trip=round_trip,
        masks=None if edited.masks is None else tuple(at_image_size(one, pixels) for one in edited.masks),
        seed=seed,
    )


def outcome_of(result: Decoded | Rejected) -> Outcome:
    """The end of a result's way: restored, or rejected in stage "encode" where that fails."""
    if isinstance(result, Rejected):
        return result
    try:
        return restored(result)
    except Exception as error:
        return rejected(result.prepared.sample, result.edit, result.method, "encode", error)


def restored(decoded: Decoded) -> Edited:
    """A result back at its original's size, with its figures. Needs no model: run it beside the engine, not in it."""
    prepared, placement = decoded.prepared, decoded.prepared.placement
    masks, union = regions(decoded)
    image = restore(decoded.pixels, placement, prepared.original)
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
        figures=figures(
            original=prepared.original,
            round_trip=restore(decoded.round_trip, placement, prepared.original),
            edited=image,
            mask=union,
        ),
    )


def regions(decoded: Decoded) -> tuple[tuple[np.ndarray | None, ...], np.ndarray | None]:
    """Where an edit acted, at its original's size: the masks that it found, and their union; None where nowhere.

    Cut to the user's mask here, for every method, and after scaling: no rounding lets a pixel out.
    """
    prepared = decoded.prepared
    allowed = prepared.allowed
    found = decoded.masks
    if found is None:  # it acted wherever it was let: inside the user's mask, or everywhere, which is no region
        found = () if allowed is None else (np.ones(prepared.placement.canvas, dtype=bool),)
    at_original = [restore_mask(mask, prepared.placement) for mask in found]
    inside = at_original if allowed is None else [mask & allowed for mask in at_original]
    masks = tuple(mask if mask.any() else None for mask in inside)
    some = [mask for mask in masks if mask is not None]
    return masks if decoded.masks is not None else (), np.logical_or.reduce(some) if some else None


def rejected(sample: Sample, edit: str, method: str, stage: Stage, error: Exception) -> Rejected:
    """An asked-for result that an error prevented. A `RowError` knows its own stage."""
    return Rejected(
        sample=sample,
        edit=edit,
        method=method,
        stage=error.stage if isinstance(error, RowError) else stage,
        error_class=type(error).__name__,
        message=str(error),
        error=error,
    )


def seed_for(run_seed: int, image_id: str, purpose: str) -> int:
    """Seed of one image's noise, 0 .. 2^63 - 1: it hangs on the image's id, not on its place in a batch or shard order.

    Methods that share an inversion share its noise.
    """
    text = "\x1f".join((str(run_seed), image_id, purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def latent_mask(mask: np.ndarray | None, latents: Tensor) -> Tensor | None:
    """A mask (H, W) at model size, averaged down to the latents' (h, w)."""
    if mask is None:
        return None
    pooled = adaptive_avg_pool2d(torch.from_numpy(mask)[None, None], (latents.shape[-2], latents.shape[-1]))
    return pooled[0, 0].to(latents.dtype)


def at_image_size(mask: Tensor, pixels: np.ndarray) -> np.ndarray:
    """A mask (h, w) at latent size, repeated up to the (H, W) of the pixels."""
    scale = pixels.shape[0] // mask.shape[0]
    return np.asarray(mask.numpy().repeat(scale, axis=0).repeat(scale, axis=1), dtype=bool)
