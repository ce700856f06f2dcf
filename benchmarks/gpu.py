"""What a GPU does with the product: one command, its tables, and the machine that they are of.

    python -m benchmarks.gpu                             all
    python -m benchmarks.gpu --models SDXL --parts network,engine      a part of it
    python -m benchmarks.gpu --small                     on a CPU: a dry run, whose figures say nothing

Stable Diffusion 1.5 at 512 pixels and XL at 1024, the transformers of Stable Diffusion 3, FLUX.1-dev, FLUX.2 klein and
Qwen-Image-Edit at both, of their true shapes with random weights; no hub is asked. Writes build/gpu.json after every
part:

    peak      TFLOP/s of products of large matrices: what every share below is a share of
    network   rows/s of the network alone: by kernels of attention and rows of a call, then, at the best of these, by
              layout, projections, compiled code and CUDA graphs
    engine    rows/s of the engine over those of the network in calls of the same size, both tuned as for a run; gaps
              between kernels; memory
    flow      rows/s of the transformers alone, by rows of a call and side of the image, with a reference image and
              without
    ledits    whole LEDITS++ edits, from pixels to pixels, against diffusers' pipeline at its best batch
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architectures import SD15, SDXL, TINY_SD, TINY_SDXL, Architecture
from benchmarks.flow_architectures import ALL, ALL_TINY, META, FlowArchitecture, asked
from benchmarks.flow_architectures import tflop_per_row as tflop_per_flow_row
from benchmarks.jobs import LEDITS, from_latents
from benchmarks.ledits_on_gpu import compare, tuned_model
from benchmarks.machine import machine, show
from benchmarks.peak import peak_mib
from pipeline.engine.engine import Engine, EngineStats
from pipeline.engine.tuning import UNTUNED, Tuning
from pipeline.models.stable_diffusion import WAYS
from pipeline.models.unet import OpenedUNet

BUILD = Path("build")
NAMES = ", ".join(one.name for one in (SD15, SDXL, *ALL))
TOKENS = 77
ROUNDS = 5  # timed calls, after one that is not


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Of what, on what, how much."""

    device: torch.device
    dtype: torch.dtype
    architectures: Sequence[Architecture]
    matrix_side: int
    call_sizes: Sequence[int]  # ascending
    call_size: int | None  # of the engine; None: found by the product's own probe
    steps: int
    profiled_steps: int
    images: int  # of the engine alone, at least; and of whole edits
    batches: Sequence[int]  # of diffusers, ascending
    flow: Sequence[FlowArchitecture]
    flow_call_sizes: Sequence[int]  # ascending
    compiled: bool


def full(*, compiled: bool = True) -> Scale:
    """What a GPU is measured with."""
    return Scale(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        architectures=(SD15, SDXL),
        matrix_side=8192,
        call_sizes=(2, 4, 8, 16, 32, 64),
        call_size=None,
        steps=20,
        profiled_steps=4,
        images=16,
        batches=(1, 2, 4, 8, 16),
        flow=ALL,
        flow_call_sizes=(1, 2, 4, 8, 16),
        compiled=compiled,
    )


SMALL = Scale(
    device=torch.device("cpu"),
    dtype=torch.float32,
    architectures=(TINY_SD, TINY_SDXL),
    matrix_side=64,
    call_sizes=(1, 2),
    call_size=4,
    steps=2,
    profiled_steps=1,
    images=2,
    batches=(1, 2),
    flow=ALL_TINY,
    flow_call_sizes=(1, 2),
    compiled=False,
)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Of one round of several; the first, which pays for kernels and caches, is left out."""
    work()
    _finish(device)
    started = time.perf_counter()
    for _ in range(ROUNDS):
        work()
    _finish(device)
    return (time.perf_counter() - started) / ROUNDS


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(scale: Scale) -> float:
    """TFLOP/s of a product of two large square matrices of the network's dtype."""
    side = scale.matrix_side
    left, right = (torch.randn((side, side), device=scale.device, dtype=scale.dtype) for _ in range(2))
    return 2e-12 * side**3 / seconds_of(partial(torch.mm, left, right), scale.device)


