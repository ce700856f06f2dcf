"""Replays of MasaCtrl: see replay.py. What was recorded at inverted latents is replayed to its end in float64 only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.masactrl import MasaCtrl
from pipeline.editing.observing import StepRecord
from pipeline.engine.engine import Engine
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.records import EditRequest, Trajectory
from tests.golden.checks import Check, edit, equal, relative_l2, source_of

EVERY = 4  # stride of the recorded subsamples


def masactrl(settings: dict[str, Any]) -> MasaCtrl:
    """The editor of a recorded run."""
    auto = settings.get("ref_token_idx") is not None
    return MasaCtrl(
        guidance_scale=settings["guidance_scale"],
        start_step=settings.get("start_step", 4),
        start_layer=settings.get("start_layer", 10),
        step_idx=settings.get("step_idx"),
        layer_idx=settings.get("layer_idx"),
        mask="auto" if auto else "none",
        thres=settings.get("thres", 0.1),
        ref_token_idx=settings["ref_token_idx"] if auto else None,
        cur_token_idx=settings["cur_token_idx"] if auto else None,
    )


def compare_entries(
    golden: dict[str, Tensor], trajectory: Trajectory, history: tuple[StepRecord, ...], tolerance: float
) -> Iterator[Check]:
    """Latents as they enter each step, and the last ones: (source, target)."""
    start = torch.stack([trajectory.latents[0]] * 2)
    entries = torch.stack([start, *(torch.stack([record.source_latents, record.latents]) for record in history)])
    recorded = golden["latents_in_sub"]
    for at, branch in enumerate(("source", "target")):
        first = relative_l2(entries[1, at, ..., ::EVERY, ::EVERY], recorded[1, at])
        yield Check(f"step 1, {branch}", first, min(tolerance, 1e-3))
    if "step5_in" in golden:
        yield Check("step 5", relative_l2(entries[5], golden["step5_in"]), min(tolerance, 1e-3))
    yield Check("latents", relative_l2(entries[:-1, ..., ::EVERY, ::EVERY], recorded), tolerance)
    yield Check("final", relative_l2(entries[-1], golden["final"]), tolerance)


def replay_masactrl(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """Generated pairs from Gaussian noise, and a real image from its inversion."""
    source_prompt, target_prompt = settings["prompts"]
    num_steps, editor = settings["num_steps"], masactrl(settings)
    request = EditRequest(source_prompt=source_prompt, target_prompt=target_prompt)
    if "x0" not in golden:
        given = source_of(engine, golden["x_T"][0], source_prompt, golden["x_T"])
        trajectory = engine.run_one(NoiseStart(num_steps=num_steps).invert(given))
        yield equal("timesteps", trajectory.timesteps, torch.tensor(settings["timesteps"]))
        history = edit(engine, editor, trajectory, request).history
        # A thresholded map may turn a pixel round under another attention kernel.
        yield from compare_entries(golden, trajectory, history, 5e-2 if editor.mask == "auto" else 1e-3)
        return
    # Circular at import: two_branch.py replays MasaCtrl beside the pinned source.
    from tests.golden.two_branch import compare_inversion, is_double, started_at

    given = source_of(engine, golden["x0"][0], source_prompt)
    trajectory = engine.run_one(DDIMInversion(num_steps=num_steps).invert(given))
    yield equal("timesteps", trajectory.timesteps, torch.tensor(settings["timesteps"]))
    yield from compare_inversion(golden, trajectory, engine)
    trajectory = started_at(trajectory, golden["x_T"][0])
    checks = list(compare_entries(golden, trajectory, edit(engine, editor, trajectory, request).history, 1e-5))
    yield from checks if is_double(engine) else [Check(check.name, check.deviation, 1e-3) for check in checks[:2]]
