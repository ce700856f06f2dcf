"""One image on its way: inverted once per inversion and prompts, edited by everything that is asked of it.

Inversions and editors are generators over one image that ask for model calls (inversion/, editing/); here they are put
one behind the other, and side by side where nothing hangs on anything. The engine runs those of many images at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from pipeline.engine.backbone import Backbone
from pipeline.engine.blocks import blocks_of
from pipeline.engine.calls import DecodeLatents, EncodeImage, Fork, Steps
from pipeline.engine.controls import Transformer
from pipeline.engine.pullback import LocalBasis
from pipeline.errors import BlackImageError, EditError, Stage
from pipeline.gating.gain import with_gains
from pipeline.gating.inverting import KeptInversions, inverted
from pipeline.gating.replay import stopped
from pipeline.interventions import Library
from pipeline.inversion.base import Inversion, draw_from
from pipeline.reading.directions import Stored
from pipeline.reading.requests import refusal_by
from pipeline.recipe import Method
from pipeline.records import (
    Decoded,
    DrawNoise,
    EditedLatents,
    EditedPixels,
    InversionPrompts,
    Prepared,
    Rejected,
    Source,
    Trajectory,
)
from pipeline.samples import Sample
from pipeline.seeds import seed_for
from pipeline.settings.gates import Bounds

NEARLY_BLACK = 8  # of 255: what compression leaves of a black image

Pair = tuple[str, str]
"""Names of an edit and of a method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is done with an image, beside what it is asked for."""

    methods: Mapping[str, Method]
    """By name."""
    run_seed: int
    round_trip: bool = True
    """The input's latents are decoded as they are, too, for `sink.round_trip`."""
    keeps_background: bool = False
    """Outside of their masks results are the input's own pixels, for `sink.background`."""
    stored: Stored = field(default_factory=dict)
    """Directions that methods read."""
    libraries: Mapping[str, Library] = field(default_factory=dict)
    """Autoencoders that methods read."""
    blocks: Mapping[str, Transformer] | None = None
    """Of the network, by name; none: as it says itself."""
    bases: bool = False
    """Find the local bases that the edits would move along, and edit nothing."""
    before: Bounds | None = None
    """PSNR of a trajectory that is replayed, outside of which nothing is edited. None: nothing is replayed."""
    gain_seed: int | None = None
    """Of the noise that results are denoised with under both texts; none: they are not."""
    kept: KeptInversions | None = None
    """Inversions of earlier attempts, and for later ones; none: there are none."""


def edit_prepared(prepared: Prepared, setup: Setup, backbone: Backbone) -> Steps[list[Decoded | Rejected]]:
    """Invert once per inversion and prompts that it runs under, then edit by every request and method, side by side.

    Args:
        prepared: the image and its requests.
        setup: what is done with it.
        backbone: the model.
    """
    sample = prepared.sample
    groups: dict[tuple[Inversion, InversionPrompts], list[Pair]] = {}
    outcomes: list[Decoded | Rejected] = []
    for (edit, name), method in _asked(prepared, setup):
        request = prepared.requests[edit]
        try:
            method.editing.check(request, method.inversion, masked=prepared.mask is not None)
        except Exception as error:
            outcomes.append(rejected(sample, edit, name, "prepare", error))
            continue
        groups.setdefault((method.inversion, method.editing.inverts_under(request)), []).append((edit, name))
    if not groups:
        return outcomes
    try:
        latents = yield from _encode(prepared, backbone)
    except Exception as error:
        return outcomes + [rejected(sample, *pair, "invert", error) for pairs in groups.values() for pair in pairs]

    round_trip = setup.round_trip and not sample.blank
    layer = backbone.offers.bottleneck.layer if setup.bases and backbone.offers.bottleneck else None
    children: list[Steps[Any]] = [_decode(latents)] if round_trip else []
    children += [
        _invert_and_edit(
            prepared, inversion, _source(prepared, inversion, prompts, latents, setup, backbone), pairs, setup, layer
        )
        for (inversion, prompts), pairs in groups.items()
    ]
    made = yield Fork(tuple(children))
    back = made.pop(0) if round_trip else None
    for results in made:
        if isinstance(results, Exception):
            raise results
        outcomes += [_with_round_trip(result, back) for result in results]
    if setup.gain_seed is None:
        return outcomes
    return (yield from with_gains(outcomes, backbone.schedule, setup.gain_seed))


