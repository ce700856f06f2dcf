"""Replays of flow-matching models' goldens: levels, text, the first velocity, sampling, and the autoencoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.flow_schedule import FlowSchedule
from pipeline.diffusion.levels import Prediction
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.engine.engine import Engine
from pipeline.engine.prompts import GuidedPrompt
from pipeline.inversion.noise import NoiseStart
from pipeline.models.families.flux import packed
from pipeline.records import EditRequest
from tests.golden.checks import Check, edit, relative, source_of
from tests.golden.sdxl import EVERY, autoencoder_checks, decoded_check

SCHEDULES = {  # by the families that `sigmas_real_sizes` names
    "sd3": FlowSchedule.from_config({"shift": 3.0}, "to_lowest"),
    "dev": FlowSchedule.from_config({"use_dynamic_shifting": True, "shift": 3.0}, "even"),
    "schnell": FlowSchedule.from_config({"shift": 1.0}, "even"),
}


def model_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What of a recording's settings is the model's to know: keys of the recipe's model section."""
    found: dict[str, Any] = {}
    if (length := settings.get("max_sequence_length")) is not None:
        found["text_tokens"] = length
    if settings.get("without_t5"):
        found["t5"] = False
    if settings.get("model") == "tiny-flux" and "guidance_scale" in settings:
        found["embedded_guidance"] = settings["guidance_scale"]
    return found


def velocity(prediction: Prediction) -> Tensor:
    """Flow's n - x0."""
    return prediction.noise - prediction.data


def levels_check(sigmas: list[float], golden: Tensor) -> Check:
    """All N + 1 shares of noise."""
    return Check("levels", relative(torch.tensor(sigmas, dtype=golden.dtype), golden), 1e-6)


def replay_sigmas(golden: dict[str, Tensor]) -> Iterator[Check]:
    """Levels at real sizes: one array for each family, number of steps and number of tokens."""
    for name, recorded in golden.items():
        family, num_steps, tokens = name.split("_")
        sigmas = SCHEDULES[family].sigmas(int(num_steps), (2, 2 * int(tokens)))
        yield Check(name, relative(torch.tensor(sigmas, dtype=recorded.dtype), recorded), 1e-6)


def replay_flow_sample(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """Text to image of a flow-matching model; or one image through the autoencoder and back; or levels alone."""
    if "pixels" in golden:
        yield from autoencoder_checks(golden, engine)
        return
    if "x_T" not in golden:
        yield from replay_sigmas(golden)
        return
    prompts = settings["prompts"]
    negatives = settings["negative_prompts"] or [""] * len(prompts)
    # Of a network that is told its guidance this is what guides beside.
    scale = settings["true_cfg_scale"] if "true_cfg_scale" in settings else settings["guidance_scale"]
    scale = scale if scale > 1 else 1.0
    yield from _text_checks(golden, prompts, negatives, engine, guided=scale > 1)
    if "x_T_packed_first" in golden:
        yield Check("packing", relative(packed(golden["x_T"])[:, :3], golden["x_T_packed_first"]), 0.0)
    start = NoiseStart(num_steps=settings["num_steps"])
    edits, first = [], []
    for at, noise in enumerate(golden["x_T"]):
        trajectory = engine.run_one(start.invert(source_of(engine, noise, "", noise[None])))
        first.append(velocity(engine.run_one(_predicted(prompts[at], negatives[at], scale, noise, trajectory.levels))))
        request = EditRequest(target_prompt=prompts[at], negative_prompt=negatives[at])
        edits.append(edit(engine, ClassifierFreeGuidance(guidance_scale=scale), trajectory, request))
    yield levels_check([level.noise for level in trajectory.levels] + [0.0], golden["sigmas"])
    told = torch.tensor(trajectory.timesteps, dtype=golden["timesteps"].dtype)
    yield Check("timesteps", relative(told, golden["timesteps"]), 1e-6)
    yield Check("first velocity", relative(torch.stack(first), golden["velocity_first"]), 1e-4)
    walked = torch.stack([torch.stack([record.latents for record in one.history]) for one in edits], dim=1)
    yield Check("trajectory", relative(walked, golden["trajectory"]), 1e-4)
    yield Check("final", relative(walked[-1], golden["final"]), 1e-4)
    if "decoded_sub" in golden:
        yield decoded_check("decoded", walked[-1], golden, engine)


def _predicted(prompt: str, negative: str, scale: float, latents: Tensor, levels: Any) -> Any:
    guided = yield from GuidedPrompt.encode(prompt, scale, negative)
    return (yield from guided.predict(latents, levels[0]))


def _text_checks(
    golden: dict[str, Tensor], prompts: list[str], negatives: list[str], engine: Engine, *, guided: bool
) -> Iterator[Check]:
    texts = {"prompt_embeds_sub": ("embedding", prompts), "pooled": ("pooled", prompts)}
    if guided:
        texts |= {"negative_embeds_sub": ("embedding", negatives), "negative_pooled": ("pooled", negatives)}
    for name, (part, some) in texts.items():
        if name not in golden:
            continue
        ours = torch.stack([engine.backbone.encode_text(prompt).parts[part] for prompt in some])
        yield Check(name, relative(ours[:, ::EVERY] if part == "embedding" else ours, golden[name]), 1e-4)


def with_ramp(engine: Engine, ramp: Any) -> Engine:
    """The same model, its levels along another ramp."""
    assert isinstance(engine.backbone.schedule, FlowSchedule)
    engine.backbone.schedule = dataclasses.replace(engine.backbone.schedule, ramp=ramp)
    return engine
