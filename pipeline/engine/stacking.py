"""Stacking: all parts of all groups of a network call in one tensor of integers and one of floats.

So a call's controls reach the device in two copies, whatever they are and however many groups it has. Inside the
network the parts are views of the two. Where a group is missing, or a group has fewer parts than there is room for,
stand identities and zeros, which leave their rows as they are, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.copying import to_device
from pipeline.engine.controls import (
    ANY,
    Add,
    Blend,
    Control,
    GivenClasses,
    Layers,
    Mix,
    MixQueries,
    Openings,
    Plan,
    Read,
    Reads,
    Record,
    Route,
    Seen,
    TakeFeatures,
    WatchedClasses,
    Where,
    resolved,
    watched_grid,
)
from pipeline.engine.placing import placed

EVERYTHING = -1.0  # a threshold that every place reaches: with it watched classes tell nothing apart

Routed = tuple[tuple[bool, bool, bool], ...]
"""Per self-attention layer: whether queries, keys, values are routed there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What all calls of a kind have in common."""

    plan: Plan
    group: int  # rows of a group
    rows: int  # of the call
    length: int  # L, keys of cross-attention
    height: int  # of the latents
    width: int

    @property
    def groups(self) -> int:
        """Groups of the call, missing ones included."""
        return self.rows // self.group


class Field(NamedTuple):
    """Where a part's numbers lie in their buffer."""

    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Which parts a call has, and where their numbers lie. One object for all calls that share it."""

    shape: Shape
    openings: Openings
    routed: Routed
    integers: Mapping[str, Field]
    floats: Mapping[str, Field]
    blank_integers: Tensor  # identities
    blank_floats: Tensor  # zeros, and ones where nothing is to be scaled
    # Per room of the plan, indices of the transformer blocks whose self-attention it is about.
    read_layers: tuple[frozenset[int], ...]
    blend_layers: tuple[frozenset[int], ...]
    taken: tuple[int, ...]  # numbers of the residual blocks whose features are taken

    @property
    def plan(self) -> Plan:
        """Of the calls."""
        return self.shape.plan

    def has(self, name: str) -> bool:
        """Whether the calls have a part."""
        return name in self.integers or name in self.floats

    def views(self, integers: Tensor, floats: Tensor) -> dict[str, Tensor]:
        """The parts by name, as views of the two buffers."""
        found = {}
        for buffer, fields in ((integers, self.integers), (floats, self.floats)):
            for name, (start, shape) in fields.items():
                found[name] = buffer[start : start + math.prod(shape)].view(shape)
        return found


class Stacked(NamedTuple):
    """The controls of one network call."""

    layout: Layout
    integers: Tensor
    floats: Tensor

    def to(self, device: torch.device) -> Stacked:
        """On another device: two copies; none for a buffer without numbers."""
        moved = (
            to_device(buffer, device) if buffer.numel() else buffer.new_empty(0, device=device)
            for buffer in (self.integers, self.floats)
        )
        return Stacked(self.layout, *moved)


def stack(
    controls: Sequence[tuple[int, Control]],
    watch: Tensor | None,
    shape: Shape,
    openings: Openings,
    *,
    dtype: torch.dtype = torch.float32,
    whole: bool = False,
) -> Stacked | None:
    """Write down what controls do to a call.

    Args:
        controls: the call's groups that are there: the first row of each, and its control.
        watch: (R, S, L) weights of the sums that are watched, if any are.
        shape: of the call.
        openings: of the network that it is for.
        dtype: of the floats.
        whole: lay out everything that the plan has room for, as a compiled network wants it. Else what no group uses is
            left out, which changes no row that does not use it.

    Returns:
        The two buffers, on the CPU; None where there is nothing to do.
    """
    routes = _routes(controls, shape, openings)
    moved = (routes != np.arange(shape.rows)).any(axis=-1) | (whole and shape.plan.routes)  # (layers, 3)
    routed = tuple((bool(query), bool(key), bool(value)) for query, key, value in moved)
    present = None if whole else _present(controls, watch)
    layout = layout_of(shape, openings, routed, present)
    if not layout.integers and not layout.floats:
        return None
    integers, floats = layout.blank_integers.clone(), layout.blank_floats.to(dtype, copy=True)
    parts = layout.views(integers, floats)
    if "watch" in parts and watch is not None:
        parts["watch"].copy_(watch)
    if "routes" in parts:
        parts["routes"].copy_(torch.from_numpy(routes))
    for start, control in controls:
        _write(control, start, layout, parts)
    return Stacked(layout, integers, floats)


def _routes(controls: Sequence[tuple[int, Control]], shape: Shape, openings: Openings) -> np.ndarray:
    """(layers, 3, R): whose queries, keys and values each row uses."""
    table = np.tile(np.arange(shape.rows), (len(openings.layers), 3, 1))
    for start, control in controls:
        for part in control.parts:
            if isinstance(part, Route):
                layers = list(resolved(part.layers, openings))
                for which, source in enumerate((part.query, part.key, part.value)):
                    if source is not None:
                        table[layers, which, start + part.row] = start + source
    return table


def _present(controls: Sequence[tuple[int, Control]], watch: Tensor | None) -> frozenset[str]:
    """Names of the rooms that some group uses."""
    used = {f"{one.kind}.{one.room}" for _, control in controls for one in placed(control)}
    if watch is not None:
        used.add("watch")
    kinds = {type(part) for _, control in controls for part in control.parts}
    used |= {room for kind, room in ((TakeFeatures, "takes"), (MixQueries, "queries")) if kind in kinds}
    return frozenset(used)


@lru_cache(maxsize=256)
def layout_of(shape: Shape, openings: Openings, routed: Routed, present: frozenset[str] | None) -> Layout:
    """The layout of calls that have what is `present`; None: all that their plan has room for."""
    plan = shape.plan
    blanks: dict[str, Tensor] = {}
    if any(any(flags) for flags in routed):
        blanks["routes"] = torch.arange(shape.rows).expand(len(openings.layers), 3, -1)
    for room, parts in _blanks(shape, openings):
        if present is None or room in present:
            blanks |= parts
    integers, blank_integers = _buffer(blanks, torch.int64)
    floats, blank_floats = _buffer(blanks, torch.float32)
    return Layout(
        shape=shape,
        openings=openings,
        routed=routed,
        integers=integers,
        floats=floats,
        blank_integers=blank_integers,
        blank_floats=blank_floats,
        read_layers=tuple(resolved(room.layers, openings) for room in plan.reads),
        blend_layers=tuple(resolved(room.layers, openings) for room in plan.blends),
        taken=_taken(plan, openings) if "takes" in integers else (),
    )


def _buffer(blanks: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Field], Tensor]:
    """Those of one type in a row, and where each lies."""
    fields, flat, start = {}, [torch.zeros(0, dtype=dtype)], 0
    for name, blank in blanks.items():
        if blank.dtype == dtype:
            fields[name] = Field(start, tuple(blank.shape))
            flat.append(blank.flatten())
            start += blank.numel()
    return fields, torch.cat(flat)


def _taken(plan: Plan, openings: Openings) -> tuple[int, ...]:
    """Numbers of the residual blocks whose features may be taken."""
    return tuple(
        number for number, block in enumerate(openings.residuals) if any(choice.picks(block) for choice in plan.takes)
    )


def _blanks(shape: Shape, openings: Openings) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Per room its parts by name, with what stands there where nobody uses them: it leaves every row as it is."""
    plan, slots_of = shape.plan, partial(_first_rows, shape)
    if plan.sums and plan.watched_layers(openings):
        yield "watch", {"watch": torch.zeros(shape.rows, plan.sums, shape.length)}
    if taken := _taken(plan, openings):
        yield "takes", {"takes": torch.arange(shape.rows).repeat(len(taken), 1)}
    if plan.query_mixes:
        shares = torch.zeros(len(openings.layers), shape.rows)
        yield "queries", {"queries.sources": torch.arange(shape.rows), "queries.shares": shares}
    if plan.mixes:
        rows = slots_of(plan.mixes)
        yield (
            "mixes.0",
            {
                "mixes.0.rows": rows[:, None].repeat(1, 2),
                "mixes.0.take": torch.zeros(len(rows), shape.length, shape.length),
                "mixes.0.keep": torch.ones(shape.rows, shape.length),
            },
        )
    for number, read in enumerate(plan.reads):
        if resolved(read.layers, openings):  # else nobody reads there, and the classes are the largest part of all
            yield f"reads.{number}", _blank_read(f"reads.{number}", read, slots_of(read.slots), shape)
    for number, blend in enumerate(plan.blends):
        room, rows, places = f"blends.{number}", slots_of(blend.slots), _places(blend.layers, shape, openings)
        yield (
            room,
            {
                f"{room}.rows": rows,
                f"{room}.sources": rows[:, None].repeat(1, places),
                f"{room}.places": torch.arange(places).repeat(len(rows), 1),
                f"{room}.shares": torch.zeros(len(rows), places),
            },
        )
    for number, add in enumerate(plan.adds):
        block = openings.transformer(add.where)
        if block is not None:
            room, rows = f"adds.{number}", slots_of(add.slots)
            grid = (-(-shape.height // block.factor), -(-shape.width // block.factor))
            yield (
                room,
                {
                    f"{room}.rows": rows,
                    f"{room}.directions": torch.zeros(len(rows), add.directions, block.channels),
                    f"{room}.maps": torch.zeros(len(rows), add.directions, *grid),
                    f"{room}.relative": torch.zeros(len(rows)),
                },
            )
    for number, record in enumerate(plan.records):
        if openings.recordable(record.where) is not None:
            yield f"records.{number}", {f"records.{number}.rows": slots_of(record.slots)}


def _first_rows(shape: Shape, slots: int) -> Tensor:
    """A row for every slot: a group's first ones, none twice."""
    if slots > shape.group:
        raise ValueError(f"a plan has {slots} slots for groups of {shape.group} rows, which are written once each")
    return (torch.arange(shape.groups)[:, None] * shape.group + torch.arange(slots)).flatten()


def _blank_read(room: str, read: Reads, rows: Tensor, shape: Shape) -> dict[str, Tensor]:
    parts = {
        f"{room}.rows": rows[:, None].repeat(1, 1 + read.sources),
        f"{room}.used": torch.zeros(len(rows), dtype=torch.int64),
    }
    if read.weighted:
        parts[f"{room}.weights"] = torch.ones(len(rows), read.sources)
    if read.classes == "given":
        parts[f"{room}.classes"] = torch.full((len(rows), 1 + read.sources, shape.height, shape.width), ANY)
    if read.classes == "watched":
        parts[f"{room}.watched"] = rows[:, None].repeat(1, 2)
        parts[f"{room}.thresholds"] = torch.full((len(rows),), EVERYTHING)
        parts[f"{room}.image"] = torch.ones(len(rows), *watched_grid(shape.height, shape.width))
    return parts


def _places(layers: Layers, shape: Shape, openings: Openings) -> int:
    """Places of the maps of some layers, which are of one size; 0 where there are none."""
    grids = [layer.grid(shape.height, shape.width) for layer in openings.layers if layers.picks(layer)]
    return math.prod(grids[0]) if grids else 0


def _write(control: Control, start: int, layout: Layout, parts: Mapping[str, Tensor]) -> None:
    """The parts of the group that begins at row `start`, but for routes and what is watched."""
    shape = layout.shape
    for part in control.parts:
        if isinstance(part, TakeFeatures):
            for at, number in enumerate(layout.taken):
                if part.blocks.picks(layout.openings.residuals[number]):
                    parts["takes"][at, start + part.row] = start + part.source
        if isinstance(part, MixQueries):
            parts["queries.sources"][start + part.row] = start + part.source
            parts["queries.shares"][list(resolved(part.layers, layout.openings)), start + part.row] = part.share
    rows: dict[tuple[str, int], dict[int, int]] = {}  # per room its slots' rows
    laid_out = [one for one in placed(control) if layout.has(f"{one.kind}.{one.room}.rows")]
    for one in laid_out:
        rows.setdefault((one.kind, one.room), {})[one.slot] = one.part.row
    for (kind, room), used in rows.items():
        name, slots = f"{kind}.{room}.rows", slots_in(layout.plan, kind, room)
        # Slots that nobody uses take rows that nobody else writes.
        free = iter(row for row in range(shape.group) if row not in used.values())
        taken = torch.tensor([used[slot] if slot in used else next(free) for slot in range(slots)]) + start
        first = start // shape.group * slots
        where = parts[name][first : first + slots]  # (slots,) or (slots, rows)
        where.copy_(taken if where.dim() == 1 else taken[:, None].expand_as(where))
    for one in laid_out:
        slots = slots_in(layout.plan, one.kind, one.room)
        _write_part(one.part, f"{one.kind}.{one.room}", start // shape.group * slots + one.slot, start, parts)


def slots_in(plan: Plan, kind: str, room: int) -> int:
    """How many rows of a group a room is for."""
    return plan.mixes if kind == "mixes" else int(getattr(plan, kind)[room].slots)


def _write_part(part: Any, room: str, slot: int, start: int, parts: Mapping[str, Tensor]) -> None:
    match part:
        case Mix():
            parts[f"{room}.rows"][slot, 1] = start + part.source
            parts[f"{room}.take"][slot] = part.take
            parts[f"{room}.keep"][start + part.row] = part.keep
        case Read():
            parts[f"{room}.rows"][slot, 1:] = torch.tensor(part.sources) + start
            parts[f"{room}.used"][slot] = 1
            if part.weights is not None:
                parts[f"{room}.weights"][slot] = torch.tensor(part.weights)
            if isinstance(part.classes, GivenClasses):
                parts[f"{room}.classes"][slot] = torch.cat([part.classes.own[None], part.classes.theirs])
            if isinstance(part.classes, WatchedClasses):
                parts[f"{room}.watched"][slot] = torch.tensor([part.classes.own, part.classes.theirs]) + start
                parts[f"{room}.thresholds"][slot] = part.classes.threshold
                parts[f"{room}.image"][slot] = part.classes.image
        case Blend():
            parts[f"{room}.sources"][slot] = part.sources + start
            parts[f"{room}.places"][slot] = part.places
            parts[f"{room}.shares"][slot] = part.shares
        case Add():
            count = len(part.directions)
            parts[f"{room}.directions"][slot, :count] = part.directions
            parts[f"{room}.maps"][slot, :count] = part.maps
            parts[f"{room}.relative"][slot] = float(part.relative)
        case Record():
            pass  # its row says it all


def seen_by(control: Control, start: int, group: int, watched: Tensor | None, recorded: Mapping[Where, Tensor]) -> Seen:
    """What is handed to the group that begins at row `start`.

    Args:
        control: the group's.
        start: see above.
        group: rows of a group.
        watched: (R, S, h/4, w/4) of the whole call.
        recorded: per block (slots of all groups, C, h', w').
    """
    own = watched[start : start + group] if control.watches and watched is not None else None
    records = []
    for one in placed(control):
        if isinstance(one.part, Record):
            slots = slots_in(control.plan, one.kind, one.room)
            records.append(recorded[one.part.where][start // group * slots + one.slot])
    return Seen(own, tuple(records))
