"""The methods against tensors recorded from their reference implementations, in float32."""

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.golden.replay import HERE, Check, replay

# A case's `_input` is where it starts from: it is replayed with the case.
FILES = [path for path in sorted(HERE.glob("*/*.npz")) if not path.stem.endswith("_input")]


@cache
def checks_of(path: Path) -> list[Check]:
    return replay(path, dtype=torch.float32)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_golden_replays_within_its_tolerance(path: Path) -> None:
    checks = checks_of(path)
    assert len(checks) >= 3
    assert not [check for check in checks if not check.holds]


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "ledits_pp"], ids=lambda path: path.stem)
def test_every_pixel_of_every_mask_equals_the_golden(path: Path) -> None:
    differing = [check.deviation for check in checks_of(path) if "masks" in check.name]
    assert differing
    assert not any(differing)
