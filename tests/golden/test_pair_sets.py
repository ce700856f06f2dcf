"""Drawn pairs with known displacements and defects: every one is found, and nothing else."""

from __future__ import annotations

import pytest

from tests.golden.replay import HERE, replay


@pytest.mark.parametrize("name", ["align_pairs", "audit_mini"])
def test_planted_displacements_and_defects_are_found_and_nothing_else(name: str) -> None:
    checks = replay(HERE / name)
    assert len(checks) > 40
    assert not [check for check in checks if not check.holds]
