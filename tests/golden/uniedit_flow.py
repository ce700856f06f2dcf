"""Replays of Uni-Inv and Uni-Edit: by the authors' schedulers for diffusers, and by their code on FLUX's own
interface."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.editing.uniedit_flow import UniEditFlow
from pipeline.engine.calls import Denoise, Denoised, EncodeText, Steps
from pipeline.engine.engine import Engine
from pipeline.inversion.uni_inv import UniInv
from pipeline.records import EditRequest, Trajectory
from tests.golden.checks import Check, edit, relative, source_of


def asked(steps: Steps[Any], inputs: list[Tensor], times: list[float]) -> Steps[Any]:
    """A method's steps, with what it asks the network for, row by row."""
    reply, error = None, None
    while True:
        try:
            call = steps.send(reply) if error is None else steps.throw(error)
        except StopIteration as stop:
            return stop.value
        if isinstance(call, Denoise):
            inputs += [*call.latents]
            times += [level.timestep for level in call.levels]
        reply, error = None, None
        try:
            reply = yield call
        except Exception as raised:
            error = raised


def replay_uniedit_flow(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """One image up, to a share of the noise, and down again under two prompts."""
    own_interface = settings.get("mask") == "absolute"
    is_xl = isinstance(engine.backbone.schedule, NoiseSchedule)
    num_steps, reached = settings["num_steps"], settings["alpha"] * settings["num_steps"]
    kept = round(reached) if own_interface else int(reached)
    # Absolute masks have no small number to divide by, and SDXL's prediction passes through one more conversion.
    tolerance = 3e-4 if own_interface or is_xl else 1e-4
    inversion = UniInv(
        num_steps=kept,
        skip_steps=num_steps - kept,
        first_look=not settings.get("zero_initial", settings.get("zero_init", False)),
        clean_end="authors",
    )
    inputs: list[Tensor] = []
    times: list[float] = []
    source = source_of(engine, golden["x0"][0], settings["inversion_prompt"])
    trajectory = engine.run_one(asked(inversion.invert(source), inputs, times))
    recorded = golden["inversion_inputs"][-len(inputs) :]
    yield Check("inversion inputs", relative(torch.stack(inputs), recorded), tolerance)
    yield Check("inverted", relative(trajectory.latents[:1], golden["inverted"]), tolerance)
    told = torch.tensor(times, dtype=recorded.dtype)
    if own_interface:
        yield Check("times", relative(told / 1000, golden["model_times"][: len(times)]), 1e-6)
    else:
        yield Check("times", relative(told, golden["inversion_timesteps"][-len(times) :]), 1e-6)
    yield from _edit_checks(golden, settings, trajectory, engine, tolerance)


def _edit_checks(
    golden: dict[str, Tensor], settings: dict[str, Any], trajectory: Trajectory, engine: Engine, tolerance: float
) -> Iterator[Check]:
    own_interface, packs = settings.get("mask") == "absolute", settings["model"].startswith("tiny-flux")
    editor = UniEditFlow(
        omega=settings["omega"],
        weight="absolute" if own_interface else "signed",
        cell=2 if packs else 1,
        guidance_scale=settings["guidance"] if packs else None,
    )
    request = EditRequest(source_prompt=settings["source_prompt"], target_prompt=settings["target_prompt"])
    if not own_interface:
        for branch in ("source", "target"):
            ours = engine.run_one(_first(settings[f"{branch}_prompt"], trajectory))[None]
            yield Check(f"{branch} velocity", relative(ours, golden[f"velocity_{branch}_first"]), tolerance)
    inputs: list[Tensor] = []
    edited = edit(engine, editor, trajectory, request)
    engine.run_one(asked(editor.edit(trajectory, request), inputs, []))
    if own_interface:
        yield Check("edit inputs", relative(torch.stack(inputs), golden["edit_inputs"]), tolerance)
    else:
        walked = torch.stack([record.latents for record in edited.history])[:, None]
        yield Check("trajectory", relative(walked, golden["edit_trajectory"]), tolerance)
    yield Check("final", relative(edited.latents[None], golden["final"]), tolerance)


def _first(prompt: str, trajectory: Trajectory) -> Steps[Tensor]:
    """What is predicted where the edit begins: the velocity, or of a variance-preserving model the noise."""
    (cond,) = yield EncodeText((prompt,))
    denoised: Denoised = yield Denoise(trajectory.latents[:1], trajectory.levels[:1], [cond])
    straight = abs(trajectory.levels[0].scale - 1.0) < 1e-6
    return denoised.predictions[0].velocity if straight else denoised.predictions[0].noise
