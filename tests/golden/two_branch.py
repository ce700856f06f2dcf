"""Replays of the methods with a source and a target branch: see replay.py.

Random weights amplify rounding by 35 to 100 per step at inverted latents. What was recorded from there in float64 is
replayed to its end in float64 only; in float32 one step from the recorded start has to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.alignment import equalizer_weights, refinement_mapper, replacement_mapper, word_schedule
from pipeline.editing.observing import StepRecord
from pipeline.editing.prompt_to_prompt import PromptToPrompt
from pipeline.editing.two_branch import BranchEdit, Branches, two_branch
from pipeline.engine.calls import Steps
from pipeline.engine.engine import Engine
from pipeline.inversion.direct import DirectInversion
from pipeline.inversion.negative_prompt import NegativePromptInversion, between
from pipeline.inversion.noise import NoiseStart
from pipeline.inversion.null_text import NullTextInversion
from pipeline.records import EditedLatents, EditRequest, Trajectory, WordPair
from tests.golden.checks import Check, edit, equal, losses_kept, observed, relative_l2, source_of
from tests.golden.masactrl import compare_entries, masactrl

EVERY = 4  # stride of the recorded subsamples


def is_double(engine: Engine) -> bool:
    return engine.backbone.record.dtype == "float64"


def window(value: float | list[float]) -> tuple[float, float]:
    return (0.0, value) if isinstance(value, float | int) else (value[0], value[1])


def prompt_to_prompt(recipe: dict[str, Any], guidance: float) -> PromptToPrompt:
    """The editor of a recorded recipe."""
    threshold, subtract = recipe["th"]
    return PromptToPrompt(
        guidance_scale=guidance,
        kind=recipe["kind"],
        cross_replace_steps=window(recipe["cross_replace_steps"]["default_"]),
        self_replace_steps=window(recipe["self_replace_steps"]),
        start_blend=recipe["start_blend"],
        blend_threshold=threshold,
        subtract_threshold=subtract,
    )


def request_of(recipe: dict[str, Any], source: str, target: str, at: int = 1) -> EditRequest:
    """What the recorded recipe asks for one target, the `at`th prompt."""

    def words(name: str) -> WordPair | None:
        given = recipe.get(name)
        return None if given is None else WordPair(source=tuple(given[0]), target=tuple(given[at]))

    windows = {key: window(value) for key, value in recipe["cross_replace_steps"].items() if key != "default_"}
    factors = recipe.get("equalizer") or {"words": [], "values": []}
    return EditRequest(
        source_prompt=source,
        target_prompt=target,
        blend_words=words("blend_words"),
        subtract_words=words("subtract_words"),
        equalizer=dict(zip(factors["words"], factors["values"], strict=True)),
        cross_replace_steps=windows,
    )


def started_at(trajectory: Trajectory, start: Tensor) -> Trajectory:
    """The same trajectory from the recorded start: a recomputed one is not the same to the last digit."""
    latents = trajectory.latents.clone()
    latents[0] = start
    return dataclasses.replace(trajectory, latents=latents)


def walked(history: tuple[StepRecord, ...]) -> Tensor:
    """(N, 2, C, h, w): source and target after each step."""
    return torch.stack([torch.stack([record.source_latents, record.latents]) for record in history])


def compare_walk(golden: dict[str, Tensor], history: tuple[StepRecord, ...], tolerance: float) -> Iterator[Check]:
    """Latents after each step, and the target's mask, where they were recorded."""
    ours = walked(history)
    if "step1" in golden:
        yield Check("step 1", relative_l2(ours[0], golden["step1"]), min(tolerance, 1e-3))
    if "latents_sub" in golden:
        yield Check("latents", relative_l2(ours[..., ::EVERY, ::EVERY], golden["latents_sub"]), tolerance)
    if "masks" in golden:
        yield compare_masks(golden["masks"], history)
    yield Check("final", relative_l2(ours[-1], golden["final"]), tolerance)


