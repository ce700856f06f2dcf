"""Which slot of its plan each part of a control takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.engine.calls import NetworkCall
from pipeline.engine.controls import Add, Blend, Control, Mix, Read, Record, Where

ROOMS: dict[type[Any], str] = {Read: "reads", Blend: "blends", Add: "adds", Record: "records"}
"""Kinds of part that need a room, and where a plan has these."""


class Placed(NamedTuple):
    """A part in the room that it takes."""

    part: Any
    kind: str  # "mixes", "reads", ..., as in `Plan`
    room: int  # which of the plan's
    slot: int  # within its group


def placed(control: Control) -> Iterator[Placed]:
    """Every part that needs room, in order, with its slot.

    Raises:
        ValueError: the plan has none left for a part.
    """
    taken: Counter[tuple[str, int]] = Counter()
    for part in control.parts:
        kind = "mixes" if isinstance(part, Mix) else ROOMS.get(type(part))
        if kind is None:
            continue
        rooms: Any = getattr(control.plan, kind)
        slots = [rooms] if isinstance(part, Mix) else [room.slots if room.suits(part) else 0 for room in rooms]
        free = [number for number, count in enumerate(slots) if taken[kind, number] < count]
        if not free:
            raise ValueError(
                f"a control's plan has no room for its {type(part).__name__} of row {part.row}: {kind}={rooms}. Make a "
                "plan that holds what all steps need"
            )
        yield Placed(part, kind, free[0], taken[kind, free[0]])
        taken[kind, free[0]] += 1


def rows_recorded(call: NetworkCall) -> dict[Where, list[int]]:
    """By block the rows of a call whose record is asked for, a row for every slot; those of unused slots are any.

    For models that are no network, and answer in the same form.
    """
    groups = len(call.levels) // call.group
    found = {room.where: [0] * (groups * room.slots) for room in call.plan.records}
    for start, control in call.controls:
        for one in placed(control):
            if isinstance(one.part, Record):
                slots = call.plan.records[one.room].slots
                found[one.part.where][start // call.group * slots + one.slot] = start + one.part.row
    return found
