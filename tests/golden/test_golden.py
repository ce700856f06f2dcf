"""The methods against tensors recorded from their reference implementations."""

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.golden.replay import HERE, Check, replay

FILES = sorted(HERE.glob("*/*.npz"))


@cache
def checks_of(path: Path, dtype: torch.dtype) -> list[Check]:
    return replay(path, dtype=dtype)


# Recorded in float32 from Gaussian noise, where nothing is amplified; in float64 their 64 x 64 latents take minutes.
ONLY_FLOAT32 = {"prompt_to_prompt", "mask_auto", "synthesis"}
REPLAYS = [
    pytest.param(path, dtype, id=f"{path.parent.name}-{path.stem}-{dtype}")
    for path in FILES
    for dtype in (torch.float32, torch.float64)
    if dtype == torch.float32 or ONLY_FLOAT32.isdisjoint((path.parent.name, path.stem))
]


@pytest.mark.parametrize(("path", "dtype"), REPLAYS)
def test_a_golden_replays_within_its_tolerance(path: Path, dtype: torch.dtype) -> None:
    checks = checks_of(path, dtype)
    assert len(checks) >= 3
    assert not [check for check in checks if not check.holds]


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "ledits_pp"], ids=lambda path: path.stem)
def test_every_pixel_of_every_mask_equals_the_golden(path: Path) -> None:
    differing = [check.deviation for check in checks_of(path, torch.float32) if "masks" in check.name]
    assert differing
    assert not any(differing)
