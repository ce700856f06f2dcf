"""The methods against tensors recorded from their reference implementations, in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from pipeline.engine.engine import Engine
from tests.golden.replay import HERE, TINY_SD, Check, loaded, read_golden, replay
from tests.golden.riemannian import replay_riemannian

# Until the basis of the one has settled it takes half a minute; its first iterations are replayed below. The other is
# replayed in float64 by test_golden_double.py, and shows nothing more in float32.
SLOW = {"riemannian-basis_16", "riemannian-edit_16"}
# A case's `_input` is where it starts from: it is replayed with the case.
FILES = [path for path in sorted(HERE.glob("*/*.npz")) if not path.stem.endswith("_input")]


def name_of(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


CASES = [
    pytest.param(path, id=name_of(path), marks=[pytest.mark.slow] if name_of(path) in SLOW else []) for path in FILES
]


@cache
def checks_of(path: Path) -> list[Check]:
    return replay(path, dtype=torch.float32)


@pytest.mark.parametrize("path", CASES)
def test_a_golden_replays_within_its_tolerance(path: Path) -> None:
    checks = checks_of(path)
    assert len(checks) >= 3
    assert not [check for check in checks if not check.holds]


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "ledits_pp"], ids=lambda path: path.stem)
def test_every_pixel_of_every_mask_equals_the_golden(path: Path) -> None:
    differing = [check.deviation for check in checks_of(path) if "masks" in check.name]
    assert differing
    assert not any(differing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_and_the_first_iterations_of_a_basis_replay_within_their_tolerance(dtype: torch.dtype) -> None:
    golden, settings = read_golden(HERE / "riemannian" / "basis_16.npz", dtype)
    first = {name: tensor for name, tensor in golden.items() if not name.startswith(("it50", "svd"))}
    engine = Engine(loaded(TINY_SD, dtype), call_size=8, pad=False)
    checks = list(replay_riemannian(first, {**settings, "iterations": [3]}, engine))
    assert len(checks) == 5
    assert not [check for check in checks if not check.holds]