def _asked(prepared: Prepared, setup: Setup) -> Iterator[tuple[Pair, Method]]:
    """Every edit by every method that is asked for."""
    for edit in prepared.requests:
        for name, method in setup.methods.items():
            if prepared.only is None or (edit, name) in prepared.only:
                yield (edit, name), method


def _source(
    prepared: Prepared,
    inversion: Inversion,
    prompts: InversionPrompts,
    latents: Tensor,
    setup: Setup,
    backbone: Backbone,
) -> Source:
    """What an inversion starts from, and all that editors read of the row."""
    sample, run_seed, shape = prepared.sample, setup.run_seed, tuple(latents.shape)
    return Source(
        latents=latents,
        prompt=prompts.prompt,
        negative_prompt=prompts.negative_prompt,
        schedule=backbone.schedule,
        draw_noise=draw_from(_seed(inversion, sample, setup), shape, latents.dtype),
        editing_noise=partial(draw_from, seed_for(run_seed, sample.noise_id, "editing"), shape, latents.dtype),
        pixels=prepared.pixels,
        mask=prepared.mask,
        placement=prepared.placement,
        stored=setup.stored,
        libraries=setup.libraries,
        seed=seed_for(run_seed, sample.id, "server"),
        blocks=blocks_of(backbone.offers.openings) if setup.blocks is None else setup.blocks,
        draws=partial(_draws, run_seed, sample.noise_id, latents),
    )


def _seed(inversion: Inversion, sample: Sample, setup: Setup) -> int:
    """Of an inversion's noise."""
    return seed_for(setup.run_seed, sample.noise_id, inversion.method)


