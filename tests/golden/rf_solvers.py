"""Replays of solvers on FLUX's own interface: RF-Solver and FireFlow up and down, and Uni-Inv under plain sampling."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.engine.engine import Engine
from pipeline.engine.halfway import SecondOrder
from pipeline.inversion.base import Inversion
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.uni_inv import UniInv
from pipeline.records import EditRequest
from tests.golden.checks import Check, relative, source_of
from tests.golden.flow import levels_check
from tests.golden.uniedit_flow import asked

TOLERANCE = 1e-4
SECOND_ORDER: dict[str, SecondOrder] = {"rf_solver": "rf_solver", "midpoint": "rf_solver", "fireflow": "fireflow"}


def replay_rf_solvers(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """One image up under the inversion's prompt, unguided, and down again under the target's, told its guidance."""
    name = settings["function"].removeprefix("denoise_")
    num_steps, kept = settings["num_steps"], round(settings.get("alpha", 1) * settings["num_steps"])
    inversion: Inversion
    if name in SECOND_ORDER:
        inversion = DDIMInversion(solver=SECOND_ORDER[name], num_steps=kept, skip_steps=num_steps - kept)
    else:
        assert name == "uniinv", f"{name} is no solver that is known here"
        zero_initial = settings.get("zero_initial", settings.get("zero_init", False))
        inversion = UniInv(num_steps=kept, skip_steps=num_steps - kept, first_look=not zero_initial)
    inputs: list[Tensor] = []
    times: list[float] = []
    source = source_of(engine, golden["x0"][0], settings["inversion_prompt"])
    trajectory = engine.run_one(asked(inversion.invert(source), inputs, times))
    levels = [*trajectory.levels, trajectory.solver.steps[-1].end]
    yield levels_check([level.noise for level in levels], golden["sigmas"][num_steps - kept :])
    yield Check("inversion rows", float(len(inputs) != settings["inversion_calls"]), 0.0)
    yield Check("inversion inputs", relative(torch.stack(inputs), golden["inversion_inputs"]), TOLERANCE)
    yield Check("inverted", relative(trajectory.latents[:1], golden["inverted"]), TOLERANCE)
    seen: list[Tensor] = []
    editor = ClassifierFreeGuidance(guidance_scale=1.0)
    request = EditRequest(source_prompt=settings["source_prompt"], target_prompt=settings["target_prompt"])
    edited = _telling(engine, settings["guidance"]).run_one(asked(editor.edit(trajectory, request), seen, times))
    yield Check("edit rows", float(len(seen) != settings["edit_calls"]), 0.0)
    yield Check("edit inputs", relative(torch.stack(seen), golden["edit_inputs"]), TOLERANCE)
    told = torch.tensor(times, dtype=golden["model_times"].dtype)
    yield Check("times", relative(told / 1000, golden["model_times"]), 1e-6)
    yield Check("final", relative(edited.latents[None], golden["final"]), TOLERANCE)


def _telling(engine: Engine, guidance: float) -> Engine:
    """The same model, told another guidance."""
    backbone: Any = copy(engine.backbone)
    backbone.text = copy(backbone.text)
    backbone.text.guidance = guidance
    return Engine(backbone, call_size=engine.call_size, pad=engine.pad)
