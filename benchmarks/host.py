"""Does the host keep a GPU busy? Measured without one, on a device that takes the time of a card.

    python -m benchmarks.host                      on two quiet cores; writes build/host.json row by row
    python -m benchmarks.host --clock processor    on a machine where others compute: see `ProcessorClock`
    python -m benchmarks.host --small              to see that it runs: its figures say nothing

Every kind of job goes through the engine as it is, from pixels to pixels, on a simulated device (`simulated.py`): a row
takes 0.8 TFLOP (Stable Diffusion 1.5 at 512 pixels) or 6.8 (XL at 1024), of which the device does 520 in a second. One
job is a whole run in this process, from a tar to committed units: what fills up calls at the ends of units shows there.

    busy_share                 of the time from the first call's begin to the last one's end, the device's own work
    blocking_copies_per_call   for which the host waits until the device gets there (`copies.py`)
    kernels_outside_per_call   that the device runs beside the network
    host_us_per_row            processor time of all threads of this process, over the rows that were asked for
    padded_share               of the rows computed, those that only filled up a call
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from PIL import Image
from rich.console import Console

from benchmarks.against_diffusers import edit_with_engine, photographs, prepared
from benchmarks.architectures import SD15, SDXL, TINY_SD, TINY_SDXL, Architecture
from benchmarks.copies import counts
from benchmarks.jobs import LEDITS, MAIN, MASACTRL_AUTO, MIXED, PROMPT_TO_PROMPT, Job, others
from benchmarks.machine import machine, show
from benchmarks.simulated import RATE, ProcessorClock, SimulatedGPU, Stream
from pipeline.engine.engine import Engine, EngineStats
from pipeline.records import Prepared
from pipeline.running import driver, worker

BUILD = Path("build")
CALL_SIZES = (16, 64)
SHAPES = ((64, 64), (48, 80), (80, 48))  # of the run's images, (height, width) in pixels: PNG of these costs nothing
PICTURES = 4  # that differ
NO_TIME = 1e9  # TFLOP/s


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much of everything, and by which clock."""

    size: int | None = None  # pixels; None: the model's own
    steps: int | None = None  # None: the job's own, and so of images
    images: int | None = None
    call_sizes: Sequence[int] = CALL_SIZES
    counted_steps: int = 5  # of the jobs whose copies are counted
    unit_size: int = 32
    clock: Literal["wall", "processor"] = "wall"

    def of(self, job: Job) -> Job:
        """A job on this scale."""
        return job if self.steps is None else job.smaller(steps=self.steps, images=self.images)

    def stream(self) -> Stream:
        """A new device."""
        if self.clock == "wall":
            return Stream()
        clock = ProcessorClock()
        return Stream(clock=clock.read, sleep=clock.sleep)

    def size_for(self, architecture: Architecture) -> int:
        """Side of the images, pixels."""
        return self.size or architecture.image_size


FULL = Scale()
SMALL = Scale(size=128, steps=2, images=3, call_sizes=(4,), counted_steps=2, unit_size=2, clock="processor")


@dataclass(frozen=True, slots=True)
class Measured:
    """One job on one model, at one call size."""

    stream: Stream
    stats: EngineStats
    cpu_seconds: float

    def figures(self) -> dict[str, float]:
        """As they are printed."""
        stats = self.stats
        computed = stats.network_rows - stats.shared_rows + stats.padded_rows
        return {
            "busy_share": round(self.stream.busy_share, 4),
            "host_us_per_row": round(1e6 * self.cpu_seconds / stats.network_rows, 1),
            "padded_share": round(stats.padded_rows / computed, 4),
            "seconds": round(self.stream.span, 1),
            "device_seconds": round(self.stream.busy, 1),
        }


def edit(job: Job, architecture: Architecture, call_size: int, scale: Scale) -> Measured:
    """All images of a job through one engine; one before, on a device that takes no time, for what is made once."""
    stream, size = scale.stream(), scale.size_for(architecture)
    engine = Engine(SimulatedGPU(architecture, stream), call_size=call_size)
    recipe = job.recipe(model={"size": size, "fit": "stretch"})
    inputs = numbered(prepared(photographs(min(job.images, PICTURES), size), recipe, size), job.images)
    stream.rate = NO_TIME
    edit_with_engine(engine, inputs[:1], recipe)
    stream.rate = RATE
    stream.forget()
    engine.stats = EngineStats()
    began = time.process_time()
    edit_with_engine(engine, inputs, recipe)
    return Measured(stream, engine.stats, time.process_time() - began)


