"""Latent bases of many images in one engine, against one image at a time: images per second, and their ratio.

The demo's model on drawn faces, two vectors each; products of many images share network calls, those of one image alone
mostly fill none. Both sides make the same products; each takes its turn in every round, in one process.

    python -m benchmarks.basis --clock processor    on a machine where others compute: seconds of this process alone
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from demo_world.scoring import fresh_scenes
from pipeline.editing.riemannian import Riemannian
from pipeline.engine.calls import EncodeImage, Steps
from pipeline.engine.engine import Engine
from pipeline.engine.pullback import LocalBasis
from pipeline.inversion.base import draw_from
from pipeline.inversion.ddim import DDIMInversion
from pipeline.models.demo.networks import IMAGE_SIZE
from pipeline.models.demo.world import draw
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig
from pipeline.records import EditRequest, Source

IMAGES = 64
ROUNDS = 3
CALL_SIZE = 16
EDITOR = Riemannian(num_vectors=2, oversample=1, max_iterations=4, tolerance=1e-9, edit_time=0.9)
INVERSION = DDIMInversion(num_steps=4)


def basis_of(backbone: Any, pixels: Any, number: int) -> Steps[LocalBasis]:
    """One image's."""
    latents = yield EncodeImage(pixels)
    shape = tuple(latents.shape)
    source = Source(
        latents=latents,
        prompt="",
        schedule=backbone.schedule,
        draw_noise=draw_from(number, shape),
        editing_noise=lambda: draw_from(number, shape),
    )
    trajectory = yield from INVERSION.invert(source)
    (found,) = yield from EDITOR.bases(trajectory, [EditRequest()])
    if isinstance(found, Exception):
        raise found
    return found


def measure(
    images: int = IMAGES, rounds: int = ROUNDS, clock: Literal["wall", "processor"] = "wall"
) -> list[dict[str, Any]]:
    """One row; medians over the rounds."""
    now = time.perf_counter if clock == "wall" else time.process_time
    backbone = load_backbone(ModelConfig(name="demo"))
    pictures = [draw(scene, IMAGE_SIZE) for scene in fresh_scenes(images, 7)]

    def steps() -> Iterator[Steps[LocalBasis]]:
        return (basis_of(backbone, pixels, number) for number, pixels in enumerate(pictures))

    def together() -> None:
        for one in Engine(backbone, call_size=CALL_SIZE, images_in_flight=images, pad=False).run(steps()):
            if one.error is not None:
                raise one.error

    def alone() -> None:
        engine = Engine(backbone, call_size=CALL_SIZE, pad=False)
        for one in steps():
            engine.run_one(one)

    taken: dict[Callable[[], None], list[float]] = {together: [], alone: []}
    for _ in range(rounds):
        for side, seconds in taken.items():
            start = now()
            side()
            seconds.append(now() - start)
    job, single = (images / statistics.median(seconds) for seconds in taken.values())
    return [
        {
            "case": f"demo, {EDITOR.num_vectors} vectors",
            "images": images,
            "one_job_images_per_s": round(job, 2),
            "one_at_a_time_images_per_s": round(single, 2),
            "ratio": round(job / single, 2),
        }
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of either side")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="processor: see above")
    arguments = parser.parse_args()
    for line in measure(rounds=arguments.rounds, clock=arguments.clock):
        print(line)


if __name__ == "__main__":
    main()
