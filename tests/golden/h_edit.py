"""Replays of h-Edit: see replay.py.

A case's settings stand in its `meta_json`. Its trajectory stands in a file beside it, or in one of this repository:
`trajectory_R.npz` or `trajectory_D.npz`, or, for a case with latents of its own, `CASE_input.npz`. Such a file is a
recording, too: of the inversion, or of the state that its case starts from.

What is compared: differences of numbers, not relative ones. In float64 whole walks; in float32, where the random
network amplifies rounding by orders of magnitude, steps that each start from the recorded state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.h_transform import at_level, edit_move
from pipeline.diffusion.steps import DDIM, Step
from pipeline.editing.h_edit import HEdit
from pipeline.editing.h_walk import HWalk, State
from pipeline.engine.calls import Steps
from pipeline.engine.engine import Engine
from pipeline.engine.prompts import GuidedPrompt
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.records import EditRequest, Trajectory, WordPair
from tests.golden.checks import Check, equal, source_of

KEPT = Path(__file__).parent / "h_edit"
SOURCE_PROMPT = "a photo of a cat sitting next to a mirror"  # of the recorded inversions
SELF_KEYS = 32 * 32  # the published code replaces self-attention of at most so many keys, whatever the latents' size


def read_h_edit(path: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors and settings, with those of the file that its trajectory stands in under `input.NAME`."""
    golden, settings = _read(path, dtype)
    if path.stem.endswith("_input"):  # the start of a case: replayed with it
        path = _beside(path, f"{path.stem.removesuffix('_input')}.npz")
        golden, settings = _read(path, dtype)
    if "case" not in settings:
        return golden, settings
    names = (f"{settings['case']}_input.npz", f"trajectory_{settings['inversion']}.npz")
    given, _ = _read(next(place for name in names if (place := _beside(path, name)).exists()), dtype)
    return golden | {f"input.{name}": tensor for name, tensor in given.items()}, settings


def _beside(path: Path, name: str) -> Path:
    """A file in the same folder, or the one of that name that this repository keeps."""
    return path.with_name(name) if path.with_name(name).exists() else KEPT / name


def _read(path: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    archive = np.load(path)
    tensors = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "meta_json"}
    cast = {name: one.to(dtype) if one.is_floating_point() else one for name, one in tensors.items()}
    return cast, json.loads(bytes(archive["meta_json"]))


