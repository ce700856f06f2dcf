"""Threads share a room: what does not fit waits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.common.room import Room

THREADS = 8


@pytest.mark.parametrize(("amount", "together"), [(30, 3), (60, 1), (1000, 1)])
def test_as_many_are_in_a_room_of_100_as_fit_and_what_is_larger_is_there_alone(amount: int, together: int) -> None:
    room, full = Room(100), threading.Barrier(together)
    inside: list[int] = []
    most: list[int] = []

    def enter(number: int) -> None:
        with room.taken(amount):
            inside.append(number)
            full.wait(20)  # as many as should fit do
            most.append(len(inside))
            full.wait(20)
            inside.remove(number)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(enter, range(6)))
    assert max(most) == together


def test_a_fault_leaves_the_room() -> None:
    room = Room(100)
    with pytest.raises(KeyError), room.taken(100):
        raise KeyError
    with room.taken(100):
        pass
