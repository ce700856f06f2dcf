"""Whether this package samples what diffusers' own pipeline samples: the same networks, noise, prompt and steps."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.engine.calls import Steps
from pipeline.engine.pictures import decode_picture
from pipeline.inversion.base import draw_from
from pipeline.inversion.noise import NoiseStart
from pipeline.looking.check_model.records import Check, Picture
from pipeline.looking.check_model.subject import Subject
from pipeline.models.parity import Sampling, sampled_by_diffusers
from pipeline.records import EditedLatents, EditRequest, Source

NUM_STEPS = 4  # few: rounding grows with every step, a mistake shows in the first
GUIDANCE = 7.5
# Largest difference of the final latents over their largest value. Measured on the bundled model and tiny random ones
# of Stable Diffusion 1.x and XL: agreement reaches 1e-5, 0.017 and 0.076; another last level, the smallest mistake that
# was tried, gives 0.003 to 0.016. In float32 the limit lies between, in half precision it hides small mistakes:
# diffusers rounds its latents after every step, and this package keeps them in float32.
TOLERANCE = {"float64": 1e-4, "float32": 1e-3, "float16": 0.05, "bfloat16": 0.2}
LEVELS = 1  # of 255: two roundings of one picture


def agreement(subject: Subject) -> Check:
    """Text to image in few steps by both, and one picture of the same latents by both."""
    backbone = subject.backbone
    shape = (backbone.latent_channels, *subject.latent_size)
    sampling = Sampling(
        prompt=subject.request.target_prompt,
        noise=draw_from(subject.recipe.run.seed, shape)(),
        num_steps=NUM_STEPS,
        guidance_scale=GUIDANCE,
    )
    theirs = None if subject.checkpoint is None else sampled_by_diffusers(*subject.checkpoint, backbone, sampling)
    if theirs is None:
        return Check(
            name="agreement",
            status="not applicable",
            text="There is no pipeline of diffusers to compare this kind of checkpoint with.",
        )
    ours = subject.engine.run_one(_sampled(subject, sampling)).latents.float()
    differs = float((ours - theirs.latents).abs().max() / theirs.latents.abs().max().clamp_min(1e-12))
    pixels = decode_picture(backbone, theirs.latents)
    levels = int(np.abs(pixels.astype(np.int16) - theirs.pixels).max())
    tolerance = TOLERANCE[backbone.record.dtype]
    wrong = []
    if not differs <= tolerance:  # NaN is not
        wrong.append(
            f"From the same noise another picture is sampled than by {theirs.pipeline}: steps, text or attention "
            "differ. Do not use this checkpoint, and report it with this page."
        )
    if levels > LEVELS:
        wrong.append(
            f"The same latents give another picture than by {theirs.pipeline}: the scale of the latents differs. Do "
            "not use this checkpoint, and report it with this page."
        )
    text = f"{theirs.pipeline} samples the same from the same noise, up to rounding."
    if tolerance > TOLERANCE["float32"]:
        text += f" In {backbone.record.dtype} small mistakes hide in the rounding: model.dtype=float32 looks closer."
    return Check(
        name="agreement",
        status="failed" if wrong else "ok",
        text=" ".join(wrong) or text,
        values={
            "pipeline": theirs.pipeline,
            "num_steps": NUM_STEPS,
            "guidance_scale": GUIDANCE,
            "relative_difference": differs if math.isfinite(differs) else None,  # JSON knows no NaN
            "tolerance": tolerance,
            "decoded_difference_levels": levels,
        },
        facts=(
            ("final latents", f"differ by {differs:.1e} of their largest value (allowed: {tolerance:g})"),
            ("the same latents decoded", f"differ by {levels} of 255 levels (allowed: {LEVELS})"),
            ("sampled", f"{NUM_STEPS} steps of DDIM, guidance {GUIDANCE:g}"),
        ),
        pictures=(
            Picture("shardedit", Image.fromarray(decode_picture(backbone, ours))),
            Picture("diffusers", Image.fromarray(theirs.pixels)),
        ),
    )


def _sampled(subject: Subject, sampling: Sampling) -> Steps[EditedLatents]:
    def noise() -> Tensor:
        return sampling.noise

    source = Source(
        latents=torch.zeros_like(sampling.noise),
        prompt="",
        schedule=subject.backbone.schedule,
        draw_noise=noise,
        editing_noise=lambda: noise,
    )
    trajectory = yield from NoiseStart(num_steps=sampling.num_steps).invert(source)
    editor = ClassifierFreeGuidance(guidance_scale=sampling.guidance_scale)
    return (yield from editor.edit(trajectory, EditRequest(target_prompt=sampling.prompt)))
