"""Train the demo model from nothing: draw the world, fit the autoencoder, then the UNet and the text encoder together.

    python -m demo_world.train --preset cpu --out build/train_demo

Needs no data and no network. `OUT/weights` holds the model, exported every few minutes and at the end; everything else
in OUT is for `--resume`, which goes on after a kill where the last checkpoint stands. The time is planned, not the
number of steps: learning rates fall to their end with the minutes used, so a slow or shared machine gets a less trained
model, never a half-annealed one.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from demo_world.objectives import OBJECTIVES, objective_of, retell
from demo_world.scoring import load_recipes, measure, table
from demo_world.train_autoencoder import refine_decoder, train_vae
from demo_world.train_unet import draw_pool, train_unet
from demo_world.training import PRESETS
from pipeline.models.demo.networks import load_pipeline


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, and for the model in its subfolder weights.")],
    preset: Annotated[str, typer.Option(help=f"One of: {', '.join(PRESETS)}.")] = "cpu",
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Length. Default: the preset's.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoints in OUT.")] = False,
    start_from: Annotated[
        Path | None,
        typer.Option(help="A demo model: train its UNet and text encoder on. Default: all from nothing."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Peak, of the UNet and the text encoder. Default: the preset's.")
    ] = None,
    objective: Annotated[
        str, typer.Option(help=f"What the UNet learns to predict. One of: {', '.join(OBJECTIVES)}.")
    ] = "noise",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = os.cpu_count() or 1,
    scenes: Annotated[int, typer.Option(min=0, help="Scenes on which the model is scored at the end.")] = 64,
    recipes: Annotated[Path, typer.Option(help="Folder of the recipes that it is scored by.")] = Path(
        "configs/demo_edits"
    ),
    seed: int = 0,
) -> None:
    """Train the demo model from nothing."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is unknown. Choose one of: {', '.join(PRESETS)}", param_hint="--preset")
    if objective not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise typer.BadParameter(f"{objective!r} is unknown. Choose one of: {known}", param_hint="--objective")
    if not resume and any(out.glob("*.pt")):
        raise typer.BadParameter(f"{out} holds a training. Add --resume or choose another", param_hint="--out")
    plan = PRESETS[preset]
    if minutes is not None:
        plan = dataclasses.replace(plan, minutes=minutes)
    if learning_rate is not None:
        plan = dataclasses.replace(plan, learning_rate=learning_rate)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    start = None if start_from is None else load_pipeline(start_from)
    if start is None:
        vae = train_vae(plan, out / "vae.pt", device, seed)
        refine_decoder(plan, vae, out / "decoder.pt", device, seed)
    else:
        plan = dataclasses.replace(plan, vae_share=0.0, decoder_share=0.0)
        vae = start.vae.to(device).eval().requires_grad_(False)
        before, now = objective_of(start), OBJECTIVES[objective]()
        if type(before) is not type(now) and not resume:
            left = retell(start.unet, before, now)
            print(f"time embedding: {left:.1%} of its variance is left to learn", flush=True)
    pool = draw_pool(plan, vae, out / "pool.pt", device, seed)
    train_unet(plan, vae, pool, out, device, seed, start, OBJECTIVES[objective]())
    if scenes:
        scores = measure(out / "weights", load_recipes(recipes), scenes)
        with (out / "weights" / "README.md").open("a") as card:
            card.write(f"\nScores on {scenes} fresh scenes (`demo_world/scoring.py`):\n\n{table(scores)}")
    print(f"done: {out / 'weights'}", flush=True)


if __name__ == "__main__":
    typer.run(main)
