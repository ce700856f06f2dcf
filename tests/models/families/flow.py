"""What the tests of flow-matching families share: which pairs they can run, and one image through each of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.flow_schedule import level_of
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.h_edit import HEdit
from pipeline.engine.backbone import Backbone, Offers
from pipeline.engine.calls import Denoise, Steps
from pipeline.engine.engine import Engine
from pipeline.inversion.noise import NoiseStart
from pipeline.models.parity import Sampling
from pipeline.recipe import Method
from pipeline.records import EditRequest, Source
from tests.methods import invert_and_edit, source
from tests.test_every_pair import PAIRS, REQUEST, method

Pair = tuple[str, str]
# What reads the layers of a UNet, or its text embedding's gradients.
OF_A_UNET = {
    "consistory",
    "prompt_to_prompt",
    "proxedit",
    "masactrl",
    "prox_masactrl",
    "plug_and_play",
    "riemannian",
    "null_text",
}


def able(pair: Pair, offers: Offers) -> Method | None:
    """The pair, without attention's control where it can do without; None: it needs what the model has not."""
    made = method(*pair)
    if isinstance(made.editing, HEdit):
        made = made.model_copy(update={"editing": HEdit(control="none")})
    return None if list(made.model_problems(offers)) else made


def able_pairs(offers: Offers) -> list[Pair]:
    return [pair for pair in PAIRS if able(pair, offers)]


def whole(backbone: Backbone, pair: Pair) -> Steps[Any]:
    """One image through a pair; always the same image."""
    made = able(pair, backbone.offers)
    assert made is not None
    given = dataclasses.replace(source(backbone, 1), **made.editing.inverts_under(REQUEST)._asdict())
    return invert_and_edit(given, REQUEST, made.inversion, made.editing)


def edited(backbone: Backbone, pairs: list[Pair]) -> dict[Pair, Tensor]:
    """The latents of every pair, side by side in one engine."""
    found = {}
    for finished in Engine(backbone, call_size=8, images_in_flight=16).run(whole(backbone, pair) for pair in pairs):
        if finished.error is not None:
            raise finished.error
        found[pairs[finished.index]] = finished.value[1].latents
    return found


def alone(backbone: Backbone, pair: Pair) -> Tensor:
    """The latents of one pair, in calls that nothing else is in."""
    latents: Tensor = Engine(backbone, call_size=8).run_one(whole(backbone, pair))[1].latents
    return latents


def predicted(
    backbone: Backbone, latents: Tensor, sigmas: list[float], conditioning: list[Any], call_size: int
) -> Tensor:
    """Velocities (R, C, h, w) of R rows, in network calls of one size."""

    def ask() -> Steps[Tensor]:
        denoised = yield Denoise(latents, [level_of(sigma) for sigma in sigmas], conditioning)
        return denoised.predictions.noise - denoised.predictions.data

    found: Tensor = Engine(backbone, call_size=call_size).run_one(ask())
    return found


def noise(backbone: Backbone, rows: int, height: int = 8, width: int = 12) -> Tensor:
    """Latents (rows, C, height, width) of nothing."""
    shape = (rows, backbone.latent_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(rows))


def sampled(backbone: Backbone, sampling: Sampling) -> Tensor:
    """Text to image by this package, (C, h, w)."""
    start = Source(
        latents=torch.zeros_like(sampling.noise),
        prompt="",
        schedule=backbone.schedule,
        draw_noise=lambda: sampling.noise,
        editing_noise=lambda: lambda: sampling.noise,
    )
    editor = ClassifierFreeGuidance(guidance_scale=sampling.guidance_scale)
    request = EditRequest(target_prompt=sampling.prompt)
    edit = invert_and_edit(start, request, NoiseStart(num_steps=sampling.num_steps), editor)
    latents: Tensor = Engine(backbone, call_size=2).run_one(edit)[1].latents
    return latents