def compare_masks(golden: Tensor, history: tuple[StepRecord, ...]) -> Check:
    """Share of pixels of the target's masks that differ."""
    ours = torch.stack([record.masks[0] for record in history])
    return Check("masks, share of different pixels", float((ours != golden[:, 1]).double().mean()), 0.0)


def replay_prompt_to_prompt(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """Generated images, from Gaussian noise; several targets of one source are edits of their own."""
    source_prompt, *targets = settings["prompts"]
    start = NoiseStart(num_steps=settings["num_steps"])
    given = source_of(engine, golden["x_T"][0], source_prompt, golden["x_T"])
    trajectory = engine.run_one(start.invert(given))
    yield equal("timesteps", trajectory.timesteps, torch.tensor(settings["timesteps"]))
    editor = prompt_to_prompt(settings, settings["guidance_scale"])
    source = engine.backbone.encode_text(source_prompt)
    for at, target_prompt in enumerate(targets):
        request = request_of(settings, source_prompt, target_prompt, at + 1)
        target = engine.backbone.encode_text(target_prompt)
        if settings["kind"] == "replace":
            mapper = replacement_mapper(source, target)[:20, :20]
            yield Check("mapper", float((mapper - golden["mapper"][at]).abs().max()), 1e-7)
        else:
            alignment = refinement_mapper(source, target)
            kept = golden["mapper_alphas"][at] == 1
            yield equal("kept tokens", alignment.keep.bool(), kept)
            yield equal("aligned tokens", alignment.source[kept], golden["mapper"][at][kept])
        schedule = word_schedule(target, settings["num_steps"], editor.cross_replace_steps, request.cross_replace_steps)
        yield equal("word schedule", schedule.flatten(), golden["cross_alpha"][:, at].flatten())
        if "equalizer" in golden:
            yield equal("equalizer", equalizer_weights(target, request.equalizer), golden["equalizer"][0])
        history = edit(engine, editor, trajectory, request).history
        rows = [0, at + 1]
        recorded = {
            "step1": golden["step1"][rows],
            "latents_sub": golden["latents_sub"][:, rows],
            "final": golden["final"][rows],
        }
        if request.blend_words is not None:
            recorded["masks"] = golden["masks"][:, rows]
        yield from compare_walk(recorded, history, 1e-3)
        if "step5" in golden:
            yield Check("step 5", relative_l2(walked(history)[4], golden["step5"][rows]), 1e-3)


def replay_direct_inversion(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """The pinned source, and an edit beside it."""
    prompt = settings.get("source_prompt", "")
    inversion = DirectInversion(num_steps=settings["num_steps"])
    trajectory = engine.run_one(inversion.invert(source_of(engine, golden["x0"][0], prompt)))
    yield from compare_inversion(golden, trajectory, engine)
    if "p2p" not in settings:
        yield from replay_other_direct(golden, settings, trajectory, engine)
        return
    editor = prompt_to_prompt(settings["p2p"], settings["guidance_scale"])
    request = request_of(settings["p2p"], prompt, settings["target_prompt"])
    if not is_double(engine):  # the recorded trajectory, since ours is not it in float32
        trajectory = dataclasses.replace(trajectory, latents=golden["x_stars"].flip(0))
    pinned = started_at(trajectory, golden["x_T"][0])
    result = edit(engine, editor, pinned, request)
    source = walked(result.history)[:, 0]
    on_it = bool(torch.equal(source, pinned.latents[1:]))
    yield equal("source row equals the trajectory", [on_it], torch.tensor([True]))
    if not is_double(engine):
        yield Check("step 1", relative_l2(walked(result.history)[0], golden["step1"]), 1e-3)
        return
    yield from compare_walk(golden, result.history, 1e-5)


def compare_inversion(golden: dict[str, Tensor], trajectory: Trajectory, engine: Engine) -> Iterator[Check]:
    """DDIM inversion from the image, and one level of it from a recorded latent."""
    ours = trajectory.latents.flip(0)
    if "x_stars" in golden:
        yield Check("one inverse step", relative_l2(ours[1], golden["x_stars"][1]), 1e-6 if is_double(engine) else 1e-3)
    if is_double(engine):
        yield Check("inversion", relative_l2(ours[-1], golden["x_T"][0]), 1e-6)


def replay_other_direct(
    golden: dict[str, Tensor], settings: dict[str, Any], trajectory: Trajectory, engine: Engine
) -> Iterator[Check]:
    """The pinned source beside MasaCtrl, and the explicit offsets of a source that is not put back all the way."""
    double = is_double(engine)
    start = started_at(trajectory, golden["x_T"][0])
    if "scaled_sub" in golden:
        prompt = settings.get("source_prompt", "")
        for name, scale, interval in (("scaled", 0.4, 1), ("interval", 1.0, 5)):
            inversion = DirectInversion(
                num_steps=settings["num_steps"],
                offset_scale=scale if scale == 1.0 else settings.get("offset_scale", scale),
                interval=interval if interval == 1 else settings.get("interval", interval),
            )
            offsets = explicit_offsets(inversion, start, prompt, settings["guidance_scale"], engine)
            recorded = golden[f"{name}_sub"]
            ours = offsets[:, None, :, ::EVERY, ::EVERY]
            yield Check(f"{name}, first offset", relative_l2(ours[0], recorded[0]), 1e-5 if double else 1e-3)
            if double:
                yield Check(f"{name}, offsets", relative_l2(ours, recorded), 1e-5)
        return
    target_prompt = settings["target_prompt"] if "target_prompt" in settings else settings["prompts"][1]
    editor = masactrl(settings | settings.get("masactrl", {}))
    history = edit(engine, editor, start, EditRequest(target_prompt=target_prompt)).history
    checks = list(compare_entries(golden, start, history, 1e-5))
    yield from checks if double else [Check(check.name, check.deviation, 1e-3) for check in checks[:2]]
    source = walked(history)[:, 0]
    kept = bool(torch.equal(source, start.latents[1:]))
    yield equal("source row equals the trajectory", [kept], torch.tensor([True]))


def explicit_offsets(
    inversion: DirectInversion, trajectory: Trajectory, prompt: str, guidance_scale: float, engine: Engine
) -> Tensor:
    """(N, C, h, w): what an inversion has added to the source after each step of a plain guided walk."""
    loose = dataclasses.replace(trajectory, pin_shares=inversion.pin_shares(trajectory.num_steps))
    edit = Recorded(loose, guidance_scale)

    def walk() -> Steps[EditedLatents]:
        branches = yield from Branches.encode(loose, EditRequest(target_prompt=prompt))
        return (yield from two_branch(loose, branches, edit))

    history = engine.run_one(observed(walk())).history
    sources = torch.stack([record.source_latents for record in history])
    return sources - torch.stack(edit.moved[1::2])


class Recorded(BranchEdit):
    """Plain guided sampling, which remembers where the branches went by themselves: the target, then the source."""

    def __init__(self, trajectory: Trajectory, guidance_scale: float) -> None:
        super().__init__(trajectory, guidance_scale)
        self.moved: list[Tensor] = []

    def move(self, *step: Any) -> tuple[Tensor, Tensor]:
        moved, data_pred = super().move(*step)
        self.moved.append(moved)
        return moved, data_pred


def replay_negative_prompt(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """The source prompt as the unconditional one, with an edit or as a reconstruction."""
    prompt = settings["source_prompt"]
    inversion = NegativePromptInversion(num_steps=settings["num_steps"])
    trajectory = engine.run_one(inversion.invert(source_of(engine, golden["x0"][0], prompt)))
    yield from compare_inversion(golden, trajectory, engine)
    if "uncond" in golden:
        assert trajectory.uncond is not None
        uncond = trajectory.uncond[0]
        yield Check("unconditional embedding", relative_l2(uncond.embedding, golden["uncond"][0]), 1e-6)
        half = between(uncond, engine.backbone.encode_text(""), 0.5)
        yield Check("interpolated embedding", relative_l2(half.embedding, golden["uncond_interp05"][0]), 1e-6)
    recipe = settings.get("p2p")
    if recipe is None:
        recipe = {"kind": "refine", "cross_replace_steps": {"default_": 0.0}, "self_replace_steps": 0.0}
        recipe |= {"start_blend": 0.2, "th": [0.3, 0.3]}
    editor = prompt_to_prompt(recipe, settings["guidance_scale"])
    request = request_of(recipe, prompt, settings.get("target_prompt", prompt))
    result = edit(engine, editor, started_at(trajectory, golden["x_T"][0]), request)
    ours = walked(result.history)
    if "p2p" not in settings:  # one row was recorded: the source
        if is_double(engine):
            yield Check("reconstruction", relative_l2(ours[-1, :1], golden["final"]), 1e-5)
            sub = ours[:, :1, :, ::EVERY, ::EVERY]
            yield Check("latents", relative_l2(sub, golden["latents_sub"]), 1e-5)
        else:
            first = ours[0, :1, :, ::EVERY, ::EVERY]
            yield Check("latents after step 1", relative_l2(first, golden["latents_sub"][0]), 1e-3)
    elif is_double(engine):
        yield from compare_walk(golden, result.history, 1e-5)
    else:
        yield Check("step 1", relative_l2(ours[0], golden["step1"]), 1e-3)


def replay_null_text(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """The optimisation from the recorded start, and an edit with the recorded embeddings."""
    prompt = settings["source_prompt"]
    inversion = NullTextInversion(
        num_steps=settings["num_steps"],
        edit_guidance_scale=settings["guidance_scale"],
        num_inner_steps=settings["num_inner_steps"],
        early_stop_epsilon=settings["early_stop_epsilon"],
        learning_rate_steps=100,
    )
    plain = DirectInversion(num_steps=settings["num_steps"])
    pivot = engine.run_one(plain.invert(source_of(engine, golden["x0"][0], prompt)))
    yield from compare_inversion(golden, pivot, engine)
    if not is_double(engine):  # the recorded trajectory, since ours is not it in float32
        pivot = dataclasses.replace(pivot, latents=golden["x_stars"].flip(0))
    trajectory = started_at(dataclasses.replace(pivot, pinned=False), golden["x_T"][0])
    cond, empty = engine.backbone.encode_text(prompt), engine.backbone.encode_text("")
    with losses_kept() as losses:
        uncond = engine.run_one(inversion.optimise(trajectory, cond, empty))
    per_step = settings["num_inner_steps"]
    recorded = golden["losses"]
    editor = prompt_to_prompt(settings["p2p"], settings["guidance_scale"])
    request = request_of(settings["p2p"], prompt, settings["target_prompt"])
    stored = golden["null_embeddings"]
    given = tuple(empty.replacing(embedding=embedding) for embedding in stored)
    result = edit(engine, editor, dataclasses.replace(trajectory, uncond=given), request)
    first = relative_l2(uncond[0].embedding, stored[0])
    if is_double(engine):
        yield Check("losses", relative_l2(torch.tensor(losses, dtype=torch.float64), recorded), 1e-6)
        yield Check("first embedding", first, 1e-5)
        yield Check("embeddings", relative_l2(torch.stack([one.embedding for one in uncond]), stored), 1e-5)
        yield from compare_walk(golden, result.history, 1e-5)
        return
    ours = torch.tensor(losses[:per_step], dtype=recorded.dtype)
    yield Check("losses of the first step", relative_l2(ours, recorded[:per_step]), 1e-4)
    yield Check("first embedding", first, 1e-3)
    yield Check("step 1", relative_l2(walked(result.history)[0], golden["step1"]), 1e-3)
