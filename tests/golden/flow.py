"""Replays of flow-matching models' goldens: levels, text, the first velocity, sampling, and the autoencoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.flow_schedule import FlowSchedule, Ramp
from pipeline.diffusion.levels import Level
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.direct_edit import DirectEdit
from pipeline.editing.flow_edit import FlowEdit
from pipeline.editing.instruct import Instruct
from pipeline.engine.calls import Denoise, Denoised, EncodeText, Steps
from pipeline.engine.engine import Engine
from pipeline.engine.pictures import encode_picture
from pipeline.engine.prompts import GuidedPrompt
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.models.families.flux import packed
from pipeline.records import EditedLatents, EditRequest
from tests.golden.checks import Check, edit, observed, relative, source_of
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
        first.append(engine.run_one(_predicted(prompts[at], negatives[at], scale, noise, trajectory.levels[0])))
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


def _predicted(prompt: str, negative: str, scale: float, latents: Tensor, level: Level) -> Steps[Tensor]:
    guided = yield from GuidedPrompt.encode(prompt, scale, negative)
    return (yield from guided.predict(latents, level)).velocity


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


def replay_flow_edit(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """FlowEdit of one image, with the recorded noises; and both branches' velocities where it begins."""
    start = NoiseStart(num_steps=settings["num_steps"])
    source = source_of(engine, golden["x0"][0], settings["source_prompt"], golden["noises"])
    trajectory = engine.run_one(start.invert(dataclasses.replace(source, draw_noise=lambda: golden["noises"][0])))
    yield levels_check([level.noise for level in trajectory.levels] + [0.0], golden["sigmas"])
    told = torch.tensor(trajectory.timesteps, dtype=golden["timesteps"].dtype)
    yield Check("timesteps", relative(told, golden["timesteps"]), 1e-6)
    level = trajectory.levels[settings["num_steps"] - settings["n_max"]]
    noised = level.noised(golden["x0"][0], golden["noises"][0])
    for branch in ("source", "target"):
        asked = _guided_as_the_model(
            settings[f"{branch}_prompt"], settings["negative_prompt"], settings[f"{branch}_guidance"], noised, level
        )
        ours = engine.run_one(asked)[None]
        yield Check(f"{branch} velocity", relative(ours, golden[f"velocity_{branch}_first"]), 1e-4)
    editor = FlowEdit(
        n_max=settings["n_max"],
        n_min=settings["n_min"],
        n_avg=settings["n_avg"],
        source_guidance_scale=settings["source_guidance"],
        guidance_scale=settings["target_guidance"],
    )
    request = EditRequest(
        source_prompt=settings["source_prompt"],
        target_prompt=settings["target_prompt"],
        negative_prompt=settings["negative_prompt"],
    )
    edited = edit(engine, editor, trajectory, request)
    moved = settings["n_max"] - settings["n_min"]
    entering = torch.stack([golden["x0"][0], *(record.latents for record in edited.history[: moved - 1])])
    yield Check("states", relative(entering, golden["edit_states"]), 1e-4)
    yield Check("final", relative(edited.latents[None], golden["final"]), 1e-4)


