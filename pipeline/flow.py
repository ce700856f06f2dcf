"""READ FIRST. One unit of work on its way, top to bottom; every other folder serves a line of this file.

    reading    a chunk of one shard becomes samples; each is asked what to change, decoded and fitted to the model
    inversion  pixels become a trajectory, once per image and inversion setting
    editing    a trajectory and a request become edited latents and masks
    writing    results are restored to their original's size, encoded, and finished as the unit's files and manifest

`edit_unit` is the whole of it. What comes before (which units are left) and after (the commit) stands in running/, and
so does what wraps it: attempts that count deaths, a gate, a meter (running/worker.py). Inversions and edits are
generators over one image that ask for model calls; the engine runs those of many images at once (engine/engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from pipeline.best_of import best_of
from pipeline.engine.backbone import Backbone
from pipeline.engine.blocks import blocks_of
from pipeline.engine.calls import DecodeLatents, EncodeImage, Fork, Steps
from pipeline.engine.controls import Transformer
from pipeline.engine.engine import Engine
from pipeline.engine.pullback import LocalBasis
from pipeline.errors import AnswerError, BlackImageError, ClusterError, EditError, Stage
from pipeline.gating.gain import gain_seed_of, with_gains
from pipeline.gating.inverting import KeptInversions, inverted
from pipeline.gating.replay import stopped
from pipeline.interventions import Library
from pipeline.inversion.base import Inversion, draw_from
from pipeline.reading.ahead import Ahead
from pipeline.reading.decoder import Decodes
from pipeline.reading.directions import Stored, stored_directions
from pipeline.reading.libraries import libraries_of
from pipeline.reading.prepare import prepare
from pipeline.reading.requests import asked_of, refusal_by
from pipeline.recipe import Method, Recipe
from pipeline.records import (
    Asked,
    Decoded,
    DrawNoise,
    Edited,
    EditedLatents,
    EditedPixels,
    InversionPrompts,
    Prepared,
    Rejected,
    Source,
    Trajectory,
)
from pipeline.remote.pictures import Spent, added
from pipeline.samples import Sample, UnitInput
from pipeline.seeds import run_seed_of, seed_for
from pipeline.settings.gates import Bounds
from pipeline.writing.commit import FinishedUnit
from pipeline.writing.encoding import Encoders
from pipeline.writing.finish import finish_unit
from pipeline.writing.restoring import outcome_of
from pipeline.writing.rows import OutputRow, encode_outcome

NEARLY_BLACK = 8  # of 255: what compression leaves of a black image

Turns = Callable[[Sequence[Asked]], Iterable[Sequence[Asked]]]
"""In which turns a unit's rows are edited."""


def all_at_once(rows: Sequence[Asked]) -> Iterator[Sequence[Asked]]:
    """In one turn: their rows share the network's calls."""
    yield rows


def edit_unit(
    unit_input: UnitInput,
    recipe: Recipe,
    engine: Engine,
    *,
    decoder: Decodes,
    encoders: Encoders,
    generation: int,
    rank: int = 0,
    turns: Turns = all_at_once,
    gates: Callable[[Edited], Edited] | None = None,
    on_result: Callable[[Decoded | Rejected], None] = lambda _: None,
) -> FinishedUnit:
    """Edit every row of a unit by everything that is asked of it: rows in, the unit's files and manifest out.

    Several units may be at work on one engine at once, from several threads. What a row gives depends on the row, the
    recipe and the call size alone: not on turns, neighbours or order.

    Args:
        unit_input: the unit and its rows, as read.
        recipe: the run.
        engine: a loaded model.
        decoder: of images and masks.
        encoders: threads that restore and encode.
        generation: of the driver, which the names of the unit's files bear.
        rank: of the unit among those at work on the engine: the lowest goes first, the others fill its calls up.
        turns: in which its rows are edited.
        gates: what a result meets before it is encoded; None: all are kept.
        on_result: told of each result as it leaves the engine.
    """

    def encode(result: Decoded | Rejected) -> OutputRow | Rejected:
        outcome = outcome_of(result, gates)
        return encode_outcome(outcome, recipe, engine.backbone.record, engine.call_size)

    def results(asked: Sequence[Asked]) -> Iterator[Decoded | Rejected]:
        kept.let_go_of_all_but(row.sample.index for row in asked)
        for rows in turns(asked):
            for result in edit_rows(rows, recipe, engine, decoder, rank=rank, kept=kept):
                spent.update(added(spent, spent_on(result)))
                on_result(result)
                yield result

    def make(asked: Sequence[Asked]) -> list[OutputRow | Rejected]:
        return encoders.map(encode, results(asked))

    spent: dict[str, Spent] = {}
    kept = KeptInversions(recipe)
    asked = [asked_of(row, recipe) for row in unit_input.rows]
    encoded = make(asked) if recipe.best_of is None else best_of(asked, recipe, make)
    return finish_unit(
        unit_input,
        encoded,
        recipe,
        generation=generation,
        model_digest=engine.backbone.record.digest,
        call_size=engine.call_size,
        spent=spent,
    )


