"""What Ray Data costs: the same run as a job on Ray and as a plain loop, with a model that takes a second an image.

    python benchmarks/ray_overhead.py

The model waits instead of computing, as a CPU waits for a GPU; so both runs take the same time where the data plane is
never in the way. Compared is the pace between the first commit and the last, since starting Ray (tens of seconds,
printed too) is paid once a run. The two units that Ray keeps in flight share network calls, which the loop's one
cannot: a ratio below 1 is possible.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from PIL import Image

from pipeline.models.analytic import AnalyticBackbone
from pipeline.recipe import Recipe, recipe_from
from pipeline.running import driver

IMAGES = 32
UNIT_SIZE = 4
STEPS = 10
SECONDS_PER_IMAGE = 1.0
CALL_SIZE = 8


def slowed(seconds_per_call: float) -> Callable[[], None]:
    """Makes the closed-form model wait in every call; runs in each process of the cluster."""

    def install() -> None:  # nested, so that it travels by value
        from pipeline.models.analytic import AnalyticBackbone

        denoise = AnalyticBackbone.denoise

        def slow(self: Any, *args: Any) -> Any:
            time.sleep(seconds_per_call)
            return denoise(self, *args)

        AnalyticBackbone.denoise = slow  # type: ignore[method-assign]

    return install


def write_images(folder: Path, count: int) -> None:
    """One tar of noise, 512 x 512 JPEG."""
    folder.mkdir()
    with tarfile.open(folder / "images.tar", "w") as tar:
        for index in range(count):
            buffer = io.BytesIO()
            noise = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((512, 512)).save(buffer, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{index:04d}.jpg")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))


def recipe_for(source: Path, out: Path, engine: str) -> Recipe:
    """One concept, few steps, units of four seconds."""
    return recipe_from(
        {
            "source": {"shards": str(source)},
            "edits": {"concepts": [{"prompt": "sunglasses"}]},
            "model": {"name": "analytic", "size": 64},
            "inversion": {"method": "ddpm", "num_steps": STEPS},
            "sink": {"folder": str(out)},
            "run": {"engine": engine, "unit_size": UNIT_SIZE, "call_size": CALL_SIZE, "workers": 1},
        }
    )


def pace(out: Path, images: int) -> float:
    """Seconds per image between the first commit and the last."""
    commits = sorted(path.stat().st_mtime for path in (out / "_units").glob("*/*.json"))
    return (commits[-1] - commits[0]) / (images - UNIT_SIZE)


def measure(images: int = IMAGES) -> dict[str, float]:
    """Run both and compare."""
    rows_per_image = 3 * STEPS  # the inversion's, and two per step of the edit
    install = slowed(SECONDS_PER_IMAGE * CALL_SIZE / rows_per_image)
    denoise = AnalyticBackbone.denoise
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in"
        write_images(source, images)
        try:
            install()
            loop = Path(folder) / "loop"
            driver.run(recipe_for(source, loop, "local"), progress="off")
            started = time.perf_counter()
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                runtime_env={"worker_process_setup_hook": install},
            )
            on_ray = Path(folder) / "ray"
            driver.run(recipe_for(source, on_ray, "ray"), progress="off")
            whole = time.perf_counter() - started
        finally:
            AnalyticBackbone.denoise = denoise  # type: ignore[method-assign]
            ray.shutdown()
        loop_pace, ray_pace = pace(loop, images), pace(on_ray, images)
        return {
            "loop_seconds_per_image": round(loop_pace, 3),
            "ray_seconds_per_image": round(ray_pace, 3),
            "ratio": round(ray_pace / loop_pace, 3),
            # Against calls that are all full and a data plane that costs nothing: what is lost in all.
            "ratio_to_model_alone": round(ray_pace / SECONDS_PER_IMAGE, 3),
            "ray_start_seconds": round(whole - images * ray_pace, 1),
        }


if __name__ == "__main__":
    print(measure())
