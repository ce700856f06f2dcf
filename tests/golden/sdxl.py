"""Replays of Stable Diffusion XL's goldens: text, one prediction, sampling, and the autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.engine.engine import Engine
from pipeline.engine.pictures import decode_picture, encode_picture
from pipeline.inversion.noise import NoiseStart
from pipeline.models.families.stable_diffusion_xl import SizeIds
from pipeline.records import EditRequest
from tests.golden.checks import Check, edit, equal, relative, source_of

EVERY = 7  # places of an embedding that a recording kept


def replay_sdxl_sample(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """Text to image under classifier-free guidance; or one image through the autoencoder and back."""
    if "pixels" in golden:
        yield from autoencoder_checks(golden, engine)
        return
    prompts = settings["prompts"]
    negatives = settings["negative_prompts"] or [""] * len(prompts)
    encode = engine.backbone.encode_text
    told, against = [encode(prompt) for prompt in prompts], [encode(prompt) for prompt in negatives]
    yield Check("embeddings", relative(_part(told, "embedding"), golden["prompt_embeds"]), 1e-4)
    yield Check("pooled", relative(_part(told, "pooled"), golden["pooled"]), 1e-4)
    scale, guided = settings["guidance_scale"], settings["guidance_scale"] > 1
    if guided:
        kept = _part(against, "embedding")[:, ::EVERY]
        yield Check("negative embeddings", _distance(kept, golden["negative_embeds_sub"]), 1e-4)
        yield Check("negative pooled", _distance(_part(against, "pooled"), golden["negative_pooled"]), 1e-4)
    edits = []
    for at, noise in enumerate(golden["x_T"]):
        start = NoiseStart(num_steps=settings["num_steps"])
        trajectory = engine.run_one(start.invert(source_of(engine, noise, "", noise[None])))
        request = EditRequest(target_prompt=prompts[at], negative_prompt=negatives[at])
        editor = ClassifierFreeGuidance(guidance_scale=scale if guided else 1.0)
        edits.append(edit(engine, editor, trajectory, request))
    yield equal("timesteps", [step.start.timestep for step in trajectory.solver.steps], golden["timesteps"])
    walked = torch.stack([torch.stack([record.latents for record in one.history]) for one in edits], dim=1)
    yield Check("trajectory", relative(walked, golden["trajectory"]), 1e-4)
    yield Check("final", relative(walked[-1], golden["final"]), 1e-4)
    if "decoded_sub" in golden:
        yield decoded_check("decoded", walked[-1], golden, engine)


def with_size_ids(backbone: Any, ids: dict[str, Any]) -> Any:
    """The model, telling its network a size other than the canvas: keys as diffusers' pipeline names them."""
    pairs = {name: (int(value[0]), int(value[1])) for name, value in ids.items()}
    other, other.text = copy(backbone), copy(backbone.text)
    other.text.size_ids = SizeIds(
        pairs.get("original_size"), pairs.get("crops_coords_top_left", (0, 0)), pairs.get("target_size")
    )
    return other


def autoencoder_checks(golden: dict[str, Tensor], engine: Engine) -> Iterator[Check]:
    """One image there and back."""
    latents = encode_picture(engine.backbone, golden["pixels"].numpy())[None]
    yield Check("latents", relative(latents, golden["latents"]), 1e-4)
    yield decoded_check("decoded", golden["latents"], golden, engine)
    yield decoded_check("there and back", latents, golden, engine)


def decoded_check(name: str, latents: Tensor, golden: dict[str, Tensor], engine: Engine) -> Check:
    """Pixels in [0, 1], every second row and column; ours are rounded to 8 bits."""
    pixels = np.stack([decode_picture(engine.backbone, one)[::2, ::2] for one in latents])
    return Check(name, float(np.abs(pixels / 255.0 - golden["decoded_sub"].numpy()).max()), 0.51 / 255 + 1e-4)


def _part(conditioning: list[Any], name: str) -> Tensor:
    return torch.stack([one.parts[name] for one in conditioning])


def _distance(ours: Tensor, golden: Tensor) -> float:
    """Of what may be zeros."""
    assert ours.shape == golden.shape
    return float((ours.double() - golden.double()).abs().max() / max(1.0, float(golden.abs().max())))
