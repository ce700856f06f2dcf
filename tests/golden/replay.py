"""Replays golden tensors, recorded from the methods' reference implementations, through this package's own methods.

    python -m tests.golden.replay FILE.npz [FILE.npz ...] [--model FOLDER] [--dtype float32]
    python -m tests.golden.replay FOLDER        a benchmark in miniature (benchmarks.py), drawn pairs (pair_sets.py)

The kind of a golden is the name of the folder that it lies in. Prints, per quantity, the deviation relative to the
largest golden value beside its tolerance; the exit code is 1 where one is exceeded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.levels import prediction_of
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.ledits_pp import LEditsPP, is_active
from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import Conditioning, Denoise, Denoised, EncodeText
from pipeline.engine.engine import Engine
from pipeline.engine.pictures import encode_picture
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig
from pipeline.records import Concept, EditRequest, Trajectory
from tests.golden.benchmarks import set_of as benchmark_of
from tests.golden.checks import Check, ObservedLatents, edit, equal, observed, relative, source_of
from tests.golden.consistory import replay_consistory
from tests.golden.diffedit import replay_diffedit
from tests.golden.flow import (
    model_of,
    replay_direct_edit,
    replay_flow_edit,
    replay_flow_sample,
    replay_joint_attention,
    replay_kontext,
)
from tests.golden.flow_variations import replay_dna_edit, replay_flow_align
from tests.golden.h_edit import read_h_edit, replay_h_edit
from tests.golden.masactrl import replay_masactrl
from tests.golden.pair_sets import set_of as pairs_of
from tests.golden.proxedit import replay_proxedit
from tests.golden.rf_solvers import replay_rf_solvers
from tests.golden.riemannian import replay_riemannian
from tests.golden.sae_concepts import replay_sae_concepts
from tests.golden.sdxl import replay_sdxl_sample, with_size_ids
from tests.golden.two_branch import (
    replay_direct_inversion,
    replay_negative_prompt,
    replay_null_text,
    replay_prompt_to_prompt,
)
from tests.golden.uniedit_flow import replay_uniedit_flow

HERE = Path(__file__).parent
TINY_SD = HERE / "tiny-sd"
TINY_SDXL = HERE / "tiny-sdxl"
TINY_SD3 = HERE / "tiny-sd3"
TINY_FLUX = HERE / "tiny-flux"
TINY_SCHNELL = HERE / "tiny-flux-schnell"


def replay(path: Path, model: Path | None = None, dtype: torch.dtype = torch.float32) -> list[Check]:
    """Replay one file, on the model that it was made with; `model` is another folder of that.

    A folder of a benchmark in miniature or of drawn pairs, or a file in one, is replayed as a whole.
    """
    if (found := benchmark_of(path) or pairs_of(path)) is not None:
        replay_set, folder = found
        return list(replay_set(folder))
    kind = path.parent.name
    golden, settings = (read_h_edit if kind == "h_edit" else read_golden)(path, dtype)
    name = settings.get("model", TINY_SDXL.name if kind.startswith("sdxl") else TINY_SD.name)
    # diffusers encodes an empty prompt that is given, whatever the checkpoint says of one that is not.
    given = (*(settings.get("negative_prompts") or ()), settings.get("inversion_prompt"))
    empty_prompt = "encoded" if "" in given else "auto"
    backbone = loaded(model or HERE / name, dtype, empty_prompt, **model_of(settings))
    if ids := settings.get("size_ids"):
        backbone = with_size_ids(backbone, ids)
    return list(KINDS[kind](golden, settings, Engine(backbone, call_size=8, pad=False)))


def read_golden(path: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one file, and its settings."""
    archive = np.load(path)
    golden = {name: torch.from_numpy(archive[name]) for name in archive.files if name not in ("settings", "meta_json")}
    for name, tensor in golden.items():
        golden[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    settings = json.loads(str(archive["settings"]) if "settings" in archive.files else bytes(archive["meta_json"]))
    return golden, settings


@cache
def loaded(
    model: Path, dtype: torch.dtype, empty_prompt: Literal["auto", "encoded"] = "auto", **config: Any
) -> Backbone:
    """The checkpoint, loaded once for all with these settings."""
    return load_backbone(ModelConfig(name=str(model), empty_prompt=empty_prompt, **config), dtype=dtype, device="cpu")


def replay_ddim(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """Text to image under classifier-free guidance, and DDIM inversion with its reconstruction."""
    num_steps = settings["num_inference_steps"]
    if "x0" not in golden:
        draws = torch.cat([golden["x_T"], *golden.get("variance_noise", [])])
        start = NoiseStart(num_steps=num_steps, eta=settings["eta"])
        trajectory = engine.run_one(start.invert(source_of(engine, golden["x_T"][0], "", draws)))
        editor = ClassifierFreeGuidance(guidance_scale=settings["guidance_scale"])
        request = EditRequest(target_prompt=settings["prompt"], negative_prompt=settings["negative_prompt"])
        sampled = edit(engine, editor, trajectory, request)
        yield equal("timesteps", trajectory.timesteps, golden["timesteps"])
        walked = torch.stack([record.latents for record in sampled.history])[:, None]
        yield Check("trajectory", relative(walked, golden["trajectory"]), 1e-4)
        yield Check("final", relative(sampled.latents[None], golden["final"]), 1e-4)
        return
    guidance = settings["inversion_guidance"] or 1.0
    prompts = settings["prompt"] if isinstance(settings["prompt"], list) else [settings["prompt"]] * len(golden["x0"])
    inversion = DDIMInversion(num_steps=num_steps, guidance_scale=guidance)
    trajectories = [
        engine.run_one(inversion.invert(source_of(engine, latents, prompt)))
        for latents, prompt in zip(golden["x0"], prompts, strict=True)
    ]
    yield equal("timesteps", trajectories[0].timesteps, golden["timesteps"])
    inverted = torch.stack([trajectory.latents.flip(0)[1:] for trajectory in trajectories], dim=1)
    yield Check("first three inverse steps", relative(inverted[:3], golden["inverted"][:3]), 1e-4)
    yield Check("x_T", relative(inverted[-1], golden["x_T"]), 5e-3)
    rebuilt = torch.stack([edit(engine, Reconstruct(), t, EditRequest()).latents for t in trajectories])
    yield Check("reconstruction", relative(rebuilt, golden["reconstruction"]), 2e-1)
    solver, step = trajectories[0].solver, num_steps // 2
    clean, noise = golden["x0"][0], golden["x_T"][0]
    below = prediction_of("epsilon", noise[None], clean[None], [solver.level_below(step)])[0]
    raised = solver.inverse(step, below)
    above = prediction_of("epsilon", noise[None], raised[None], [solver.steps[step].start])[0]
    back = solver.transition(step, raised, above, None).mean
    yield Check("algebraic inverse", relative(back, golden["x0"][0]), 1e-5)


def replay_ddpm_inversion(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """Edit-friendly inversion as its authors publish it: the last noise map is zeroed."""
    kept = settings["num_inference_steps"] - settings["skip"]
    inversion = DDPMInversion(
        solver="ddim",
        num_steps=kept,
        skip_steps=settings["skip"],
        eta=settings["eta"],
        eta_form="authors",
        exact_last_step=False,
        source_guidance_scale=settings["cfg_source"],
    )
    source = source_of(engine, golden["x0"][0], settings["source_prompt"], golden["noises"])
    trajectory = engine.run_one(inversion.invert(source))
    yield equal("timesteps", trajectory.timesteps, golden["timesteps"][-kept:])
    yield Check("noise maps", relative(trajectory.noise_maps.flip(0), golden["zs"][:kept]), 1e-4)
    yield Check("latents", relative(trajectory.latents[:-1].flip(0), golden["wts"][1 : kept + 1]), 1e-4)
    rebuilt = edit(engine, Reconstruct(), trajectory, EditRequest())
    yield Check("reconstruction", relative(rebuilt.latents[None], golden["reconstruction"]), 3e-3)
    edited = [
        edit(
            engine, ClassifierFreeGuidance(guidance_scale=scale), trajectory, EditRequest(target_prompt=prompt)
        ).latents
        for prompt, scale in zip(settings["target_prompts"], settings["cfg_targets"], strict=True)
    ]
    yield Check("edited", relative(torch.stack(edited), golden["edited"]), 3e-3)


def concepts_of(options: dict[str, Any]) -> tuple[Concept, ...]:
    """The maintained implementation's lists, one entry per concept or one value for all."""

    def per_concept(name: str, default: Any) -> list[Any]:
        value = options.get(name, default)
        return value if isinstance(value, list) else [value] * len(options["editing_prompt"])

    columns = zip(
        options["editing_prompt"],
        per_concept("edit_guidance_scale", 5.0),
        per_concept("edit_threshold", 0.9),
        per_concept("edit_warmup_steps", 0),
        per_concept("edit_cooldown_steps", None),
        per_concept("reverse_editing_direction", False),
        strict=True,
    )
    return tuple(
        Concept(
            prompt=prompt,
            guidance_scale=scale,
            threshold=threshold,
            warmup_steps=warmup,
            cooldown_steps=cooldown,
            direction="remove" if reverse else "add",
        )
        for prompt, scale, threshold, warmup, cooldown, reverse in columns
    )


def ledits_editor(options: dict[str, Any], *, xl: bool) -> LEditsPP:
    """Mask mode of the maintained implementation's two switches; the second implies the first."""
    if options.get("use_intersect_mask", True):
        return LEditsPP(mask="intersect", **{"intersect_from_timestep": 1000} if xl else {})
    return LEditsPP(mask="attention" if options.get("use_cross_attn_mask", False) else "noise")


def replay_ledits_pp(
    golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine, *, xl: bool = False
) -> Iterator[Check]:
    """LEDITS++, one image at a time; and again with recorded predictions, without the model.

    `xl`: as the reference's pipeline for Stable Diffusion XL, which intersects masks at every step and leaves out the
    last noise maps.
    """
    zeroed = settings["invert"].get("num_zero_noise_steps", 3) if xl else 0
    zero_last = settings["scheduler"] == "dpm" and settings["final_sigmas_type"] == "zero"
    inversion = DDPMInversion(
        solver="ddim" if settings["scheduler"] == "ddim" else "sde-dpmsolver++",
        num_steps=settings["invert"]["num_inversion_steps"],
        skip=settings["invert"]["skip"],
        exact_last_step=not zero_last,
    )
    yield equal("all timesteps", all_timesteps(inversion, engine), golden["all_timesteps"])
    editor, request = ledits_editor(settings["edit"], xl=xl), EditRequest(concepts=concepts_of(settings["edit"]))
    if "images" in golden:
        encoded = torch.stack([encode_picture(engine.backbone, image.numpy()) for image in golden["images"]])
        yield Check("x0", relative(encoded, golden["x0"]), 1e-5)
    trajectories, edits, rebuilt, walked = [], [], [], []
    for at, latents in enumerate(golden["x0"]):
        source = source_of(engine, latents, "", golden["noises"][:, at])
        trajectories.append(without_last_maps(engine.run_one(inversion.invert(source)), zeroed))
        mask = golden.get("user_mask")
        mask = None if mask is None else mask.reshape(-1, *mask.shape[-2:])[0]
        edits.append(edit(engine, editor, trajectories[-1], request, user_mask=mask))
        rebuilt.append(edit(engine, editor, trajectories[-1], EditRequest()).latents)
        walked.append(edit(engine, Reconstruct(), trajectories[-1], EditRequest()).latents)
    yield equal("timesteps", trajectories[0].timesteps, golden["timesteps"])
    yield Check("noise maps", relative(torch.stack([t.noise_maps for t in trajectories], 1), golden["zs"]), 1e-5)
    ends = torch.stack([t.latents[[0, -2]] for t in trajectories], dim=1)
    yield Check("noised latents", relative(ends, golden["xts_first_last"]), 1e-5)
    if not zeroed:
        yield Check("reconstruction", relative(torch.stack(rebuilt), golden["reconstruction"]), 1e-5)
    # Walking back through a random network amplifies the rounding of each step; no concept at all does not walk.
    yield Check("reconstruction, walked", relative(torch.stack(walked), golden["reconstruction"]), 1e-3)
    masks, latents = unroll(edits, trajectories)
    yield Check("masks, share of different pixels", float((masks != golden["mask"]).double().mean()), 1e-3)
    steps = golden["trajectory_steps"].tolist()
    early = [place for place, step in enumerate(steps) if step < trajectories[0].num_steps // 2]
    yield Check("trajectory, early half", relative(latents[steps][early], golden["trajectory"][early]), 1e-3)
    yield Check("final", relative(latents[-1], golden["final"]), 3e-3)
    if "attn_map" in golden and edits[0].history[0].attention is not None:
        seen = torch.zeros_like(golden["attn_map"])
        for at, result in enumerate(edits):
            for record in result.history:
                if record.attention is not None:
                    seen[record.step, :, at] = record.attention
        half = len(seen) // 2  # later maps inherit the amplified rounding of all steps before
        yield Check("attention, early half", relative(seen[:half], golden["attn_map"][:half]), 1e-3)
    if "eps_edit" in golden:
        yield from replay_without_model(golden, editor, request, trajectories[0], inversion, engine)


def without_last_maps(trajectory: Trajectory, count: int) -> Trajectory:
    """A trajectory whose last noise maps are zero."""
    maps = trajectory.noise_maps.clone()
    maps[len(maps) - count :] = 0.0
    return dataclasses.replace(trajectory, noise_maps=maps)


def all_timesteps(inversion: DDPMInversion, engine: Engine) -> tuple[int, ...]:
    """The whole schedule, the skipped steps included."""
    schedule, steps = engine.backbone.schedule, inversion.schedule_steps
    return schedule.ddim_timesteps(steps, "leading") if inversion.solver == "ddim" else schedule.dpm_timesteps(steps)


def unroll(edits: list[ObservedLatents], trajectories: list[Trajectory]) -> tuple[Tensor, Tensor]:
    """Masks (N, E, B, h, w) and latents (N, B, C, h, w) of every step, those that were not computed included."""
    num_steps = trajectories[0].num_steps
    all_masks, all_latents = [], []
    for result, trajectory in zip(edits, trajectories, strict=True):
        masks = torch.zeros((num_steps, *result.masks.shape), dtype=torch.bool)
        latents = trajectory.latents[1:].clone()
        for record in result.history:
            masks[record.step], latents[record.step] = record.masks, record.latents
        all_masks.append(masks)
        all_latents.append(latents)
    return torch.stack(all_masks, dim=2), torch.stack(all_latents, dim=1)


def replay_without_model(
    golden: dict[str, Tensor],
    editor: LEditsPP,
    request: EditRequest,
    trajectory: Trajectory,
    inversion: DDPMInversion,
    engine: Engine,
) -> Iterator[Check]:
    """The same, with the recorded predictions and attention as the model's answers."""
    inverted = answer(
        inversion.invert(source_of(engine, golden["x0"][0], "", golden["noises"][:, 0])),
        lambda call: Denoised(prediction_of("epsilon", golden["eps_inversion"][:, 0], call.latents, call.levels), None),
    )
    yield Check("model-free noise maps", relative(inverted.noise_maps[:, None], golden["zs"]), 1e-5)
    step_of = {level: step for step, level in enumerate(trajectory.levels)}

    def recorded(call: Denoise) -> Denoised:
        step = step_of[call.levels[0]]
        rows = [0, *(1 + at for at, concept in enumerate(request.concepts) if is_active(concept, step))]
        maps = torch.cat([torch.zeros_like(golden["attn_map"][step, :1, 0]), golden["attn_map"][step, :, 0]])
        predictions = prediction_of("epsilon", golden["eps_edit"][step, rows, 0], call.latents, call.levels)
        return Denoised(predictions, maps[rows] if call.watch is not None else None)

    edited = answer(observed(editor.edit(inverted, request)), recorded)
    masks, _ = unroll([edited], [inverted])
    yield Check("model-free masks, share of different pixels", float((masks != golden["mask"]).double().mean()), 0.0)
    yield Check("model-free final", relative(edited.latents[None], golden["final"]), 1e-5)


def answer(method: Any, denoise: Callable[[Denoise], Denoised]) -> Any:
    """Drive a generator without an engine or a model."""
    reply, known = None, {}  # the same prompt is the same object
    try:
        while True:
            call = method.send(reply)
            if isinstance(call, EncodeText):
                reply = [
                    known.setdefault(prompt, Conditioning(prompt, {"embedding": torch.zeros(77, 1)}))
                    for prompt in call.prompts
                ]
            else:
                reply = denoise(call)
    except StopIteration as stop:
        return stop.value


KINDS: dict[str, Callable[..., Iterator[Check]]] = {
    "consistory": replay_consistory,
    "ddim": replay_ddim,
    "ddpm_inversion": replay_ddpm_inversion,
    "diffedit": replay_diffedit,
    "direct_edit": replay_direct_edit,
    "direct_inversion": replay_direct_inversion,
    "dna_edit": replay_dna_edit,
    "flow_align": replay_flow_align,
    "flow_edit": replay_flow_edit,
    "flux_kontext": replay_kontext,
    "flux_sample": replay_flow_sample,
    "h_edit": replay_h_edit,
    "joint_attention": replay_joint_attention,
    "ledits_pp": replay_ledits_pp,
    "masactrl": replay_masactrl,
    "negative_prompt_inversion": replay_negative_prompt,
    "null_text_inversion": replay_null_text,
    "prompt_to_prompt": replay_prompt_to_prompt,
    "proxedit": replay_proxedit,
    "rf_solvers": replay_rf_solvers,
    "riemannian": replay_riemannian,
    "sae_concepts": replay_sae_concepts,
    "sd3_sample": replay_flow_sample,
    "sdxl_ledits_pp": partial(replay_ledits_pp, xl=True),
    "sdxl_sample": replay_sdxl_sample,
    "uniedit_flow": replay_uniedit_flow,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, help="another folder of the checkpoint that the golden was made with")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options = parser.parse_args()
    failed = 0
    for path in options.files:
        print(path)
        for check in replay(path.resolve(), options.model, getattr(torch, options.dtype)):
            failed += not check.holds
            verdict = "ok  " if check.holds else "FAIL"
            print(f"  {verdict} {check.name:45} {check.deviation:.1e}  (at most {check.tolerance:.0e})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