def replay_direct_edit(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """DirectEdit of one image. On FLUX the recorded levels end lower than the family's own."""
    if str(settings.get("sigmas", "")).startswith("linspace(1, 0.001"):
        engine = _with_ramp(engine, "to_lowest")
    skipped, num_steps = settings.get("skip_steps", 0), settings["num_steps"]
    inversion = DDIMInversion(num_steps=num_steps - skipped, skip_steps=skipped)
    trajectory = engine.run_one(inversion.invert(source_of(engine, golden["x0"][0], settings["source_prompt"])))
    levels = [*trajectory.levels, trajectory.solver.steps[-1].end]
    yield levels_check([level.noise for level in levels], golden["sigmas"][skipped:])
    yield Check("inverted", relative(trajectory.latents.flip(0), golden["inverted"][: len(levels)]), 1e-4)
    editor = DirectEdit(guidance_scale=settings["target_guidance"], attn_ratio=settings["attn_ratio"])
    injected = editor.steps_taking_values(trajectory, told=False)
    yield Check("steps that take values", float(injected != settings["injected_steps"]), 0.0)
    request = EditRequest(source_prompt=settings["source_prompt"], target_prompt=settings["target_prompt"])
    edited = edit(engine, editor, trajectory, request, user_mask=_mask_of(golden))
    ours = edited.history[0].details["velocity"][None]
    yield Check("first velocity", relative(ours, golden["velocity_target_first"]), 1e-4)
    walked = torch.stack([record.latents for record in edited.history])
    yield Check("trajectory", relative(walked, golden["trajectory"][-len(walked) :]), 1e-4)
    yield Check("final", relative(edited.latents[None], golden["final"]), 1e-4)


def replay_kontext(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """Kontext's edit of one image, on a network that was not trained for it."""
    backbone: Any = copy(engine.backbone)
    backbone.offers = dataclasses.replace(backbone.offers, references=True)
    engine = Engine(backbone, call_size=engine.call_size, pad=engine.pad)
    reference = golden["reference_latents"][0]
    if "pixels" in golden:
        encoded = encode_picture(backbone, golden["pixels"].numpy())[None]
        yield Check("reference", relative(encoded, golden["reference_latents"]), 1e-4)
    noise = golden["x_T"][0]
    trajectory = engine.run_one(
        NoiseStart(num_steps=settings["num_steps"]).invert(source_of(engine, noise, "", noise[None]))
    )
    yield levels_check([level.noise for level in trajectory.levels] + [0.0], golden["sigmas"])
    first = engine.run_one(_with_reference(settings, noise, reference, trajectory.levels[0]))[None]
    yield Check("first velocity", relative(first, golden["velocity_first"]), 1e-4)
    editor = Instruct(guidance_scale=settings["guidance_scale"])

    def sampled() -> Steps[EditedLatents]:  # the reference may be of another size than what is sampled
        latents = yield from editor.sample(trajectory, settings["prompt"], reference)
        return EditedLatents(latents=latents, masks=None)

    edited = engine.run_one(observed(sampled()))
    walked = torch.stack([record.latents for record in edited.history])[:, None]
    yield Check("trajectory", relative(walked, golden["trajectory"]), 1e-4)
    yield Check("final", relative(edited.latents[None], golden["final"]), 1e-4)


def _with_reference(settings: dict[str, Any], latents: Tensor, reference: Tensor, level: Level) -> Steps[Tensor]:
    (prompt,) = yield EncodeText((settings["prompt"],))
    told = prompt.telling(settings["guidance_scale"])
    prediction = yield from GuidedPrompt(told, told, 1.0, {"reference": reference}).predict(latents, level)
    return prediction.velocity


def replay_joint_attention(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """What image places attend to of two words, block by block, of two rows in one call."""
    told = zip(settings["guidance"], golden["x"], settings["timesteps"], strict=True)
    scales, latents, times = zip(*told, strict=True)

    def ask() -> Steps[Denoised]:
        (prompt,) = yield EncodeText((settings["prompt"],))
        rows = [prompt.telling(scale) for scale in scales]
        levels = [Level(1.0 - time / 1000.0, time / 1000.0, time) for time in times]
        return (yield Denoise(torch.stack(latents), levels, rows, watch=[settings["watch"]] * len(rows)))

    for block, recorded in enumerate(golden["attention"]):
        backbone: Any = copy(engine.backbone)
        openings = dataclasses.replace(backbone.offers.openings, watched=frozenset({block}))
        backbone.offers = dataclasses.replace(backbone.offers, openings=openings)
        seen = Engine(backbone, call_size=len(latents), pad=False).run_one(ask())
        assert seen.attention is not None
        yield Check(f"attention, block {block}", relative(seen.attention, recorded), 1e-4)
    yield Check("velocity", relative(seen.predictions.velocity, golden["velocity"]), 1e-4)
    if settings["prompt"] == "a photo of a cat with a hat":  # the recording watches both things
        words = {settings["prompt"].split().index(word) for word in ("cat", "hat")}
        places = engine.backbone.encode_text(settings["prompt"]).places_of(words)
        yield Check("places of the words", float(places != settings["watch"]), 0.0)


def _mask_of(golden: dict[str, Tensor]) -> Tensor | None:
    """(h, w) of a recorded mask, of latents or of packed tokens."""
    if (packed_mask := golden.get("mask_packed")) is not None:
        height, width = (side // 2 for side in golden["x0"].shape[-2:])
        tokens = packed_mask.reshape(height, width)
        return tokens.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
    return golden["mask"][0, 0] if "mask" in golden else None


def _with_ramp(engine: Engine, ramp: Ramp) -> Engine:
    """The same model, its levels along another ramp."""
    backbone: Any = copy(engine.backbone)
    backbone.schedule = dataclasses.replace(backbone.schedule, ramp=ramp)
    return Engine(backbone, call_size=engine.call_size, pad=engine.pad)


def _guided_as_the_model(prompt: str, negative: str, scale: float, latents: Tensor, level: Level) -> Steps[Tensor]:
    cond, uncond = yield EncodeText((prompt, negative))
    prediction = yield from GuidedPrompt.as_model_guides(cond, uncond, scale).predict(latents, level)
    return prediction.velocity
