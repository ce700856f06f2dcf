"""Direct Inversion's ablations: a source that is put back in part, or now and then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.editing.masactrl import MasaCtrl
from pipeline.engine.engine import Engine
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.records import EditedLatents, EditRequest, Trajectory
from tests.methods import invert_and_edit, source, tiny_sd

N = 4
SOURCE, TARGET = "a photo of a cat sitting", "a photo of a cat standing up"


def edit(inversion: Any) -> tuple[Trajectory, EditedLatents, int]:
    engine = Engine(tiny_sd(), call_size=8)
    request, editor = EditRequest(target_prompt=TARGET), MasaCtrl(guidance_scale=2.0, start_step=1)
    given = source(tiny_sd(), 1, SOURCE)
    trajectory, edited = engine.run_one(invert_and_edit(given, request, inversion, editor, observe=True))
    return trajectory, edited, engine.stats.unet_rows


def test_nothing_put_back_is_ddim() -> None:
    _, none, rows = edit(DirectInversion(num_steps=N, offset_scale=0.0))
    _, plain, plain_rows = edit(DDIMInversion(num_steps=N))
    assert torch.equal(none.latents, plain.latents)
    assert rows == plain_rows == N + 4 * N


def test_all_put_back_is_a_copy_that_needs_no_prediction() -> None:
    # An interval as long as the walk leaves the first step pinned, whose source the copy has, too.
    trajectory, copied, rows = edit(DirectInversion(num_steps=N))
    _, first, _ = edit(DirectInversion(num_steps=N, interval=N))
    assert trajectory.pin_shares is None
    assert rows == N + 2 + 4 * (N - 1)
    assert torch.equal(first.history[0].source_latents, trajectory.latents[1])
    assert torch.equal(first.history[1].latents, copied.history[1].latents)
    assert not torch.equal(first.history[1].source_latents, trajectory.latents[2])


@pytest.mark.parametrize("scale", [0.4, 0.8])
def test_a_share_of_the_difference_is_put_back(scale: float) -> None:
    trajectory, part, _ = edit(DirectInversion(num_steps=N, offset_scale=scale))
    _, free, _ = edit(DDIMInversion(num_steps=N))
    drifted, stored = free.history[0].source_latents, trajectory.latents[1]
    assert drifted is not None
    torch.testing.assert_close(part.history[0].source_latents, drifted + scale * (stored - drifted))


def test_an_interval_puts_the_source_back_at_its_multiples_alone() -> None:
    trajectory, edited, _ = edit(DirectInversion(num_steps=N, interval=2))
    kept = [torch.equal(record.source_latents, trajectory.latents[record.step + 1]) for record in edited.history]
    assert kept == [True, False, True, False]
