"""The methods against tensors recorded from their reference implementations, in float64: to the end of every walk.

Apart from test_golden.py because it takes minutes: attention over 4,096 positions in float64 has no fast kernel.
"""

from pathlib import Path

import pytest
import torch

from tests.golden.replay import HERE, replay

# Recorded in float32 from Gaussian noise, where nothing is amplified: float64 would show nothing more.
ONLY_FLOAT32 = {"prompt_to_prompt", "mask_auto", "synthesis"}
FILES = [path for path in sorted(HERE.glob("*/*.npz")) if ONLY_FLOAT32.isdisjoint((path.parent.name, path.stem))]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_golden_replays_within_its_tolerance(path: Path) -> None:
    checks = replay(path, dtype=torch.float64)
    assert len(checks) >= 3
    assert not [check for check in checks if not check.holds]