def replay_h_edit(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """A case, or an inversion."""
    if "case" not in settings:
        yield from _replay_inversion(golden, settings, engine)
        return
    double = engine.backbone.record.dtype == "float64"
    trajectory = trajectory_of(golden, settings, engine)
    yield equal("timesteps", trajectory.timesteps, torch.tensor(settings["timesteps"]))
    yield from _same_schedule(golden["input.alphas_cumprod"], engine)
    yield _coefficients(trajectory, settings, engine)
    yield from _same_text(golden["input.emb"], settings, engine)
    editor, request = editor_of(settings, golden), request_of(settings)
    walk: HWalk = engine.run_one(editor.walk(trajectory, request))
    if "final_edit" not in golden:  # recorded in float32: single steps, and masks
        yield from _replay_blend(golden, walk, engine, trajectory)
        return
    repeated = settings.get("optimization_steps") or 0
    if double or repeated <= 1:  # three amplifying passes and the signs of the pull are not comparable in float32
        forced = torch.stack([one.latents for one in engine.run_one(forced_steps(walk, golden["steps"][:, 1]))])
        allowed = 1e-3 if double or repeated == 0 else 2e-2
        yield Check("teacher-forced steps", float((forced - golden["steps"][:, 1]).abs().max()), allowed)
    if double:
        history = engine.run_one(free_steps(engine.run_one(editor.walk(trajectory, request))))
        ours = torch.stack([one.latents for one in history])
        allowed = 1e-3 if repeated > 1 else 1e-4
        yield Check("steps", float((ours - golden["steps"][:, 1]).abs().max()), allowed)
        final = float((ours[-1] - golden["final_edit"][0]).abs().max())
        yield Check("final edit", final, 1e-3 if repeated > 1 else 1e-5)
    if settings.get("controller") is not None:  # without, the published code returns a mixture of both branches
        kept = float((trajectory.latents[-1] - golden["final_orig"][0]).abs().max())
        yield Check("final source", kept, 1e-5)


def trajectory_of(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Trajectory:
    """The recorded trajectory from the first step that is walked, with the recorded grid."""
    schedule: Any = engine.backbone.schedule
    times = [*settings["timesteps"], 0]  # the last step leads to timestep 0
    steps = tuple(Step(schedule.level(t), schedule.level(below)) for t, below in pairwise(times))
    random = settings["inversion"] == "R"
    chain, residual = golden["input.x_chain"], golden["input.residual"]
    count = len(steps)
    # Where the top state alone was kept, what the source was after each step stands in the case.
    whole = len(chain) > count
    latents = chain[: count + 1].flip(0) if whole else torch.cat([chain, golden["steps"][:, 0]])
    above = settings["num_steps"] - count
    stride = settings["timesteps"][0] - settings["timesteps"][1]
    return Trajectory(
        method="ddpm" if random else "ddim",
        source=source_of(engine, latents[-1], settings["prompts"][0]),
        solver=DDIM(steps=steps, eta=1.0 if random else 0.0),
        latents=latents,
        noise_maps=residual[:count].flip(0) if random else None,
        source_guidance=settings["w_orig"],
        skipped_steps=above,
        level_above=schedule.level(settings["timesteps"][0] + stride) if above else None,
        pinned=True,
    )


def editor_of(settings: dict[str, Any], golden: dict[str, Tensor]) -> HEdit:
    """The editor of a recorded case."""
    controller = settings.get("controller")
    height, width = golden["steps"].shape[-2:]
    factor = 1
    while (height // factor) * (width // factor) > SELF_KEYS:
        factor *= 2
    controlled: dict[str, Any] = {"control": "none"}
    if controller is not None:
        controlled = {
            "control": "prompt_to_prompt",
            "kind": "replace" if controller.get("replace") else "refine",
            "cross_replace_steps": (0.0, controller.get("xa", 0.0)),
            "self_replace_steps": (0.0, controller.get("sa", 0.0)),
            "self_replace_factor": factor,
            "blend_threshold": settings.get("blend_threshold", 0.3),
        }
    repeated = settings.get("optimization_steps")
    pull = settings.get("weight_reconstruction")
    return HEdit(
        form="explicit" if "explicit" in settings["function"] else "implicit",
        guidance_scale=settings["w_edit"],
        source_guidance_scale=settings["w_hat_orig"],
        inner_steps=repeated or 1,
        reconstruction_weight=0.0 if pull is None else pull,
        **controlled,
    )


def request_of(settings: dict[str, Any]) -> EditRequest:
    """What a recorded case asks for."""
    controller = settings.get("controller") or {}
    source, target = settings["prompts"]
    factors = controller.get("eq") or {"words": [], "values": []}
    blend = controller.get("blend")
    return EditRequest(
        source_prompt=source,
        target_prompt=target,
        equalizer=dict(zip(factors["words"], factors["values"], strict=True)),
        blend_words=None if blend is None else WordPair(source=tuple(blend[0]), target=tuple(blend[1])),
    )


def free_steps(walk: HWalk) -> Steps[list[State]]:
    """The states after every step of a whole walk."""
    states = [(yield from walk.begin())]
    for step in range(walk.trajectory.num_steps):
        states.append((yield from walk.take(step, states[-1])))
    return states[1:]


def forced_steps(walk: HWalk, recorded: Tensor) -> Steps[list[State]]:
    """Single steps, each from what was recorded of the one before (N, C, h, w)."""
    start = yield from walk.begin()
    states = []
    for step in range(walk.trajectory.num_steps):
        before = start if step == 0 else State(recorded[step - 1], None)
        states.append((yield from walk.take(step, before)))
    return states


def masked_steps(walk: HWalk, recorded: Tensor) -> Steps[list[tuple[State, Tensor | None]]]:
    """Single steps as above, with the mask of each."""
    found = []
    for step in range(walk.trajectory.num_steps):
        before = State(walk.trajectory.latents[0] if step == 0 else recorded[step - 1], None)
        state = yield from walk.take(step, before)
        found.append((state, walk.masks))
    return found


def _replay_blend(golden: dict[str, Tensor], walk: HWalk, engine: Engine, trajectory: Trajectory) -> Iterator[Check]:
    """Masks, and steps where both masks agree."""
    engine.run_one(walk.begin())
    found = engine.run_one(masked_steps(walk, golden["steps"][:, 1]))
    wanted = golden["masks"].any(dim=1)[:, 0]  # both rows: the published code unites them when it blends
    ours = [None if masks is None else masks.any(dim=0) for _, masks in found]
    first = len(ours) - len(wanted)
    yield equal("steps without a mask", [mask is None for mask in ours[:first]], torch.ones(first, dtype=torch.bool))
    masks = torch.stack([mask for mask in ours[first:] if mask is not None])
    yield Check("masks, share of different pixels", float((masks != wanted).double().mean()), 5e-3)
    agreeing = torch.cat([torch.ones_like(wanted[:first]), masks == wanted])[:, None]
    states = torch.stack([state.latents for state, _ in found])
    deviation = (states - golden["steps"][:, 1]).abs() * agreeing
    yield Check("teacher-forced steps", float(deviation.max()), 2e-2)
    assert torch.equal(trajectory.latents[1:], golden["steps"][:, 0])


def _same_schedule(alpha_bars: Tensor, engine: Engine) -> Iterator[Check]:
    schedule: Any = engine.backbone.schedule
    ours = torch.tensor(schedule.alpha_bars, dtype=torch.float64)
    yield Check("alpha bars", float((ours - alpha_bars.double()).abs().max()), 1e-7)


def _same_text(recorded: Tensor, settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """The embeddings of the two prompts."""
    ours = torch.stack([engine.backbone.encode_text(prompt).embedding for prompt in settings["prompts"]])
    rows = settings.get("prompt_rows", [1, 2])
    yield Check("embeddings", float((ours - recorded[rows]).abs().max()), 1e-5)


def _coefficients(trajectory: Trajectory, settings: dict[str, Any], engine: Engine) -> Check:
    """What the noise is scaled by, sqrt(1 - a' - omega^2), in every recorded evaluation from t to t'."""
    schedule: Any = engine.backbone.schedule
    solver = trajectory.solver
    assert isinstance(solver, DDIM)
    one = torch.ones((1, 1, 1), dtype=torch.float64)
    apart = []
    for time, below, recorded in settings["coefs"]:
        start, end = schedule.level(time), schedule.level(below)
        kappa = float(edit_move(replace(solver, steps=(Step(start, end),)), 0, at_level(one, start)))
        apart.append(abs(kappa + end.signal * start.noise / start.signal - recorded))
    return Check("coefficients", max(apart), 1e-6)


def _replay_inversion(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """R: edit-friendly inversion from the recorded noise. D: every hop of the recorded chain, and its residuals."""
    yield from _same_schedule(golden["alphas_cumprod"], engine)
    count, double = settings["num_steps"], engine.backbone.record.dtype == "float64"
    text = engine.backbone.encode_text(SOURCE_PROMPT).embedding
    yield Check("embedding", float((text - golden["emb"][1]).abs().max()), 1e-5)
    amplified = 1e-5 if double else 1e-2
    if settings["inversion"] == "R":
        inversion = DDPMInversion(
            solver="ddim", num_steps=count, skip_steps=0, source_guidance_scale=settings["w_orig"]
        )
        given = source_of(engine, golden["x0"][0], SOURCE_PROMPT, golden["noise"])  # drawn for ascending timesteps
        trajectory = engine.run_one(inversion.invert(given))
        assert trajectory.noise_maps is not None
        yield Check("chain", float((trajectory.latents.flip(0) - golden["x_chain"]).abs().max()), 1e-5)
        apart = float((trajectory.noise_maps.flip(0) - golden["residual"]).abs().max())
        yield Check("residuals", apart, amplified)
        return
    grid = [1000 // count * number for number in reversed(range(count))]
    case = settings | {"prompts": [SOURCE_PROMPT], "timesteps": grid}
    given = {f"input.{name}": tensor for name, tensor in golden.items()}
    trajectory = trajectory_of(given, case, engine)
    walk: HWalk = engine.run_one(HEdit(control="none").walk(trajectory, EditRequest(target_prompt=SOURCE_PROMPT)))
    engine.run_one(walk.begin())
    assert walk.residuals is not None
    yield Check("residuals", float((walk.residuals.flip(0) - golden["residual"]).abs().max()), amplified)
    hops = engine.run_one(hops_of(trajectory))
    yield Check("single hops", float((hops - trajectory.latents[:-1]).abs().max()), amplified)


def hops_of(trajectory: Trajectory) -> Steps[Tensor]:
    """Where DDIM inversion leads from each recorded state (N, C, h, w), from the noisiest on."""
    solver, steps = trajectory.solver, range(trajectory.num_steps)
    assert isinstance(solver, DDIM)
    prompt = yield from GuidedPrompt.encode(trajectory.source_prompt, 1.0)
    below = [solver.level_below(step) for step in steps]
    predictions = yield from prompt.predict_all(trajectory.latents[1:], below)
    return torch.stack([solver.inverse(step, predictions[step]) for step in steps])
