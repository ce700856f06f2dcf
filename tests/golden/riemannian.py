"""Replays of the latent basis by the pullback metric: see replay.py. Directions are compared up to their sign."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.levels import Level, Step
from pipeline.diffusion.steps import DDIM, ddim_move
from pipeline.diffusion.subspaces import Leading, geodesic_distance, largest_sine, transported
from pipeline.editing.riemannian import Riemannian, Sampling, guidance
from pipeline.editing.walk import guided
from pipeline.engine.calls import Conditioning, Denoise, Steps
from pipeline.engine.engine import Engine
from pipeline.engine.prompts import GuidedPrompt
from pipeline.engine.pullback import Iterated, Place, iterated, local_basis
from pipeline.records import Trajectory
from tests.golden.checks import Check, relative, source_of

SETTLED = 1e-5  # of S once the iteration has settled, in either precision
SPAN = 1e-3  # sine of the largest angle to the exact singular vectors, in either precision
# What the network was asked in float32, by us or by the reference. Parts of a walk start from what was recorded, as far
# as it was.
FLOAT32 = 1e-3
ROUNDING32 = 1e-5  # of what is computed in float32 without the network


def replay_riemannian(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """A file holds a basis, the geometry of several, or an edit."""
    engine = Engine(engine.backbone, call_size=64, pad=False)  # all vectors of a basis in one call
    if "G" in golden:
        yield from replay_geometry(golden, settings)
    elif "guided" in golden:
        yield from replay_edit(golden, settings, engine)
    else:
        yield from replay_basis(golden, settings, engine)


def replay_basis(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """The reference's iterations, of a fixed number; and ours to their end, against the singular vectors."""
    level = engine.backbone.schedule.level(int(golden.get("t", settings.get("t"))))
    place = Place(latents=golden["x"][0], level=level, conditioning=recorded_prompt(golden, settings, engine))
    start, exact = recorded_start(golden), golden["x"].dtype == torch.float64
    counts = settings["iterations"] if isinstance(settings["iterations"], list) else [settings["iterations"]]
    for count in counts:
        prefix = f"it{count}_" if f"it{count}_s" in golden else ""
        found = after(engine, place, start, count)
        in_float32 = settings.get(f"it{count}_precision", settings.get("other_precision", "float32")) == "float32"
        limit = FLOAT32 if in_float32 or not exact else 1e-6
        yield Check(f"S after {count}", relative(found.stretches, golden[f"{prefix}s"]), limit)
        if count < 20:  # later ones are the reference's own rounding
            tangents = golden[f"{prefix}vT"]
            yield Check(f"V after {count}", relative(found.rows.abs(), tangents.abs()), limit)
            yield Check(f"span after {count}", largest_sine(found.rows, tangents), limit)
    if "J" in golden:  # stored in float32
        limit = 1e-6 if exact else FLOAT32
        pushed = engine.run_one(place.push(start))
        yield Check("products with J", relative(pushed.flatten(1), start @ golden["J"].mT), limit)
        pulled = engine.run_one(place.pull(pushed))
        yield Check("products with its transpose", relative(pulled, pushed.flatten(1) @ golden["J"]), limit)
    if "svd_s" in golden:
        yield from replay_settled(golden, engine, place, start)


def replay_settled(golden: dict[str, Tensor], engine: Engine, place: Place, start: Tensor) -> Iterator[Check]:
    """Our own end of the iteration, against the decomposition of the whole Jacobian."""
    keep, exact = len(start), golden["x"].dtype == torch.float64
    basis = engine.run_one(local_basis(place, start, keep=keep, max_iterations=100, tolerance=1e-4)).leading
    pushed = engine.run_one(place.push(basis.tangents)).flatten(1)
    rounding = 1e-10 if exact else ROUNDING32
    yield Check("settled S", relative(basis.stretches, golden["svd_s"][:keep]), SETTLED)
    (vectors,) = (golden[name] for name in golden if re.fullmatch(r"svd_v\d+", name))
    yield Check("settled span", largest_sine(basis.tangents, vectors[:keep]), SPAN)
    yield Check("U is orthonormal", difference(basis.features @ basis.features.mT, torch.eye(keep)), rounding)
    yield Check("J v = s u", relative(pushed, basis.stretches[:, None] * basis.features), rounding)


