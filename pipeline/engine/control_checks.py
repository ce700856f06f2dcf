"""What of a control cannot be carried out is refused when its call is queued, before any network call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.engine.backbone import Offers
from pipeline.engine.calls import Denoise
from pipeline.engine.controls import (
    Add,
    Blend,
    Control,
    Mix,
    MixQueries,
    Openings,
    Part,
    Read,
    Record,
    Route,
    TakeFeatures,
    Watch,
    WatchedClasses,
    resolved,
    watched_grid,
)
from pipeline.engine.placing import placed
from pipeline.errors import EditError


def check_call(call: Denoise, offers: Offers) -> None:
    """Refuse what a model cannot do.

    Raises:
        ValueError, EditError: as `check`, and of maps that the model does not have.
    """
    height, width = call.latents.shape[-2:]
    control = call.control
    if call.watch is not None or (control is not None and control.watches and control.plan.watched is None):
        offers.check_watchable(height, width)
    if control is not None:
        length = call.conditioning[0].embedding.shape[0]
        check(control, len(call.levels), length, (height, width), offers.openings)


def check(control: Control, rows: int, length: int, size: tuple[int, int], openings: Openings) -> None:
    """Refuse a control for a call of `rows` rows with `length` keys of cross-attention, on latents of `size`.

    Raises:
        ValueError: it names a row that is not there, does two things to one row that exclude each other, has no room in
            its plan, or a tensor of the wrong shape.
        EditError: the model has no such block.
    """
    _check_watched(control, openings)
    taken: dict[tuple[Any, ...], Part] = {}
    watched = {part.row for part in control.parts if isinstance(part, Watch)}
    for part in control.parts:
        beyond = [row for row in _rows(part) if not 0 <= row < rows]
        if beyond:
            raise ValueError(f"{_named(part)} names row {beyond[0]}, and the call's {rows} count from 0")
        if isinstance(part, Read) and isinstance(part.classes, WatchedClasses):
            blind = {part.classes.own, part.classes.theirs} - watched
            if blind:
                raise ValueError(f"{_named(part)} takes its classes from row {min(blind)}, which watches nothing")
        for what in _claims(part, openings):
            if what in taken:
                raise ValueError(f"{_named(part)} and {_named(taken[what])} exclude each other ({what[0]} {what[2:]})")
            taken[what] = part
    _check_room(control)
    for part in control.parts:
        for name, found, expected in _shapes(part, length, size, openings):
            if found != expected:
                raise ValueError(f"{_named(part)} has {name} of shape {found}, and {expected} was expected")


def _check_watched(control: Control, openings: Openings) -> None:
    """Of layers that a plan names itself: there are some, and their maps are of one size.

    A model without any layer is refused by what a method needs of it.
    """
    chosen = control.plan.watched
    if chosen is None or not control.watches or not openings.layers:
        return
    factors = {layer.factor for layer in openings.layers if chosen.picks(layer)}
    if not factors:
        raise EditError(f"no layer of the model is one of {chosen}, whose cross-attention is to be watched")
    if len(factors) > 1:
        raise EditError(
            "the layers whose cross-attention is to be watched have maps of several sizes: the latents' side is "
            f"{', '.join(map(str, sorted(factors)))} times theirs. Name layers of one size"
        )


def _named(part: Part) -> str:
    return f"a control's {type(part).__name__} of row {part.row}"


def _rows(part: Part) -> Iterator[int]:
    yield part.row
    match part:
        case Route():
            yield from (row for row in (part.query, part.key, part.value) if row is not None)
        case Mix() | MixQueries() | TakeFeatures():
            yield part.source
        case Read():
            yield from part.sources
        case Blend():
            yield from part.sources.unique().tolist()


def _claims(part: Part, openings: Openings) -> Iterator[tuple[Any, ...]]:
    """What a part needs for itself: (what, row, where in the network)."""
    match part:
        case Watch():
            yield "sums of cross-attention", part.row
        case Mix():
            yield "cross-attention", part.row
        case Route() | Read():
            yield from (("self-attention of layer", part.row, layer) for layer in resolved(part.layers, openings))
        case MixQueries():
            yield from (("queries of layer", part.row, layer) for layer in resolved(part.layers, openings))
        case Blend():
            yield from (("result of layer", part.row, layer) for layer in resolved(part.layers, openings))
        case TakeFeatures():
            yield "features of", part.row, part.blocks
        case Record():
            yield "record of", part.row, part.where


def _check_room(control: Control) -> None:
    for _ in placed(control):
        pass
    plan = control.plan
    for part in control.parts:
        missing = (
            (isinstance(part, Route) and not plan.routes and "routes=True")
            or (isinstance(part, MixQueries) and not plan.query_mixes and "query_mixes=True")
            or (isinstance(part, TakeFeatures) and part.blocks not in plan.takes and f"takes=({part.blocks},)")
            or (isinstance(part, Watch) and len(part.weights) > plan.sums and f"sums={len(part.weights)}")
        )
        if missing:
            raise ValueError(f"{_named(part)} has no room in its plan. Give it {missing}")


def _shapes(
    part: Part, length: int, size: tuple[int, int], openings: Openings
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Shapes as they are, and as they should be."""
    match part:
        case Watch():
            yield "weights", tuple(part.weights.shape), (len(part.weights), length)
        case Mix():
            yield "take", tuple(part.take.shape), (length, length)
            yield "keep", tuple(part.keep.shape), (length,)
        case Read():
            yield from _shapes_of_classes(part, size)
        case Blend():
            grids = {layer.grid(*size) for layer in openings.layers if part.layers.picks(layer)}
            for height, width in grids:
                for name, tensor in (("sources", part.sources), ("places", part.places), ("shares", part.shares)):
                    yield name, tuple(tensor.shape), (height * width,)
        case Record():
            if openings.recordable(part.where) is None:
                raise EditError(_missing(part, openings))
        case Add():
            block = openings.transformer(part.where)
            if block is None:
                raise EditError(_missing(part, openings))
            count, grid = len(part.directions), (-(-size[0] // block.factor), -(-size[1] // block.factor))
            yield "directions", tuple(part.directions.shape), (count, block.channels)
            yield "maps", tuple(part.maps.shape), (count, *grid)


def _missing(part: Add | Record, openings: Openings) -> str:
    """What is said of a block that a model does not have."""
    there = [f"{one.place} {one.index_in_place}" for one in openings.transformers]
    there += [f"decoder {one.factor}" for one in openings.decoder] if isinstance(part, Record) else []
    return (
        f"{_named(part)} is for block {' '.join(map(str, part.where))}, which the model does not have; it has "
        f"{', '.join(dict.fromkeys(there)) or 'none'}"
    )


def _shapes_of_classes(part: Read, size: tuple[int, int]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    if isinstance(part.classes, WatchedClasses):
        yield "rows that are read", (len(part.sources),), (1,)
        yield "image", tuple(part.classes.image.shape), watched_grid(*size)
    elif part.classes is not None:
        yield "own classes", tuple(part.classes.own.shape), size
        yield "their classes", tuple(part.classes.theirs.shape), (len(part.sources), *size)
