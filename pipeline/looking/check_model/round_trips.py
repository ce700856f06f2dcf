"""What is lost on the way there and back: in the autoencoder, and in inversions whose trajectory is replayed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.pictures import decode_picture, encode_picture
from pipeline.evaluation.metrics import psnr
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.looking.check_model.records import Check, Picture, Status
from pipeline.looking.check_model.subject import Subject, waited_for
from pipeline.recipe import Method
from pipeline.records import EditRequest

BLURRED, BROKEN = 25.0, 15.0  # dB of the autoencoder alone; those of Stable Diffusion reach 25 to 35 on photographs
EXACT = 40.0  # dB between the autoencoder's round trip and one with an exact inversion in it: rounding alone
DRIFTS = 20.0  # dB of the same with an approximate inversion: below, another picture comes back


def autoencoder(subject: Subject) -> Check:
    """The picture through the autoencoder and back, at model size."""
    backbone, pixels = subject.backbone, subject.prepared.pixels
    start = time.perf_counter()
    latents = encode_picture(backbone, pixels)
    waited_for(backbone)
    between = time.perf_counter()
    back = decode_picture(backbone, latents)
    waited_for(backbone)
    end = time.perf_counter()
    height, width = subject.prepared.original.shape[:2]
    finite = bool(torch.isfinite(latents).all())
    loss = _decibels(subject, pixels, back)
    values: dict[str, Any] = {
        "psnr_db": loss,
        "finite": finite,
        "picture_px": [height, width],
        "model_px": list(pixels.shape[:2]),
        "latents": list(latents.shape),
        "latents_std": round(float(latents.std()), 4) if finite else None,
        "encode_seconds": round(between - start, 4),
        "decode_seconds": round(end - between, 4),
    }
    status, text = _autoencoder_verdict(finite, bool(back.any()) or not pixels.any(), loss)
    return Check(
        name="autoencoder",
        status=status,
        text=text,
        values=values,
        facts=(
            ("lost", f"{loss:.1f} dB PSNR"),
            ("picture", f"{width} x {height} px, edited at {pixels.shape[1]} x {pixels.shape[0]} px"),
            ("latents", f"{' x '.join(map(str, latents.shape))}, standard deviation {values['latents_std']} (about 1)"),
            ("encode, decode", f"{between - start:.2f} s, {end - between:.2f} s"),
        ),
        pictures=(Picture("picture", _image(subject, pixels)), Picture("there and back", _image(subject, back))),
    )


def _autoencoder_verdict(finite: bool, shows: bool, loss: float) -> tuple[Status, str]:
    if not finite or not shows:
        return "failed", (
            f"The {'picture comes back black' if finite else 'latents are not finite'}: the autoencoder overflows or "
            "is damaged. Set model.dtype: float32, or fetch the checkpoint again."
        )
    if loss < BROKEN:
        return "failed", (
            f"Below {BROKEN:g} dB another picture comes back: the autoencoder or its scaling_factor is not that of "
            "this model. Use the one that it was trained with."
        )
    if loss < BLURRED:
        return "warning", (
            f"Below {BLURRED:g} dB edits lose detail everywhere. Check with a photograph of your own (--image), and at "
            "a larger model.size."
        )
    return "ok", "No edit can be nearer to its picture than this."


def inversions(subject: Subject) -> Check:
    """The picture inverted and replayed without an edit, after `ddpm` and after `ddim`."""
    steps, offers = subject.num_steps, subject.backbone.offers
    methods = {
        "ddpm": Method(inversion=DDPMInversion(num_steps=steps), editing=Reconstruct()),
        "ddim": Method(inversion=DDIMInversion(num_steps=steps), editing=Reconstruct()),
    }
    problems = [problem for method in methods.values() for problem in method.model_problems(offers)]
    if problems:
        return Check(name="inversions", status="not applicable", text=f"{problems[0][:1].upper()}{problems[0][1:]}.")
    start = time.perf_counter()
    made, rows = subject.edited(methods, EditRequest())
    seconds = time.perf_counter() - start
    loss = {
        name: _decibels(subject, one.round_trip, one.pixels)
        for name, one in made.items()
        if one.round_trip is not None  # which is made wherever nobody waives it
    }
    wrong: list[str] = []
    status: Status = "ok"
    if loss["ddpm"] < EXACT:
        status = "failed"
        wrong.append(
            f"Replaying ddpm must return the autoencoder's own round trip (above {EXACT:g} dB), and does not: the "
            "network answers one and the same input differently. Set model.dtype: float32."
        )
    if loss["ddim"] < DRIFTS:
        status = "failed" if wrong else "warning"
        wrong.append(
            f"Below {DRIFTS:g} dB methods on ddim edit another picture. Use ddpm, direct or more steps, and a "
            "source prompt."
        )
    return Check(
        name="inversions",
        status=status,
        text=" ".join(wrong) or "Replayed without an edit the picture comes back: exactly by ddpm, about by ddim.",
        values={
            "num_steps": steps,
            "ddpm_psnr_db": loss["ddpm"],
            "ddim_psnr_db": loss["ddim"],
            "network_rows": rows,
            "seconds": round(seconds, 3),
        },
        facts=(
            ("ddpm", f"{loss['ddpm']:.1f} dB against the autoencoder alone"),
            ("ddim", f"{loss['ddim']:.1f} dB against the autoencoder alone"),
            ("took", f"{seconds:.1f} s for {rows} network rows of {steps} steps"),
        ),
        pictures=tuple(Picture(f"after {name}", _image(subject, one.pixels)) for name, one in made.items()),
    )


def _decibels(subject: Subject, one: np.ndarray, other: np.ndarray) -> float:
    found = psnr(subject.shown(one), subject.shown(other))
    assert found is not None, "a picture has pixels"
    return round(found, 2)


def _image(subject: Subject, pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(subject.shown(pixels))