def spent_on(result: Decoded | Rejected) -> dict[str, Spent]:
    """What servers took for a result, or for none, by its method; empty where none was asked."""
    if isinstance(result, Rejected):
        spent = result.error.spent if isinstance(result.error, AnswerError) else None
    else:
        spent = None if result.answer is None else result.answer.spent
    return {} if spent is None else {result.method: spent}


def edit_rows(
    rows: Iterable[Asked],
    recipe: Recipe,
    engine: Engine,
    decoder: Decodes,
    *,
    rank: int = 0,
    kept: KeptInversions | None = None,
) -> Iterator[Decoded | Rejected]:
    """Edit rows: every (image, edit, method) asked for comes back once, in whatever order, as `Decoded` or `Rejected`.

    A few rows are made ready ahead of the engine, so that it never waits for a decoder. Attempts share what is `kept`.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        ready = Ahead(rows, lambda asked: prepare_row(asked, recipe, engine.backbone, decoder))
        pool.submit(ready.fill)
        steps = (None if one is None else _edit_ready(one, recipe, engine.backbone, kept) for one in ready)
        try:
            for finished in engine.run(steps, rank=rank):
                if finished.error is not None:  # a fault of ours, not of a row: those become outcomes
                    raise finished.error
                yield from finished.value
                ready.let_go(finished.index)
        finally:
            ready.close()


def edit_row(asked: Asked, recipe: Recipe, backbone: Backbone, decoder: Decodes) -> Steps[list[Decoded | Rejected]]:
    """All edits of one row by all methods of the recipe."""
    return (yield from _edit_ready(prepare_row(asked, recipe, backbone, decoder), recipe, backbone))


def _edit_ready(
    ready: Prepared | list[Decoded | Rejected],
    recipe: Recipe,
    backbone: Backbone,
    kept: KeptInversions | None = None,
) -> Steps[list[Decoded | Rejected]]:
    if not isinstance(ready, Prepared):
        return ready
    steps = edit_prepared(
        ready,
        recipe.methods_of(ready.attempt),
        run_seed_of(recipe.run.seed, recipe.best_of, ready.attempt),
        backbone,
        round_trip=recipe.decodes_inputs,
        stored=stored_directions(recipe),
        libraries=libraries_of(recipe),
        bases=recipe.writes_bases,
        before=bounds_before(recipe),
        gain_seed=gain_seed_of(recipe),
        kept=kept,
    )
    return (yield from steps)


def bounds_before(recipe: Recipe) -> Bounds | None:
    """What a trajectory's own picture must be like for the edit to be made; None: it is not looked at."""
    return None if recipe.gates is None else recipe.gates.inversion_psnr


def prepare_row(
    asked: Asked, recipe: Recipe, backbone: Backbone, decoder: Decodes
) -> Prepared | list[Decoded | Rejected]:
    """Decode and fit one row; or everything that was asked of it, rejected."""
    if asked.refusal is not None:
        return [*asked.rejected(recipe.all_methods, asked.refusal)]
    try:
        size = recipe.model.size or backbone.image_size
        return prepare(asked, recipe, size=size, multiple=backbone.multiple, decoder=decoder)
    except ClusterError:  # no decoder can be started: no row is to blame
        raise
    except Exception as error:
        return [*asked.rejected(recipe.all_methods, refusal_by(error, "decode"))]


