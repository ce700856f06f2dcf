"""Replays of FlowAlign, a form of FlowEdit, and of DNAEdit, which is DirectEdit on a trajectory of another kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.direct_edit import DirectEdit
from pipeline.editing.flow_edit import FlowEdit
from pipeline.engine.engine import Engine
from pipeline.inversion.dna import DNAInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.records import EditRequest
from tests.golden.checks import Check, edit, relative, source_of
from tests.golden.flow import levels_check
from tests.golden.uniedit_flow import asked

TOLERANCE = 1e-4


def replay_flow_align(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """FlowAlign of one image, with the recorded noises."""
    num_steps = settings["num_steps"]
    source = source_of(engine, golden["x0"][0], settings["source_prompt"], golden["noises"])
    start = NoiseStart(num_steps=num_steps)
    trajectory = engine.run_one(start.invert(dataclasses.replace(source, draw_noise=lambda: golden["noises"][0])))
    yield levels_check([level.noise for level in trajectory.levels] + [0.0], golden["sigmas"])
    editor = FlowEdit(
        guided_against="source_prompt", guidance_scale=settings["guidance"], pull=settings.get("pull", 0.01)
    )
    request = EditRequest(source_prompt=settings["source_prompt"], target_prompt=settings["target_prompt"])
    edited = edit(engine, editor, trajectory, request)
    offsets = [record.latents - golden["x0"][0] for record in edited.history]
    yield Check("steps", float(len(offsets) != num_steps), 0.0)
    noised = [
        level.noised(golden["x0"][0], noise) for level, noise in zip(trajectory.levels, golden["noises"], strict=True)
    ]
    entering = [at + offset for at, offset in zip(noised, [torch.zeros_like(noised[0]), *offsets[:-1]], strict=True)]
    yield Check("target inputs", relative(torch.stack(entering), golden["target_inputs"]), TOLERANCE)
    yield Check("final", relative(edited.latents[None], golden["final"]), TOLERANCE)


def replay_dna_edit(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """DNAEdit of one image, with the recorded noise."""
    kept = settings["num_steps"] - settings["start_step"]
    inversion = DNAInversion(
        num_steps=kept, skip_steps=settings["start_step"], guidance_scale=settings.get("source_guidance", 1.0)
    )
    up: list[Tensor] = []
    source = source_of(engine, golden["x0"][0], settings["source_prompt"], golden["noise"])
    trajectory = engine.run_one(asked(inversion.invert(source), up, []))
    levels = [*trajectory.levels, trajectory.solver.steps[-1].end]
    yield levels_check([level.noise for level in levels], golden["sigmas"][settings["start_step"] :])
    editor = DirectEdit(guidance_scale=settings["target_guidance"], attn_ratio=0.0, target_share=settings["mvg"])
    request = EditRequest(source_prompt=settings["source_prompt"], target_prompt=settings["target_prompt"])
    down: list[Tensor] = []
    edited = engine.run_one(asked(editor.edit(trajectory, request), down, []))
    twice, rows = len(up) // kept, len(down) // kept  # a step's rows share their latents
    yield Check("upward inputs", relative(torch.stack(up[::twice]), golden["model_inputs"][:kept]), TOLERANCE)
    yield Check("downward inputs", relative(torch.stack(down[::rows]), golden["model_inputs"][kept:]), TOLERANCE)
    yield Check("final", relative(edited.latents[None], golden["final"]), TOLERANCE)
