"""Replays of ProxEdit: see replay.py. Recorded at inverted latents: to their end in float64 only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.proxedit import ProxEdit
from pipeline.engine.engine import Engine
from pipeline.inversion.negative_prompt import NegativePromptInversion
from tests.golden.checks import Check, edit, equal, relative_l2, source_of
from tests.golden.two_branch import (
    compare_inversion,
    compare_walk,
    is_double,
    prompt_to_prompt,
    request_of,
    started_at,
    walked,
)


def proxedit(settings: dict[str, Any]) -> ProxEdit:
    """The editor of a recorded run."""
    base = prompt_to_prompt(settings["p2p"], settings["guidance_scale"]).model_dump(exclude={"method"})
    return ProxEdit(
        **base,
        prox=settings["prox"] or "none",
        quantile=settings["quantile"],
        use_inversion_guidance=settings["inversion_guidance"],
        use_reconstruction_guidance=settings["reconstruction_guidance"],
        recon_lr=settings["recon_lr"] or 0.1,  # recorded as 0 where nothing is pulled
        recon_t=settings["recon_t"],
        dilate_mask=settings["dilate_mask"],
    )


def replay_proxedit(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """Proximal guidance of a Prompt-to-Prompt edit after negative-prompt inversion."""
    prompt = settings["source_prompt"]
    inversion = NegativePromptInversion(num_steps=settings["num_steps"], npi_interp=settings.get("npi_interp", 0.0))
    trajectory = engine.run_one(inversion.invert(source_of(engine, golden["x0"][0], prompt)))
    yield equal("timesteps", trajectory.timesteps, torch.tensor(settings["timesteps"]))
    yield from compare_inversion(golden, trajectory, engine)
    editor, request = proxedit(settings), request_of(settings["p2p"], prompt, settings["target_prompt"])
    history = edit(engine, editor, started_at(trajectory, golden["x_T"][0]), request).history
    if not is_double(engine):
        for at, branch in enumerate(("source", "target")):
            yield Check(f"step 1, {branch}", relative_l2(walked(history)[0, at], golden["step1"][at]), 1e-3)
        if "thresholds" in golden:
            first = history[0].details["threshold"][None]
            yield Check("first threshold", relative_l2(first, golden["thresholds"][:1]), 1e-3)
        return
    yield from compare_walk(golden, history, 1e-4)
    if "thresholds" in golden:
        thresholds = torch.stack([record.details["threshold"] for record in history])
        yield Check("thresholds", relative_l2(thresholds, golden["thresholds"]), 1e-5)
    if "edit_mask_dilated" in golden:
        active = [record for record in history if editor.pulls(trajectory.timesteps[record.step])]
        ours = torch.stack([record.details["edit_mask"] for record in active])
        differing = float((ours != golden["edit_mask_dilated"]).double().mean())
        yield Check("edit masks, share of different pixels", differing, 0.0)
