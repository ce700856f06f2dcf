"""The call size that a probe chooses."""

from __future__ import annotations

import pytest

from pipeline.engine.sizing import best_call_size, probe_call_size
from pipeline.models.analytic import AnalyticBackbone
from tests.engine.test_engine import Poisoned

RATES = {4: 40.0, 8: 70.0, 16: 96.0, 32: 99.0, 64: 100.0, 128: 98.0}


@pytest.mark.parametrize(
    ("fits", "expected"), [(128, 16), (64, 16), (16, 8), (8, 4), (4, 4), (2, 4)], ids=lambda value: str(value)
)
def test_the_smallest_call_that_is_nearly_the_fastest_is_chosen_with_memory_to_spare(fits: int, expected: int) -> None:
    tried = []

    def measure(size: int) -> float | None:
        tried.append(size)
        return RATES[size] if size <= fits else None

    size, measured = best_call_size(measure)
    assert size == expected
    assert measured == {one: RATES[one] for one in tried if one <= fits}
    assert tried == [size for size in RATES if size <= 2 * fits][: len(tried)]


def test_a_probe_survives_running_out_of_memory() -> None:
    told: list[str] = []
    size, measured = probe_call_size(Poisoned(largest=8), 64, told.append)
    assert (size, list(measured)) == (4, [4, 8])
    assert told == [f"trying calls of {rows} rows" for rows in (4, 8, 16)]
    assert probe_call_size(AnalyticBackbone(), 64)[0] in RATES