def _encode(prepared: Prepared, backbone: Backbone) -> Steps[Tensor]:
    """An image's latents; of a row that brings none zeros, of which nothing shows in noise."""
    if not prepared.sample.blank:
        return (yield EncodeImage(prepared.pixels))
    height, width = (side // backbone.latent_scale for side in prepared.pixels.shape[:2])
    return torch.zeros((backbone.latent_channels, height, width))


def _draws(run_seed: int, noise_id: str, latents: Tensor, purpose: str) -> DrawNoise:
    """Noise of its own for each purpose."""
    return draw_from(seed_for(run_seed, noise_id, f"editing {purpose}"), tuple(latents.shape), latents.dtype)


def _decode(latents: Tensor) -> Steps[np.ndarray]:
    return (yield DecodeLatents(latents))


def _with_round_trip(result: Decoded | Rejected, back: np.ndarray | Exception | None) -> Decoded | Rejected:
    if isinstance(result, Rejected) or result.answer is not None:  # a server's picture has been through no autoencoder
        return result
    if isinstance(back, Exception):
        return rejected(result.prepared.sample, result.edit, result.method, "invert", back)
    return replace(result, round_trip=back)


def _invert_and_edit(
    prepared: Prepared,
    inversion: Inversion,
    source: Source,
    pairs: Sequence[Pair],
    setup: Setup,
    layer: str | None,
) -> Steps[list[Decoded | Rejected]]:
    """One trajectory, and every edit that reads it; or, of a bottleneck's layer, every basis."""
    sample, before, seed = prepared.sample, setup.before, _seed(inversion, prepared.sample, setup)
    try:
        replays = before is not None and not sample.blank
        trajectory, replayed = yield from inverted(inversion, source, prepared, setup.kept, replays=replays)
    except Exception as error:
        return [rejected(sample, edit, name, "invert", error) for edit, name in pairs]
    if before is not None and replayed is not None and not before.holds(replayed.psnr):
        return [stopped(prepared, replayed, edit, name, seed) for edit, name in pairs]
    mask = latent_mask(prepared.mask, source.latents)
    by_method: dict[str, list[str]] = {}
    for edit, name in pairs:
        by_method.setdefault(name, []).append(edit)
    methods_of_it = tuple(
        _edit_by_one(prepared, setup, name, trajectory, edits, seed, mask, layer) for name, edits in by_method.items()
    )
    outcomes: list[Decoded | Rejected] = []
    found = None if replayed is None else replayed.psnr
    for (name, edits), results in zip(by_method.items(), (yield Fork(methods_of_it)), strict=True):
        some = [results] * len(edits) if isinstance(results, Exception) else results
        outcomes += [
            rejected(sample, edit, name, "edit", result)
            if isinstance(result, Exception)
            else replace(result, inversion_psnr=found)
            for edit, result in zip(edits, some, strict=True)
        ]
    return outcomes


def _edit_by_one(
    prepared: Prepared,
    setup: Setup,
    name: str,
    trajectory: Trajectory,
    edits: Sequence[str],
    seed: int,
    mask: Tensor | None,
    layer: str | None,
) -> Steps[list[Decoded | Exception]]:
    """All edits by one method, which may have work in common."""
    method = setup.methods[name]
    requests = [prepared.requests[edit] for edit in edits]
    if layer is not None:
        found = yield from method.editing.bases(trajectory, requests)
        return [
            one if isinstance(one, Exception) else _shown_basis(prepared, replace(one, layer=layer), edit, name, seed)
            for edit, one in zip(edits, found, strict=True)
        ]
    edited = yield from method.editing.edit_all(trajectory, requests, mask)
    ends = tuple(_shown(prepared, one, setup, edit, name, seed) for edit, one in zip(edits, edited, strict=True))
    results: list[Decoded | Exception] = yield Fork(ends)
    return results


def _shown_basis(prepared: Prepared, basis: LocalBasis, edit: str, name: str, seed: int) -> Decoded:
    """A basis, with a picture of where it lies: bright where its vectors are long."""
    return Decoded(
        prepared=prepared,
        edit=edit,
        method=name,
        pixels=at_image_size(basis.picture, prepared.pixels)[..., None].repeat(3, axis=2),
        round_trip=None,
        masks=None,
        seed=seed,
        basis=basis,
    )


def _shown(
    prepared: Prepared,
    edited: EditedLatents | EditedPixels | Exception,
    setup: Setup,
    edit: str,
    name: str,
    seed: int,
) -> Steps[Decoded]:
    """One edit, at model size."""
    if isinstance(edited, Exception):
        raise edited
    if isinstance(edited, EditedPixels):
        return Decoded(
            prepared=prepared,
            edit=edit,
            method=name,
            pixels=edited.pixels,
            round_trip=None,
            masks=tuple(at_image_size(one, edited.pixels) for one in edited.masks),
            edge=_edge(setup, edited.pixels, edited.masks),
            seed=seed,
            answer=edited.answer,
        )
    if not bool(torch.isfinite(edited.latents).all()):
        raise EditError("the edit gave values that are not finite. Try lower guidance scales or model.dtype float32")
    method = setup.methods[name]
    pixels = yield DecodeLatents(edited.latents)
    pixels = method.editing.composited(pixels, prepared.pixels, prepared.mask)
    # A decoder's NaN becomes 0 in uint8: finite latents alone do not tell.
    if not pixels.any() and prepared.pixels.max() > NEARLY_BLACK:
        raise BlackImageError("the result is black all over. Try model.dtype float32 or lower guidance scales")
    return Decoded(
        prepared=prepared,
        edit=edit,
        method=name,
        pixels=pixels,
        round_trip=None,  # comes beside
        masks=None if edited.masks is None else tuple(at_image_size(one.bool(), pixels) for one in edited.masks),
        edge=_edge(setup, pixels, edited.latents),
        seed=seed,
        recorded=edited.recorded,
        is_compared=method.editing.shows_input and not prepared.sample.blank,
    )


def _edge(setup: Setup, pixels: np.ndarray, latents: Tensor) -> int | None:
    """Of a result that is to be laid on its input: pixels of a latent's side."""
    return pixels.shape[0] // latents.shape[-2] if setup.keeps_background else None


def rejected(sample: Sample, edit: str, method: str, stage: Stage, error: Exception) -> Rejected:
    """One result that an error prevented."""
    return Rejected.by(refusal_by(error, stage), sample, edit, method)


def latent_mask(mask: np.ndarray | None, latents: Tensor) -> Tensor | None:
    """A mask (H, W) at model size, averaged down to the latents' (h, w)."""
    if mask is None:
        return None
    pooled = adaptive_avg_pool2d(torch.from_numpy(mask)[None, None], (latents.shape[-2], latents.shape[-1]))
    return pooled[0, 0].to(latents.dtype)


def at_image_size(latent_map: Tensor, pixels: np.ndarray) -> np.ndarray:
    """A map (h, w) at latent size, repeated up to the (H, W) of the pixels."""
    scale = pixels.shape[0] // latent_map.shape[0]
    return np.asarray(latent_map.numpy().repeat(scale, axis=0).repeat(scale, axis=1))
