"""How a network runs on its device: ways that differ in speed and in the last digits, and which is the fastest there.

A way is part of a run's record, like the call size: bits are equal among results that were made the same way. Which
ways there are, the backbone says; a CPU has one, so that its results are the same everywhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from pipeline.engine.backbone import Backbone
    from pipeline.engine.calls import NetworkAnswer, NetworkCall

log = logging.getLogger(__name__)

ROUNDS = 5  # timed calls of one way, after two that are not
WORTH = 1.02  # times as fast: what a way must gain to be taken
# Root of the mean squared difference from the usual way's predictions, over that of these: what rounding in a network's
# own precision explains, with room. A wrong layout or a wrong kernel is off by the size of the predictions themselves.
CLOSE = {"float64": 1e-9, "float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """One way."""

    attention: Literal["default", "flash", "cudnn", "efficient"] = "default"
    """Kernels of attention that are asked first; default: in torch's own order."""
    layout: Literal["planes", "channels_last"] = "planes"
    """Of what convolutions read."""
    projections: Literal["apart", "joined"] = "apart"
    """Queries, keys and values of one attention layer: by a product each, or by one of all that read the same."""
    execution: Literal["eager", "compiled", "graphs"] = "eager"
    """Kernel by kernel; as code that torch compiles; or compiled, and launched at once as a captured CUDA graph."""

    def __str__(self) -> str:
        return ", ".join(value for value in asdict(self).values() if value not in AS_LOADED) or "as loaded"


UNTUNED = Tuning()
AS_LOADED = frozenset(asdict(UNTUNED).values())
Ways = Mapping[str, tuple[str, ...]]
"""Of a backbone: by field of `Tuning`, what it can be set to beside what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The way that was taken, and why."""

    tuning: Tuning = UNTUNED
    rows_per_second: Mapping[str, float] = field(default_factory=dict)  # of every way that was tried and can be taken


NOT_TUNED = Tuned()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a model is run on its device; decided by the first driver of a run."""

    call_size: int  # rows of a network call
    tuned: Tuned


class _Try(NamedTuple):
    answer: NetworkAnswer
    rows_per_second: float


def tune(backbone: Backbone, call: NetworkCall, ways: Ways) -> Tuned:
    """Find the fastest way for calls like this one, and let the backbone run that way from now on.

    One field after the other, each from the best found so far; compiled code last, as every other way would be compiled
    by itself. A way is taken where it is faster, its predictions are
    those of the way in which the backbone ran before, but for rounding, and a row's do not depend on the other rows.

    Args:
        backbone: the model.
        call: of full size, its rows different from each other.
        ways: to try, of those that the backbone has.

    Raises:
        Exception: what the backbone raises as it runs before.
    """
    before = backbone.tuning
    usual = _attempt(backbone, call)
    tried = {before: usual.rows_per_second}
    best = before
    for name, values in ways.items():
        for way in [replace(best, **{name: value}) for value in values]:  # type: ignore[arg-type]
            rate = None if way in tried else _rate(backbone, way, call, usual)
            if rate is None:
                continue
            tried[way] = rate
            if rate >= WORTH * tried[best]:
                best = way
    backbone.tune(best)
    return Tuned(tuning=best, rows_per_second={str(way): round(rate, 3) for way, rate in tried.items()})


def _rate(backbone: Backbone, way: Tuning, call: NetworkCall, usual: _Try) -> float | None:
    """Rows per second; None where this way cannot be taken."""
    try:
        backbone.tune(way)
        attempt = _attempt(backbone, call)
        reason = _reason_against(attempt.answer, backbone.denoise(_among_others(call)), usual.answer, backbone)
    except Exception as error:  # whatever a compiler, a driver or a kernel raises that this device cannot run
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if reason:
        log.warning("the network is not run %s here: %s", way, reason)
        return None
    return attempt.rows_per_second


def _reason_against(got: NetworkAnswer, among_others: NetworkAnswer, usual: NetworkAnswer, backbone: Backbone) -> str:
    own, beside, expected = (one.predictions.noise.cpu() for one in (got, among_others, usual))
    off = float((own - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if not off <= CLOSE[backbone.record.dtype]:  # nor where it is no number
        return f"its predictions are off by {off:.2g} of their size"
    half = len(own) // 2
    return "" if own[:half].equal(beside[:half]) else "a row's bits depend on the rows beside it"


def _among_others(call: NetworkCall) -> NetworkCall:
    """The call with other rows in its second half."""
    half = len(call.levels) // 2
    latents = call.latents.clone()
    latents[half:] = latents[half:].flip(-1)
    return replace(call, latents=latents)


def _attempt(backbone: Backbone, call: NetworkCall) -> _Try:
    """Time a way; two calls first, in which things are compiled, captured and laid out."""
    for _ in _calls(backbone, call, 2):
        pass
    started = time.perf_counter()
    for answer in _calls(backbone, call, ROUNDS):
        last = answer
    return _Try(last, len(call.levels) * ROUNDS / (time.perf_counter() - started))


def _calls(backbone: Backbone, call: NetworkCall, count: int) -> Iterator[NetworkAnswer]:
    for _ in range(count):
        answer = backbone.denoise(call)
        backbone.mark()()
        yield answer
