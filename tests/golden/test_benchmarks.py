"""The field's benchmarks in miniature: every row, mean, interval and parsed answer as the official code has it."""

from __future__ import annotations

import pytest

from tests.golden.replay import HERE, replay


@pytest.mark.parametrize("name", ["pie_mini", "gedit_mini", "imgedit_mini", "stats_mini"])
def test_a_benchmark_is_measured_as_by_the_official_code(name: str) -> None:
    checks = replay(HERE / name)
    assert len(checks) > 20
    assert not [check for check in checks if not check.holds]
