"""Rows are made ready ahead of the engine: a few of them, and so many bytes of pixels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.reading import ahead
from pipeline.reading.ahead import Ahead, Ready
from pipeline.records import Placement, Prepared
from pipeline.samples import Sample

WAIT_S = 20.0
Filled = Callable[[list[int]], tuple[Ahead, list[int]]]


def row(at: int) -> Sample:
    return Sample(id=f"{at}", shard="", key=f"{at}", index=at, image=b"")


def prepared(sample: Sample, size: int) -> Prepared:
    whole = (1, size)
    placement = Placement(original=whole, crop=(0, 0, *whole), scaled=whole, offset=(0, 0), canvas=whole)
    pixels = np.zeros((1, size, 3), dtype=np.uint8)
    return Prepared(
        sample=sample, original=pixels, pixels=pixels, placement=placement, mask=None, allowed=None, requests={}
    )


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Filled]:
    """`filled([pixels, ...])`: rows of such images under a limit of 300 bytes, and the indices made ready so far."""
    monkeypatch.setattr(ahead, "HELD_BYTES", 300)
    opened = []

    def fill(sizes: list[int]) -> tuple[Ahead, list[int]]:
        made: list[int] = []

        def prepare_one(sample: Sample) -> Ready:
            made.append(sample.index)
            return prepared(sample, sizes[sample.index])

        rows = Ahead([row(at) for at in range(len(sizes))], prepare_one)
        opened.append(rows)
        pool.submit(rows.fill)
        return rows, made

    with ThreadPoolExecutor() as pool:
        yield fill
        for rows in opened:
            rows.close()


def until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(int(WAIT_S / 0.01)):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not come to that")


def test_small_rows_are_made_ready_a_few_ahead(filled: Filled) -> None:
    rows, made = filled([1] * 20)
    until(lambda: len(made) == ahead.PREPARED_AHEAD + 1)
    taken = [next(rows) for _ in range(20)]
    assert [one.sample.index for one in taken if isinstance(one, Prepared)] == list(range(20))
    with pytest.raises(StopIteration):
        next(rows)


def test_large_rows_wait_until_others_are_let_go(filled: Filled) -> None:
    rows, made = filled([40, 40, 40, 40, 40])  # 120 bytes each: three of them are over the limit
    assert [next(rows) is not None for _ in range(3)] == [True, True, True]
    assert next(rows) is None, "nothing may be begun"
    assert made == [0, 1, 2]
    rows.let_go(0)
    assert next(rows) is not None
    assert next(rows) is None
    rows.let_go(3)
    rows.let_go(1)
    assert next(rows) is not None
    assert made == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [1000, 50])
def test_rows_of_half_the_limit_or_more_are_made_ready_one_at_a_time(filled: Filled, size: int) -> None:
    rows, made = filled([size, size])
    assert next(rows) is not None
    assert next(rows) is None
    assert made == [0]
    rows.let_go(0)
    assert next(rows) is not None
    assert made == [0, 1]


def test_a_fault_is_raised_where_the_rows_are_taken() -> None:
    def prepare_one(_: Sample) -> Ready:
        raise KeyError("fault")

    rows = Ahead([row(0)], prepare_one)
    rows.fill()
    with pytest.raises(KeyError):
        next(rows)
