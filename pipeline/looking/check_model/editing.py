"""One edit with its picture, and how long a million of them would take."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.fast_diffedit import FastDiffEdit
from pipeline.editing.ledits_pp import LEditsPP
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import NetworkCall
from pipeline.evaluation.verdict import judge
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.looking.check_model.records import Check, Picture
from pipeline.looking.check_model.subject import Subject
from pipeline.looking.report.thumbnails import mask_over
from pipeline.recipe import Method
from pipeline.running.worker import fit
from pipeline.writing.restoring import restored

MILLION = 1_000_000
ROUNDS = 3  # timed calls, after one that is not
LONG_ENOUGH = 20.0  # seconds after which no further call is timed


def method_for(subject: Subject) -> Method | None:
    """The first of these that the model can serve: LEDITS++, with its attention masks where there are any; else
    sampling under the prompt from the inverted or the noised picture; else inpainting. None: not one of them.
    """
    steps = subject.num_steps
    candidates = [
        Method(inversion=DDPMInversion(num_steps=steps), editing=LEditsPP()),
        Method(inversion=DDPMInversion(num_steps=steps), editing=LEditsPP(mask="noise")),
        Method(inversion=DDIMInversion(num_steps=steps), editing=ClassifierFreeGuidance()),
        Method(
            inversion=NoiseStart(num_steps=steps),
            editing=ClassifierFreeGuidance(guidance_scale=1.0, start_step=steps // 2),
        ),
        Method(inversion=NoiseStart(num_steps=steps), editing=FastDiffEdit(backend="inpaint")),
    ]
    for method in candidates:
        problems = [*method.model_problems(subject.backbone.offers)]
        if not problems and not [*method.editing.problems(subject.request, method.inversion)]:
            return method
    return None


def edit(subject: Subject) -> Check:
    """One edit of the picture."""
    method = method_for(subject)
    if method is None:
        return Check(
            name="edit",
            status="failed",
            text="Neither LEDITS++ nor sampling nor inpainting can use this model. Use another checkpoint.",
        )
    start = time.perf_counter()
    made, rows = subject.edited({method.editing.method: method}, subject.request)
    seconds = time.perf_counter() - start
    result = restored(made[method.editing.method])
    happened = judge(result.figures).edit
    (concept,) = subject.request.concepts
    asked = f"{concept.direction} {concept.prompt}"
    text = f"The edit changed the picture ({happened}): look whether it is the one that was asked for."
    if happened == "nothing changed":
        text = (
            f"Nothing changed that could be told from the inversion's own error. Ask for what the picture can have "
            f"(--prompt), with more --steps than {subject.num_steps}."
        )
    pictures = [Picture("input", Image.fromarray(result.original))]
    if result.mask is not None:
        pictures.append(Picture("mask", mask_over(pictures[0].image, result.mask)))
    pictures.append(Picture(asked, Image.fromarray(result.image)))
    values: dict[str, Any] = {
        "asked": asked,
        "inversion": method.inversion.method,
        "editor": method.editing.method,
        "num_steps": subject.num_steps,
        "network_rows": rows,
        "seconds": round(seconds, 3),
        "happened": happened,
        **{name: None if value is None else round(value, 4) for name, value in result.figures.items()},
    }
    share = result.figures["mask_share"]
    return Check(
        name="edit",
        status="warning" if happened == "nothing changed" else "ok",
        text=text,
        values=values,
        facts=(
            ("asked", asked),
            ("method", f"{method.inversion.method} and {method.editing.method}, {subject.num_steps} steps"),
            ("mask", "none" if share is None else f"{100 * share:.1f} % of the picture"),
            ("took", f"{seconds:.1f} s for {rows} network rows"),
        ),
        pictures=tuple(pictures),
    )


def speed(subject: Subject, edit_rows: int | None, autoencoder_seconds: float | None) -> Check:
    """Network rows per second in calls of a job's size, and hours for a million of the edit above.

    Args:
        subject: the model.
        edit_rows: network rows of that edit; None: there is none.
        autoencoder_seconds: of an image on its way: encoded once, decoded twice.
    """
    backbone = subject.backbone
    size = fit(subject.recipe, backbone).call_size
    rate = _rows_per_second(backbone, size, subject.latent_size, subject.request.target_prompt)
    values: dict[str, Any] = {"call_size_rows": size, "rows_per_second": round(rate, 3), "hours_per_million": None}
    facts = [("network", f"{rate:.3g} rows/s in calls of {size} rows, on {backbone.record.device}")]
    text = "No edit was made, so that a million of them cannot be told."
    if edit_rows is not None:
        hours = MILLION * (edit_rows / rate + (autoencoder_seconds or 0.0)) / 3600
        values["hours_per_million"] = round(hours, 2)
        facts.append(("a million of this edit", f"{hours:,.{0 if hours >= 10 else 1}f} hours on one such device"))
        text = (
            "Network and autoencoder alone, on this machine as it is now; several workers divide it. `shardedit plan` "
            "times a recipe."
        )
    if backbone.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(backbone.device) / 2**30
        values["peak_memory_gib"] = round(peak, 2)
        facts.append(("GPU memory", f"{peak:.1f} GiB at most so far"))
    return Check(name="speed", status="ok", text=text, values=values, facts=tuple(facts))


def _rows_per_second(backbone: Backbone, size: int, latent_size: tuple[int, int], text: str) -> float:
    prompt = backbone.encode_text(text)
    level = backbone.schedule.steps(2, latent_size)[-1].start
    latents = torch.zeros((size, backbone.latent_channels, *latent_size))
    beside = {name: torch.zeros((size, 1 + backbone.latent_channels, *latent_size)) for name in backbone.offers.inputs}
    call = NetworkCall(latents, [level] * size, [prompt] * size, beside=beside)
    seconds: list[float] = []
    while len(seconds) <= ROUNDS and sum(seconds) < LONG_ENOUGH:
        start = time.perf_counter()
        # The answer is brought to the CPU, as the engine does: that waits for the device.
        backbone.denoise(call).predictions.both(torch.Tensor.cpu)
        seconds.append(time.perf_counter() - start)
    timed = seconds[1:] or seconds  # the first pays for kernels and caches
    return size / float(np.mean(timed))
