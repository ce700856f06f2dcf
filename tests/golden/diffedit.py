"""Replays of DiffEdit and FastDiffEdit: see replay.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.masks import above_average, dilated
from pipeline.editing.diffedit import DiffEdit, compared_texts
from pipeline.editing.fast_diffedit import FastDiffEdit
from pipeline.engine.engine import Engine
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.records import EditRequest
from tests.golden.checks import Check, edit, relative, source_of


def replay_diffedit(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """Mask, inversion and edit; or the blog's mask alone."""
    if "repeats" in settings:
        yield from replay_fast_mask(golden, settings, engine)
        return
    total = settings["N"]
    kept = min(int(total * settings["inpaint_strength"]), total)
    inversion = DDIMInversion(
        num_steps=kept, skip_steps=total - kept, guidance_scale=settings.get("invert_guidance") or 1.0
    )
    editor = DiffEdit(
        guidance_scale=settings["guidance"],
        num_maps=settings["num_maps"],
        mask_encode_strength=settings["mask_encode_strength"],
        mask_thresholding_ratio=settings["mask_thresholding_ratio"],
        background="reference",
    )
    maps, masks, inverted, walked = [], [], [], []
    for at, (latents, noise) in enumerate(zip(golden["x0"], golden["mask_noise"], strict=True)):
        source_prompt, target_prompt = (
            settings[name] if isinstance(settings[name], str) else settings[name][at]
            for name in ("source_prompt", "target_prompt")
        )
        request = EditRequest(source_prompt=source_prompt, target_prompt=target_prompt)
        trajectory = engine.run_one(inversion.invert(source_of(engine, latents, source_prompt, noise)))
        result = edit(engine, editor, trajectory, request)
        again = dataclasses.replace(trajectory, source=source_of(engine, latents, source_prompt, noise))
        maps.append(engine.run_one(editor.difference_maps(again, compared_texts(request)))[0])
        masks.append(result.masks[0])
        inverted.append(trajectory.latents[:-1])
        walked.append(torch.stack([record.latents for record in result.history]))
    yield Check("map over its mean", relative(over_mean(torch.stack(maps)), over_mean(golden["guidance_map"])), 1e-4)
    yield Check("mask, share of different pixels", float((torch.stack(masks) != golden["mask"]).double().mean()), 0.0)
    yield Check("inverted", relative(torch.stack(inverted), golden["inverted"]), 3e-3)
    steps = golden["trajectory_steps"].tolist()
    latents = torch.stack(walked, dim=1)
    yield Check("trajectory", relative(latents[steps], golden["trajectory"]), 5e-3)
    yield Check("final", relative(latents[-1], golden["final"]), 5e-3)


def replay_fast_mask(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """The mask of one step, normalised by mean and deviation, and dilated."""
    editor = FastDiffEdit(
        num_maps=settings["repeats"], mask_encode_strength=settings["strength"], mask_thresholding_ratio=2.0
    )
    request = EditRequest(source_prompt=settings["source_prompt"], target_prompt=settings["target_prompt"])
    source = source_of(engine, golden["x0"][0], request.source_prompt, golden["noise"])
    schedule = dataclasses.replace(source.schedule, steps_offset=settings["steps_offset"])
    total = settings["num_inference_steps"]
    start = NoiseStart(num_steps=total)
    trajectory = engine.run_one(start.invert(dataclasses.replace(source, draw_noise=lambda: golden["noise"][0])))
    trajectory = dataclasses.replace(trajectory, source=dataclasses.replace(source, schedule=schedule))
    maps = engine.run_one(editor.difference_maps(trajectory, compared_texts(request)))
    recorded = golden["abs_diff_sum"].sum(dim=0)[None]
    yield Check("map over its mean", relative(over_mean(maps), over_mean(recorded)), 1e-4)
    normalised = (maps[0] - maps[0].mean()) / maps[0].std(correction=0)
    yield Check("normalised map", relative(normalised, golden["normalised"]), 1e-3)
    mask = above_average(maps, editor.mask_thresholding_ratio)[0]
    yield Check("mask, share of different pixels", float((mask != golden["mask"]).double().mean()), 0.0)
    grown = dilated(mask, editor.dilate)
    yield Check("dilated, share of different pixels", float((grown != golden["mask_blurred"]).double().mean()), 0.0)


def over_mean(maps: Tensor) -> Tensor:
    """Difference maps (B, h, w) on one scale: recorded ones hold a factor of the reference's guidance."""
    return maps / maps.mean(dim=(1, 2), keepdim=True)