def edit_prepared(
    prepared: Prepared,
    methods: dict[str, Method],
    run_seed: int,
    backbone: Backbone,
    *,
    round_trip: bool = True,
    stored: Stored = MappingProxyType({}),
    libraries: Mapping[str, Library] = MappingProxyType({}),
    blocks: Mapping[str, Transformer] | None = None,
    bases: bool = False,
    before: Bounds | None = None,
    gain_seed: int | None = None,
    kept: KeptInversions | None = None,
) -> Steps[list[Decoded | Rejected]]:
    """Invert once per inversion and prompts that it runs under, then edit by every request and method, side by side.

    Args:
        prepared: the image and its requests.
        methods: by name.
        run_seed: of the run.
        backbone: the model.
        round_trip: the input's latents are decoded as they are, too, for `sink.round_trip`.
        stored: directions that methods read.
        libraries: autoencoders that methods read.
        blocks: of the network, by name; None: as it says itself.
        bases: find the local bases that the edits would move along, and edit nothing.
        before: PSNR of a trajectory that is replayed, outside of which nothing is edited. None: nothing is replayed.
        gain_seed: of the noise that results are denoised with under both texts; None: they are not.
        kept: inversions of earlier attempts, and for later ones; None: there are none.
    """
    sample = prepared.sample
    groups: dict[tuple[Inversion, InversionPrompts], list[tuple[str, str]]] = {}
    outcomes: list[Decoded | Rejected] = []
    for edit, request in prepared.requests.items():
        for name, method in methods.items():
            if prepared.only is not None and (edit, name) not in prepared.only:
                continue
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

    round_trip = round_trip and not sample.blank
    children: list[Steps[Any]] = [_decode(latents)] if round_trip else []
    for (inversion, prompts), pairs in groups.items():
        seed = seed_for(run_seed, sample.noise_id, inversion.method)
        source = Source(
            latents=latents,
            prompt=prompts.prompt,
            negative_prompt=prompts.negative_prompt,
            schedule=backbone.schedule,
            draw_noise=draw_from(seed, tuple(latents.shape), latents.dtype),
            editing_noise=partial(
                draw_from, seed_for(run_seed, sample.noise_id, "editing"), tuple(latents.shape), latents.dtype
            ),
            pixels=prepared.pixels,
            mask=prepared.mask,
            placement=prepared.placement,
            stored=stored,
            libraries=libraries,
            seed=seed_for(run_seed, sample.id, "server"),
            blocks=blocks_of(backbone.offers.openings) if blocks is None else blocks,
            draws=partial(_draws, run_seed, sample.noise_id, latents),
        )
        layer = backbone.offers.bottleneck.layer if bases and backbone.offers.bottleneck else None
        children.append(_invert_and_edit(prepared, inversion, source, pairs, methods, seed, layer, before, kept))
    made = yield Fork(tuple(children))
    back = made.pop(0) if round_trip else None
    for results in made:
        if isinstance(results, Exception):
            raise results
        outcomes += [_with_round_trip(result, back) for result in results]
    return outcomes if gain_seed is None else (yield from with_gains(outcomes, backbone.schedule, gain_seed))


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
    pairs: Sequence[tuple[str, str]],
    methods: dict[str, Method],
    seed: int,
    layer: str | None,
    before: Bounds | None,
    kept: KeptInversions | None,
) -> Steps[list[Decoded | Rejected]]:
    """One trajectory, and every edit that reads it; or, of a bottleneck's layer, every basis."""
    sample = prepared.sample
    try:
        replays = before is not None and not sample.blank
        trajectory, replayed = yield from inverted(inversion, source, prepared, kept, replays=replays)
    except Exception as error:
        return [rejected(sample, edit, name, "invert", error) for edit, name in pairs]
    if before is not None and replayed is not None and not before.holds(replayed.psnr):
        return [stopped(prepared, replayed, edit, name, seed) for edit, name in pairs]
    mask = latent_mask(prepared.mask, source.latents)
    by_method: dict[str, list[str]] = {}
    for edit, name in pairs:
        by_method.setdefault(name, []).append(edit)
    methods_of_it = tuple(
        _edit_by_one(prepared, methods[name], name, trajectory, edits, seed, mask, layer)
        for name, edits in by_method.items()
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
    method: Method,
    name: str,
    trajectory: Trajectory,
    edits: Sequence[str],
    seed: int,
    mask: Tensor | None,
    layer: str | None,
) -> Steps[list[Decoded | Exception]]:
    """All edits by one method, which may have work in common."""
    requests = [prepared.requests[edit] for edit in edits]
    if layer is not None:
        found = yield from method.editing.bases(trajectory, requests)
        return [
            one if isinstance(one, Exception) else _shown_basis(prepared, replace(one, layer=layer), edit, name, seed)
            for edit, one in zip(edits, found, strict=True)
        ]
    edited = yield from method.editing.edit_all(trajectory, requests, mask)
    ends = tuple(_shown(prepared, one, method, edit, name, seed) for edit, one in zip(edits, edited, strict=True))
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
    method: Method,
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
            seed=seed,
            answer=edited.answer,
        )
    if not bool(torch.isfinite(edited.latents).all()):
        raise EditError("the edit gave values that are not finite. Try lower guidance scales or model.dtype float32")
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
        seed=seed,
        recorded=edited.recorded,
        is_compared=method.editing.shows_input and not prepared.sample.blank,
    )


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