def replay_geometry(golden: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[Check]:
    """Distances between recorded bases, and directions carried from the first to the second."""
    names = settings.get("names") or [name.removesuffix("_u") for name in golden if name.endswith("_u")]
    bases = {
        name: Leading(golden[f"{name}_vT"], golden[f"{name}_s"], golden[f"{name}_u"].mT.contiguous()) for name in names
    }
    distances = torch.tensor(
        [[geodesic_distance(bases[one].features, bases[other].features) for other in names] for one in names],
        dtype=torch.float64,
    )
    apart = ~torch.eye(len(names), dtype=torch.bool)
    yield Check("distances", relative(distances[apart], golden["G"][apart]), 1e-6)
    yield Check("distances to oneself", float(distances.diagonal().max()), 1e-6)
    carried = [transported(bases[names[0]].features[at], bases[names[1]]) for at in range(len(golden["transport"]))]
    limit = 1e-9 if golden["G"].dtype == torch.float64 else ROUNDING32
    yield Check("transport", relative(torch.stack([one.direction for one in carried]), golden["transport"]), limit)
    kept = torch.tensor([one.kept for one in carried], dtype=torch.float64)
    yield Check("share kept", relative(kept, golden["transport_norm"]), limit)


def replay_edit(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """Inversion, basis, guidance and sampling on the reference's grid.

    In float32 each part starts from what was recorded: the random network amplifies rounding.
    """
    exact = golden["z0"].dtype == torch.float64
    editor = Riemannian(
        edit_time=settings["edit_t"],
        num_vectors=settings["n"],
        step_size=settings["delta"],
        move_scale=settings["gamma"],
    )
    prompts = {
        name: engine.backbone.encode_text(settings[f"{told}_prompt"]).replacing(embedding=golden[f"emb_{name}"][0])
        for name, told in (("edit", "edit"), ("for", "sampling"))
    }
    inversion, sampling = hops(golden, "inv"), hops(golden, "for")
    step = editor.step_among([one.start for one in sampling])
    yield Check("step of the edit", abs(step - int(golden["t_idx"])), 0.0)
    walked = [golden["z0"][0]]
    for one in inversion[:-1]:  # the reference leaves out the last one
        walked.append(engine.run_one(moved(walked[-1], one, prompts["for"])))
    yield Check("zT", relative(walked[-1][None], golden["zT"]), 1e-9 if exact else FLOAT32)
    latents = walked[-1] if exact else golden["zT"][0]
    for one in sampling[:step]:
        latents = engine.run_one(moved(latents, one, prompts["for"]))
    yield Check("zt", relative(latents[None], golden["zt"]), 1e-9 if exact else FLOAT32)

    level = sampling[step].start._replace(timestep=float(golden["t"]))
    place = Place(latents=golden["zt"][0], level=level, conditioning=prompts["edit"])
    found = after(engine, place, recorded_start(golden), settings["iterations"])
    limit = 1e-7 if exact else FLOAT32
    yield Check("S", relative(found.stretches, golden["s"]), limit)
    yield Check("V", relative(found.rows.abs(), golden["vT"].abs()), limit)
    direction = golden["vk"][0]
    first = found.rows[0].view_as(direction)
    yield Check("direction", relative(first * (first * direction).sum().sign(), direction), limit)

    ahead = editor.step_size * direction
    if exact:
        path = engine.run_one(guidance(place, ahead, editor.move_scale, settings["repeats"]))
    else:
        starts = [Place(latents=one, level=level, conditioning=prompts["edit"]) for one in golden["guided"][:-1]]
        path = [place.latents]
        path += [engine.run_one(guidance(one, ahead, editor.move_scale, 1))[1] for one in starts]
    yield Check("guided", relative(torch.stack(path), golden["guided"]), limit)
    whole = Trajectory(
        method="ddim",
        source=source_of(engine, golden["z0"][0], settings["sampling_prompt"]),
        solver=DDIM(steps=tuple(sampling)),
        latents=golden["zt"].expand(len(sampling) + 1, *golden["zt"].shape[1:]),
    )
    predict = guided(whole, GuidedPrompt(prompts["for"], prompts["for"], 1.0))
    down = Sampling(editor=editor, trajectory=whole, first_step=step, predict=predict, residuals=None)
    ends = torch.stack([engine.run_one(down.sample(one)) for one in golden["guided"]])
    yield Check("finals", relative(ends, golden["finals"]), limit)
    yield Check("unedited", relative(ends[:1], golden["rec"]), limit)


def after(engine: Engine, place: Place, start: Tensor, count: int) -> Iterated:
    """So many iterations, whatever they come to."""
    return engine.run_one(iterated(place, start, keep=len(start), max_iterations=count, tolerance=0.0))


def recorded_start(golden: dict[str, Tensor]) -> Tensor:
    """The first rows (n, D): orthonormalised in float32, as the reference does it."""
    return torch.linalg.qr(golden["start"].float()).Q.mT.to(golden["start"].dtype).contiguous()


def recorded_prompt(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Conditioning:
    """The settings' prompt with its recorded embedding: of those that there are the one that is it."""
    ours = engine.backbone.encode_text(settings["prompt"])
    recorded = [tensor[0] for name, tensor in golden.items() if name.startswith("emb")]
    return ours.replacing(embedding=min(recorded, key=lambda one: float((one - ours.embedding).norm())))


def hops(golden: dict[str, Tensor], name: str) -> Sequence[Step]:
    """The reference's grid. Its timesteps are no whole numbers; tables are read at what is left of them, rounded down.

    Its inversion predicts where a hop starts, its sampling too.
    """
    powers = golden["alphas_cumprod"]

    def level(timestep: Tensor) -> Level:
        power = float(powers[int(timestep)])
        return Level(power**0.5, (1.0 - power) ** 0.5, float(timestep))

    return [
        Step(level(start), level(end))
        for start, end in zip(golden[f"{name}_timesteps"], golden[f"{name}_next"], strict=True)
    ]


def moved(latents: Tensor, step: Step, prompt: Conditioning) -> Steps[Tensor]:
    """One hop up or down."""
    denoised = yield Denoise(latents[None], [step.start], [prompt])
    return ddim_move(denoised.predictions[0], step.end)


def difference(ours: Tensor, golden: Tensor) -> float:
    """The largest, absolutely."""
    return float((ours - golden.to(ours)).abs().max())
