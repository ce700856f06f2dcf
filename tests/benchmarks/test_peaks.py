"""Large input, in the sizes that docs/benchmarks.md states: a worker's memory stays within its bound."""

from __future__ import annotations

import pytest

from benchmarks.peaks import KINDS, measure

MOST_MIB = 1.5e9 / 2**20  # beside the libraries, which a model brings anyway


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_large_input_takes_less_than_a_gigabyte_and_a_half(kind: str) -> None:
    figures = measure(kind)
    assert figures["failed"] == 0
    assert figures["done"] > 0
    assert figures["peak_mib"] - figures["libraries_mib"] + sum(figures["guarded_mib"]) < MOST_MIB, figures
