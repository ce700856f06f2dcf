"""What the replays of golden tensors share: comparisons, and one edit with its history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.editing.base import EditingMethod
from pipeline.engine.engine import Engine
from pipeline.records import EditedLatents, EditRequest, Source, Trajectory


@dataclass(frozen=True)
class Check:
    """One compared quantity."""

    name: str
    deviation: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.deviation <= self.tolerance


def relative(ours: Tensor, golden: Tensor) -> float:
    """Largest difference over the largest golden value."""
    assert ours.shape == golden.shape, f"ours {tuple(ours.shape)}, golden {tuple(golden.shape)}"
    return float((ours.double() - golden.double()).abs().max() / golden.double().abs().max())


def relative_l2(ours: Tensor, golden: Tensor) -> float:
    """Root mean square of the difference over that of the golden values."""
    assert ours.shape == golden.shape, f"ours {tuple(ours.shape)}, golden {tuple(golden.shape)}"
    return float((ours.double() - golden.double()).norm() / golden.double().norm())


def equal(name: str, ours: Any, golden: Tensor) -> Check:
    """Integers that must agree exactly."""
    return Check(name, 0.0 if list(ours) == golden.tolist() else 1.0, 0.0)


def source_of(engine: Engine, latents: Tensor, prompt: str, noises: Tensor | None = None) -> Source:
    """One image's encoded latents, and its noise from the recording instead of a generator."""
    draws = iter(() if noises is None else noises)
    return Source(
        latents=latents,
        prompt=prompt,
        schedule=engine.backbone.schedule,
        draw_noise=lambda: next(draws),
        editing_noise=lambda: lambda: next(draws),
    )


def edit(
    engine: Engine, editor: EditingMethod, trajectory: Trajectory, request: EditRequest, **options: Any
) -> EditedLatents:
    """One edit of one image, with what every step did."""
    return engine.run_one(editor.edit(trajectory, request, keep_history=True, **options))