def run(job: Job, architecture: Architecture, call_size: int, scale: Scale) -> Measured:
    """A whole run of a job in this process: read, edited, restored, encoded, committed."""
    stream, engines = scale.stream(), []

    def make_engine(*given: Any, **named: Any) -> Engine:
        engines.append(Engine(*given, **named))
        return engines[-1]

    with tempfile.TemporaryDirectory() as folder, threads_kept():
        write_shards(Path(folder) / "in", job.images)
        recipe = job.recipe(
            source={"shards": str(Path(folder) / "in")},
            model={"name": str(tiny(architecture).folder), "size": scale.size_for(architecture), "fit": "bucket"},
            sink={"folder": str(Path(folder) / "out")},
            run={"engine": "local", "call_size": call_size, "unit_size": scale.unit_size},
        )
        model = SimulatedGPU(architecture, stream)
        began = time.process_time()
        with (
            mock.patch("pipeline.models.loading.load_backbone", return_value=model),
            mock.patch.object(worker, "Engine", make_engine),
        ):
            summary = driver.run(recipe, progress="off")
    if summary.failed or len(engines) != 1:
        raise RuntimeError(f"{summary.failed} results failed, and {len(engines)} engines were made for one worker")
    return Measured(stream, engines[0].stats, time.process_time() - began)


def numbered(pictures: Sequence[Prepared], count: int) -> list[Prepared]:
    """So many images, each with an id, and so a seed, of its own."""
    given = (pictures[number % len(pictures)] for number in range(count))
    return [replace(one, sample=replace(one.sample, id=str(number))) for number, one in enumerate(given)]


@contextmanager
def threads_kept() -> Iterator[None]:
    """A worker without a GPU sets the number of torch's threads."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_shards(folder: Path, images: int, per_shard: int = 64) -> None:
    """Tars of pictures of three shapes, one after the other."""
    folder.mkdir(parents=True)
    pictures = [photographs(1, max(shape))[0].resize(shape[::-1]) for shape in SHAPES]
    for start in range(0, images, per_shard):
        with tarfile.open(folder / f"{start:06d}.tar", "w") as tar:
            for number in range(start, min(start + per_shard, images)):
                data = encoded(pictures[number % len(SHAPES)])
                member = tarfile.TarInfo(f"{number:06d}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def encoded(picture: Image.Image) -> bytes:
    """As PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def tiny(architecture: Architecture) -> Architecture:
    """The tiny checkpoint of the same family."""
    return TINY_SDXL if architecture.is_xl else TINY_SD


def cases(*, every_job: bool = True) -> list[tuple[Job, Architecture]]:
    """What is measured: the main jobs on both models, all others on the faster one, where the host has least time.

    Not every job: one without and one with controls, and the run.
    """
    if not every_job:
        return [(LEDITS, SD15), (PROMPT_TO_PROMPT, SDXL), (MIXED, SD15)]
    both = [(job, architecture) for architecture in (SD15, SDXL) for job in MAIN]
    return [*both, (MIXED, SD15), *((job, SD15) for job in (MASACTRL_AUTO, *others()))]


def measure_case(job: Job, architecture: Architecture, call_size: int, scale: Scale) -> dict[str, Any]:
    """One row of the table."""
    measured = (run if job is MIXED else edit)(scale.of(job), architecture, call_size, scale)
    counted = counts(job, str(tiny(architecture).folder), call_size, scale.counted_steps)
    return {
        "job": job.name,
        "model": architecture.name,
        "call_size": call_size,
        "images": scale.of(job).images,
        **measured.figures(),
        "blocking_copies_per_call": round(counted.blocking_copies, 1),
        "kernels_outside_per_call": round(counted.kernels_outside, 1),
    }


def measure(scale: Scale = FULL, *, every_job: bool = True, only: str = "") -> Iterator[dict[str, Any]]:
    """The table, row by row: of the jobs whose name holds `only`."""
    for job, architecture in cases(every_job=every_job):
        for call_size in scale.call_sizes if only in job.name else ():
            yield measure_case(job, architecture, call_size, scale)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few images and steps: only to see that it runs")
    parser.add_argument("--only", default="", help="jobs whose name holds this")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="processor: see above")
    arguments = parser.parse_args()
    scale = SMALL if arguments.small else replace(FULL, clock=arguments.clock)
    console = Console(width=160)
    console.print({**machine(), "clock": scale.clock})
    rows: list[dict[str, Any]] = []
    for row in measure(scale, every_job=not arguments.small, only=arguments.only):
        rows.append(row)
        console.print(f"{row['job']}, {row['model']}, {row['call_size']} rows: busy {row['busy_share']:.1%}")
        BUILD.mkdir(exist_ok=True)
        (BUILD / "host.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    show(console, f"A device of {RATE:g} TFLOP/s, and what the host does beside it", rows)
    console.print(f"written to {BUILD / 'host.json'}")


if __name__ == "__main__":
    main()