def network_inputs(architecture: Architecture, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Latents, times, text and what stands beside the time, for a call of so many rows."""
    unet = architecture.config("unet")
    side = architecture.image_size // 8
    latents = torch.randn((rows, unet["in_channels"], side, side), device=device, dtype=dtype)
    times = torch.full((rows,), 401, device=device)
    context = torch.randn((rows, TOKENS, unet["cross_attention_dim"]), device=device, dtype=dtype)
    if not architecture.is_xl:
        return latents, times, context, None
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    sizes = torch.full((rows, 6), float(architecture.image_size), device=device)
    text = torch.randn((rows, pooled), device=device, dtype=dtype)
    return latents, times, context, {"text_embeds": text, "time_ids": sizes}


@torch.no_grad()
def tflop_per_row(architecture: Architecture) -> float:
    """Of the products of one row of a call, counted on the meta device."""
    unet = architecture.make_unet(META, torch.float32)
    latents, times, context, added = network_inputs(architecture, 1, META, torch.float32)
    with FlopCounterMode(display=False) as counter:
        unet(latents, times, encoder_hidden_states=context, added_cond_kwargs=added)
    return counter.get_total_flops() / 1e12


def network(scale: Scale, peak_tflops: float) -> Iterator[dict[str, Any]]:
    """Rows/s of the network alone, one way after the other, each from the best so far. Compiled last, and at one size:
    a graph takes a minute."""
    for architecture in scale.architectures:
        per_row = tflop_per_row(architecture)
        network = Network(scale, architecture)
        best, best_rows, best_rate = UNTUNED, 0, 0.0
        for name, values in WAYS.items():
            if name == "execution" and not scale.compiled:
                continue
            is_first = name == next(iter(WAYS))
            ways = [*([best] if is_first else []), *(replace(best, **{name: value}) for value in values)]
            for way, rows in product(ways, scale.call_sizes if is_first else [best_rows]):
                if rate := network.rows_per_second(rows, way):
                    yield network_line(network, rate, rows, per_row, peak_tflops)
                    if rate > best_rate:
                        best, best_rows, best_rate = way, rows, rate


class Network:
    """The network of an architecture alone, as the product opens it."""

    def __init__(self, scale: Scale, architecture: Architecture) -> None:
        self.device, self.dtype, self.architecture = scale.device, scale.dtype, architecture
        self.opened = OpenedUNet(architecture.make_unet(scale.device, scale.dtype))

    @torch.no_grad()
    def rows_per_second(self, rows: int, tuning: Tuning) -> float | None:
        """None: a call does not fit into memory."""
        latents, times, context, added = network_inputs(self.architecture, rows, self.device, self.dtype)
        if tuning != self.opened.tuning:
            self.opened.tune(tuning)
        forget_peak(self.device)
        try:
            return rows / seconds_of(partial(self.opened.predict, latents, times, context, None, added), self.device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None


@torch.no_grad()
def flow(scale: Scale, peak_tflops: float) -> Iterator[dict[str, Any]]:
    """Rows/s of the transformers alone. Transformers and calls that do not fit into memory are left out."""
    for architecture in scale.flow:
        try:
            velocity = architecture.make(scale.device, scale.dtype)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        for size, reference in architecture.calls:
            per_row = tflop_per_flow_row(architecture, size, reference=reference)
            for rows in scale.flow_call_sizes:
                forget_peak(scale.device)
                try:
                    inputs = architecture.inputs(rows, size, scale.device, scale.dtype, reference=reference)
                    rate = rows / seconds_of(partial(asked, velocity, inputs), scale.device)
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    break
                yield {
                    "model": architecture.name,
                    "pixels": size,
                    "reference": reference,
                    "call_size": rows,
                    "rows_per_s": round(rate, 2),
                    "tflop_per_row": round(per_row, 3),
                    "tflops": round(rate * per_row, 3),
                    "share_of_peak": round(rate * per_row / peak_tflops, 3),
                    "memory_gib": memory_gib(scale.device),
                }
        del velocity


def network_line(network: Network, rate: float, rows: int, per_row: float, peak_tflops: float) -> dict[str, Any]:
    """One row of the table."""
    return {
        "model": network.architecture.name,
        "tuning": str(network.opened.tuning),
        "call_size": rows,
        "rows_per_s": round(rate, 2),
        "tflops": round(rate * per_row, 3),
        "share_of_peak": round(rate * per_row / peak_tflops, 3),
        "memory_gib": memory_gib(network.device),
    }


def forget_peak(device: torch.device) -> None:
    """Of the card's memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def memory_gib(device: torch.device) -> float:
    """The most that tensors took of the card's memory since then; without a card, that this process ever took."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return round(peak_mib() / 2**10, 2)


def engine_rows(scale: Scale) -> Iterator[dict[str, Any]]:
    """LEDITS++ with three concepts from latents to latents, against the same model called over and over."""
    for architecture in scale.architectures:
        model, size = tuned_model(scale, architecture)
        engine = Engine(model, call_size=size)
        images = max(scale.images, size)
        run_job(engine, architecture, 1, scale.profiled_steps)  # not counted: kernels, caches, the compiler
        forget_peak(scale.device)
        engine.stats = EngineStats()
        started = time.perf_counter()
        run_job(engine, architecture, images, scale.steps)
        rate = (engine.stats.network_rows - engine.stats.shared_rows) / (time.perf_counter() - started)
        memory = memory_gib(scale.device)
        share, longest = idle(device_times(partial(run_job, engine, architecture, images, scale.profiled_steps)))
        tuning = model.tuning
        del model, engine
        alone = Network(scale, architecture).rows_per_second(size, tuning)
        if alone is None:
            raise RuntimeError(f"a call of {size} rows fits into memory in the engine, and not alone")
        yield {
            "model": architecture.name,
            "tuning": str(tuning),
            "call_size": size,
            "images": images,
            "network_rows_per_s": round(alone, 2),
            "engine_rows_per_s": round(rate, 2),
            "ratio": round(rate / alone, 3),
            "idle_share": round(share, 4),
            "longest_gap_ms": round(longest * 1e3, 2),
            "memory_gib": memory,
        }


def run_job(engine: Engine, architecture: Architecture, images: int, steps: int) -> None:
    """Three concepts from latents."""
    side = architecture.image_size // engine.backbone.latent_scale
    for finished in engine.run(from_latents(LEDITS.smaller(steps=steps), engine.backbone, images, (side, side))):
        if finished.error is not None:
            raise finished.error


def device_times(work: Callable[[], Any]) -> list[tuple[float, float]]:
    """When the device computed, from and to in seconds; without a card, when torch did on the CPU."""
    on_card = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as profiled:
        work()
        _finish(torch.device("cuda" if on_card else "cpu"))
    kind = DeviceType.CUDA if on_card else DeviceType.CPU
    events = (event for event in profiled.events() if event.device_type == kind and event.cpu_parent is None)
    return [(event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events]


def idle(times: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Of the time from the first begin to the last end the share in which nothing ran, and the longest such gap."""
    ordered = sorted(times)
    if not ordered:
        raise ValueError("nothing ran on the device, so that nothing can be said of its gaps")
    gaps, until = [0.0], ordered[0][1]
    for begin, end in ordered:
        gaps.append(max(0.0, begin - until))
        until = max(until, end)
    return sum(gaps) / (until - ordered[0][0]), max(gaps)


def measure(scale: Scale, parts: Sequence[str]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Parts of the benchmark as they are done: name, title, rows."""
    peak_tflops = peak(scale)
    side = f"{scale.matrix_side} x {scale.matrix_side}"
    yield "peak", f"Products of {side} matrices", [{"dtype": str(scale.dtype), "tflops": round(peak_tflops, 3)}]
    if "network" in parts:
        yield "network", "The network alone", list(network(scale, peak_tflops))
    if "engine" in parts:
        yield "engine", "The engine against the network", list(engine_rows(scale))
    if "flow" in parts:
        yield "flow", "The transformers of flow matching alone", list(flow(scale, peak_tflops))
    if "ledits" in parts:
        rows = [row for one in scale.architectures for row in compare(scale, one)]
        yield "ledits", "LEDITS++ against diffusers' own pipeline at its best batch (ratio above 1: faster)", rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a dry run on the CPU")
    parser.add_argument("--no-compile", action="store_true", help="our networks are not compiled")
    parser.add_argument("--parts", default="network,engine,flow,ledits", help="beside the peak; with commas")
    parser.add_argument("--models", default="", help=f"{NAMES}; with commas. All where left out")
    parser.add_argument("--steps", type=int, help="of an edit; 20 where left out")
    chosen = parser.parse_args()
    if not chosen.small and not torch.cuda.is_available():
        parser.error("torch finds no GPU here. Give --small for a dry run on the CPU")
    scale = SMALL if chosen.small else full(compiled=not chosen.no_compile)
    scale = replace(scale, steps=chosen.steps or scale.steps)
    if chosen.models:
        wanted = chosen.models.split(",")
        scale = replace(
            scale,
            architectures=[one for one in scale.architectures if one.name in wanted],
            flow=[one for one in scale.flow if one.name in wanted],
        )
    console = Console(width=140)
    results: dict[str, Any] = {"machine": machine(), "dry_run": chosen.small}
    console.print(results["machine"])
    for name, title, rows in measure(scale, chosen.parts.split(",")):
        results[name] = rows
        show(console, title, rows)
        BUILD.mkdir(exist_ok=True)
        (BUILD / "gpu.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {BUILD / 'gpu.json'}")


if __name__ == "__main__":
    main()
