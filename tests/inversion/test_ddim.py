"""DDIM inversion of a part of the schedule, alone and under the inversions that build on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.engine import Engine
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.inversion.negative_prompt import NegativePromptInversion
from pipeline.inversion.null_text import NullTextInversion
from pipeline.records import EditRequest, Source, Trajectory
from tests.facts import InversionFacts
from tests.methods import analytic, invert_and_edit, source

FACTS = InversionFacts(rows=1)
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMInversion, {}),
    "direct": (DirectInversion, {}),
    "negative_prompt": (NegativePromptInversion, {}),
    "null_text": (NullTextInversion, {"num_inner_steps": 2, "early_stop_epsilon": 0.0}),
}
every_kind = pytest.mark.parametrize(("kind", "settings"), KINDS.values(), ids=list(KINDS))


def inverted(inversion: DDIMInversion, given: Source | None = None) -> Trajectory:
    return Engine(analytic(), call_size=8).run_one(inversion.invert(given or source(analytic(), 1, "a hat")))


@every_kind
def test_skipped_steps_leave_out_the_noisy_end(kind: Any, settings: dict[str, Any]) -> None:
    whole = inverted(kind(num_steps=10, **settings))
    part = inverted(kind(num_steps=7, skip_steps=3, **settings))
    assert part.timesteps == whole.timesteps[3:]
    assert (part.skipped_steps, part.total_steps, len(part.latents)) == (3, 10, 8)
    assert torch.equal(part.latents, whole.latents[3:])
    assert part.pinned == whole.pinned
    if part.uncond is not None:
        assert len(part.uncond) == 7


@every_kind
def test_rows_are_those_of_the_kept_steps(kind: Any, settings: dict[str, Any]) -> None:
    inversion = kind(num_steps=4, skip_steps=3, **settings)
    engine = Engine(analytic(), call_size=8)
    engine.run_one(inversion.invert(source(analytic(), 1, "a hat")))
    if kind is NullTextInversion:  # the closed-form model may arrive before the last update
        assert 4 < engine.stats.network_rows <= 4 + 4 * (2 + 3 * settings["num_inner_steps"])
    else:
        assert engine.stats.network_rows == 4


def test_fewer_steps_of_noise_stay_closer_to_the_image() -> None:
    errors = []
    for skipped in (0, 5, 9):
        given = source(analytic(), 1, "a hat")
        inversion = DDIMInversion(num_steps=10 - skipped, skip_steps=skipped)
        generator = invert_and_edit(given, EditRequest(source_prompt="a hat"), inversion, Reconstruct())
        _, rebuilt = Engine(analytic()).run_one(generator)
        errors.append(float((rebuilt.latents - given.latents).abs().mean()))
    assert errors == sorted(errors, reverse=True)


def test_a_schedule_of_too_many_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="make a schedule of 1001 steps"):
        DDIMInversion(num_steps=1000, skip_steps=1)


def test_ddim_inversion_of_a_smooth_model_returns_the_image() -> None:
    given = source(analytic(), 1, "hat")
    generator = invert_and_edit(given, EditRequest(), DDIMInversion(num_steps=100), Reconstruct())
    _, rebuilt = Engine(analytic()).run_one(generator)
    assert (rebuilt.latents - given.latents).abs().max() < 0.1
