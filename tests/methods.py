"""What the tests of engine, inversions and editors share: backbones, images, and one whole edit as a generator."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.levels import Level
from pipeline.editing.base import EditingMethod
from pipeline.editing.ledits_pp import LEditsPP
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import NetworkAnswer, NetworkCall, Steps
from pipeline.engine.engine import Engine
from pipeline.inversion.base import Inversion, draw_from
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.models.analytic import AnalyticBackbone
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig
from pipeline.records import Concept, EditRequest, Source, Trajectory
from tests.golden.checks import observed
from tests.golden.replay import TINY_SD

SIDE = 12  # latents; the attention grid is 3 x 3


@cache
def tiny_sd(dtype: torch.dtype = torch.float32) -> Backbone:
    """A random UNet of Stable Diffusion's shape: knows nothing, but notices a wrong token, seed or row."""
    return load_backbone(ModelConfig(name=str(TINY_SD)), dtype=dtype, device="cpu")


@cache
def analytic(dtype: torch.dtype = torch.float32) -> Backbone:
    """The closed-form model."""
    return AnalyticBackbone(dtype=dtype)


BACKBONES = {"analytic": analytic, "tiny_sd": tiny_sd}


def levels(backbone: Any, timesteps: Iterable[int]) -> list[Level]:
    """The levels of some timesteps, for calls of a network."""
    return [backbone.schedule.level(timestep) for timestep in timesteps]


def brought(trajectory: Trajectory) -> Tensor:
    """The unconditional embeddings (N, L, D) that an inversion brought."""
    assert trajectory.uncond is not None
    return torch.stack([one.embedding for one in trajectory.uncond])


def network_calls(engine: Engine) -> list[NetworkCall]:
    """The network calls that an engine makes from now on; the list grows as it makes them."""
    made: list[NetworkCall] = []
    model = engine.backbone

    def denoise(call: NetworkCall) -> NetworkAnswer:
        made.append(call)
        return model.denoise(call)

    engine.backbone = copy.copy(model)  # other tests use the same model
    engine.backbone.denoise = denoise  # type: ignore[method-assign]
    return made


def image_latents(backbone: Backbone, number: int, side: int = SIDE) -> Tensor:
    """Latents of a smooth random image, (C, side, side)."""
    generator = torch.Generator().manual_seed(1000 + number)
    coarse = torch.randn((1, backbone.latent_channels, 3, 3), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")[0]
    return smooth.to(getattr(torch, backbone.record.dtype))


def source(backbone: Backbone, number: int, prompt: str = "", side: int = SIDE) -> Source:
    """One image as an inversion is given it."""
    latents = image_latents(backbone, number, side)
    draw = draw_from(number, tuple(latents.shape), latents.dtype)
    return Source(
        latents=latents,
        prompt=prompt,
        schedule=backbone.schedule,
        draw_noise=draw,
        editing_noise=lambda: draw_from(10**6 + number, tuple(latents.shape), latents.dtype),
        draws=lambda purpose: draw_from(zlib.crc32(purpose.encode()) + number, tuple(latents.shape), latents.dtype),
    )


def invert_and_edit(
    given: Source,
    request: EditRequest,
    inversion: Inversion | None = None,
    editor: EditingMethod | None = None,
    *,
    observe: bool = False,
    **options: Any,
) -> Steps[tuple[Trajectory, Any]]:  # EditedLatents; ObservedLatents where its steps are looked on at
    """One image through one inversion and one editor."""
    trajectory = yield from (inversion or DDPMInversion(num_steps=6)).invert(given)
    editing = (editor or LEditsPP()).edit(trajectory, request, **options)
    return trajectory, (yield from observed(editing) if observe else editing)


def rows_of_edit(inversion: Inversion, editor: EditingMethod, request: EditRequest, prompt: str, **options: Any) -> int:
    """Network rows that the edit of one image takes, without those of its inversion."""
    engine = Engine(analytic(), call_size=8)
    trajectory = engine.run_one(inversion.invert(source(analytic(), 1, prompt)))
    before = engine.stats.network_rows
    engine.run_one(editor.edit(trajectory, request, **options))
    return engine.stats.network_rows - before


def sunglasses_and_hat(**changes: Any) -> EditRequest:
    """Two concepts with windows, thresholds and signs of their own."""
    return EditRequest(
        concepts=(
            Concept(prompt="sunglasses", guidance_scale=2.0, threshold=0.7, **changes),
            Concept(prompt="red hat", guidance_scale=1.5, threshold=0.81, direction="remove", **changes),
        )
    )
