"""How fast is this model on this machine? A few images through the real engine, their results thrown away."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import NetworkCall
from pipeline.engine.engine import Engine
from pipeline.flow import edit_row
from pipeline.models.loading import load_backbone
from pipeline.reading.decoder import Decoder
from pipeline.reading.requests import asked_of
from pipeline.recipe import Recipe
from pipeline.records import Edited, Outcome, Rejected
from pipeline.running.worker import fit
from pipeline.samples import Sample
from pipeline.writing.parquet import render_parquet
from pipeline.writing.restoring import outcome_of
from pipeline.writing.rows import as_written, encode_outcome, schema

FULL = 0.75  # share of a call's rows that somebody asked for, from which on it takes about the time of a full one
PROBE_SECONDS = 60.0  # a longer probe is cut off, and estimates use what it has seen by then


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a few images through the real model took."""

    images: int  # that were timed from beginning to end; 0 where the probe was cut off
    call_size: int  # rows of a network call
    seconds_per_call: float
    seconds_per_image: float  # of the autoencoder
    host_seconds_per_image: float  # all else: reading, the method's own arithmetic, figures, encoding
    overlaps: bool  # the host does that while the device computes
    bytes_per_result: float | None  # in the output; None where no image came to its end in time
    device: str


def probe_model(
    recipe: Recipe, samples: Sequence[Sample], results_per_image: float, why: list[str] | None = None
) -> Probe | None:
    """Load the model, edit the first of these samples to warm up, and time the edit of the others.

    Args:
        recipe: the run.
        samples: at least one.
        results_per_image: asked for on average; stands in for measured ones where the probe is cut off.
        why: takes the reasons of the results that could not be made, where given.

    Returns:
        None where none of the samples can be edited.

    Raises:
        ModelError: the model cannot be loaded.
    """
    backbone = load_backbone(recipe.model)
    fitted = fit(recipe, backbone)
    call_size = fitted.call_size
    timed = TimedBackbone(backbone, PROBE_SECONDS, compiles=fitted.tuned.tuning.execution != "eager")
    engine = Engine(cast(Backbone, timed), call_size=call_size)
    reasons = [] if why is None else why
    images, size = 0, None
    host = 0.0
    try:
        outcomes = _edit(samples[:1], recipe, engine, reasons)
        size = _bytes_per_result(outcomes, recipe, backbone, call_size)
        timed.forget()
        start = time.perf_counter()
        measured = list(samples[1:] or samples)
        outcomes = _edit(measured, recipe, engine, reasons if len(samples) > 1 else [])
        size = _bytes_per_result(outcomes, recipe, backbone, call_size) or size
        host = (time.perf_counter() - start - sum(map(sum, timed.seconds.values()))) / len(measured)
        images = len(measured)
    except TimeIsUp:
        pass  # what the host does beside is not known, and little of a call that takes so long
    decodings = 0 if recipe.writes_bases else results_per_image + recipe.sink.round_trip
    if not timed.seconds["denoise"]:
        return None
    return Probe(
        images=images,
        call_size=call_size,
        seconds_per_call=timed.mean("denoise"),
        seconds_per_image=(timed.mean("encode_images") + decodings * timed.mean("decode_latents"))
        / engine.pictures_per_call,
        host_seconds_per_image=max(host, 0.0),
        overlaps=backbone.device.type != "cpu",
        bytes_per_result=size,
        device=backbone.record.device,
    )


def _edit(samples: Sequence[Sample], recipe: Recipe, engine: Engine, why: list[str]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    decoder = Decoder(recipe.source)
    for finished in engine.run(
        edit_row(asked_of(sample, recipe), recipe, engine.backbone, decoder) for sample in samples
    ):
        if finished.error is not None:
            raise finished.error
        outcomes += [outcome_of(result) for result in finished.value]
    why += [outcome.message for outcome in outcomes if isinstance(outcome, Rejected)]
    return outcomes


def _bytes_per_result(outcomes: Sequence[Outcome], recipe: Recipe, backbone: Backbone, call_size: int) -> float | None:
    """Of a Parquet file of these, but for what an empty one takes: files are merged. A tar takes about the same."""
    edited = [outcome for outcome in outcomes if isinstance(outcome, Edited)]
    rows = [encode_outcome(outcome, recipe, backbone.record, call_size) for outcome in edited]
    encoded = [row for row in rows if isinstance(row, dict)]
    written = [as_written(row, recipe.sink) for row in encoded]
    if not written:
        return None
    columns = schema(recipe.sink, bases=recipe.writes_bases)
    return (len(render_parquet(written, columns)) - len(render_parquet([], columns))) / len(written)


class TimeIsUp(BaseException):
    """Ends a probe. Not an `Exception`: the engine turns these into failed rows, and goes on."""


class TimedBackbone:
    """A backbone that notes what its calls take, and ends the probe after so many seconds.

    Where it `compiles`, the first network call measures nothing: it is not noted, and time counts from its end.
    """

    def __init__(self, backbone: Backbone, seconds: float, *, compiles: bool = False) -> None:
        self.backbone = backbone
        self.allowed, self.deadline = seconds, time.perf_counter() + seconds
        self.compiles = compiles
        self.forget()

    def forget(self) -> None:
        """Begin anew: the first calls paid for kernels and caches."""
        self.seconds: dict[str, list[float]] = {"denoise": [], "product": [], "encode_images": [], "decode_latents": []}
        self.full: list[float] = []  # of network calls, those of calls that hardly anything fills up

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def _timed(self, name: str, *arguments: Any) -> Any:
        if self.seconds["denoise"] and time.perf_counter() > self.deadline:
            raise TimeIsUp
        start = time.perf_counter()
        answer = getattr(self.backbone, name)(*arguments)
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name].append(time.perf_counter() - start)
        return answer

    def encode_images(self, pixels: Any) -> Any:
        """The backbone's own, timed."""
        return self._timed("encode_images", pixels)

    def decode_latents(self, latents: Tensor) -> Any:
        """The backbone's own, timed."""
        return self._timed("decode_latents", latents)

    def denoise(self, call: NetworkCall) -> Any:
        """The backbone's own, timed."""
        if self.compiles:
            self.compiles = False
            answer = self.backbone.denoise(call)
            self.deadline = time.perf_counter() + self.allowed
            return answer
        answer = self._timed("denoise", call)
        if filled_share(call) >= FULL:
            self.full.append(self.seconds["denoise"][-1])
        return answer

    def product(self, *arguments: Any) -> Any:
        """The backbone's own, timed."""
        return self._timed("product", *arguments)

    def mean(self, name: str) -> float:
        """Mean seconds of a kind of call. The first of several is left out, it may have been slow to start.

        Of network calls, those that are full, where there were any: copies of a row are computed once up to the text,
        and a run has few of them.
        """
        calls = (self.full if name == "denoise" else []) or self.seconds[name]
        later = calls[1:] or calls
        return sum(later) / len(later) if later else 0.0


def filled_share(call: NetworkCall) -> float:
    """Of a call's rows, those that are not copies of the first one, at the end, to fill it up."""
    rows = len(call.levels)
    while rows > 1 and _is_copy(call, rows - 1):
        rows -= 1
    return rows / len(call.levels)


def _is_copy(call: NetworkCall, row: int) -> bool:
    same_text = call.conditioning[row] is call.conditioning[0]
    return same_text and call.levels[row] == call.levels[0] and call.latents[row].equal(call.latents[0])
