"""Results become rows of scores: pixels on all cores, models in batches. A row has a number, or a reason why not.

Input, region and truth are decoded once for all methods. A measure whose model cannot be loaded is unavailable for the
whole evaluation, with the way to get it, and its column is null: never a guess.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from typing import Protocol

import numpy as np
from PIL import Image

from pipeline.common.showing import describe
from pipeline.errors import DecodeError, RecipeError
from pipeline.evaluation.items import Item, Result
from pipeline.evaluation.metric_models import Models
from pipeline.evaluation.metrics_config import MetricsConfig
from pipeline.evaluation.published import (
    UNEDITED,
    WHOLE,
    overlap,
    truth_figures,
    unedited_figures,
    whole_figures,
)
from pipeline.reading.decode import decode
from pipeline.reading.decoder import Decodes, DecodesHere

MAX_PIXELS = 64_000_000
JPEG_QUALITY = 75  # Pillow's default, with which the published results were saved
PIXEL_COLUMNS = (*WHOLE, *UNEDITED, "truth_psnr", "mask_iou")


class OwnMeasures(Protocol):
    """Measures of one's own: what `metrics.own` names returns such an object."""

    directions: Mapping[str, bool | None]  # by name: whether more is better; None: neither

    def measure(
        self, item: Item, source: np.ndarray, result: np.ndarray, mask: np.ndarray | None
    ) -> Mapping[str, float | None]:
        """A number, or None, for each of its names.

        Args:
            item: what was asked for, with its facts.
            source, result: (H, W, 3) uint8, of one size.
            mask: the method's own region, (H, W) bool; None: it has none.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """A result's pictures, decoded."""

    source: np.ndarray  # (H, W, 3) uint8
    result: np.ndarray
    region: np.ndarray | None  # (H, W) bool
    truth: np.ndarray | None
    mask: np.ndarray | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One row: its numbers, why it has none, and what was odd."""

    result: Result
    figures: Mapping[str, float | None] = field(default_factory=dict)
    reason: str = ""  # class
    message: str = ""
    notes: tuple[str, ...] = ()


class Scorer:
    """Loads what the configuration names, once.

    Args:
        config: which measures.
        size: side that results must have, as a benchmark asks for; None: a result of another size than its input is
            scaled to it, and noted.
        decoder: of pictures.
        threads: for what needs no model.
    """

    def __init__(
        self,
        config: MetricsConfig,
        *,
        size: int | None = None,
        decoder: Decodes | None = None,
        threads: int = 1,
    ) -> None:
        self._config, self._size = config, size
        self._decoder = decoder or DecodesHere()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="measure")
        self._models = Models(config)
        self._own = [own_measures(name) for name in config.own]
        self.own_directions = {name: way for one in self._own for name, way in one.directions.items()}
        self.columns = (*PIXEL_COLUMNS, *self._models.columns, *self.own_directions)

    @property
    def unavailable(self) -> Mapping[str, str]:
        """Measures that cannot be had, with the way to get them."""
        return self._models.unavailable

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def score(self, results: Sequence[Result]) -> list[Scored]:
        """Rows in the order of the results. Those of one item should stand together: its input is seen once."""
        rows: list[Scored] = []
        for part in _parts(results, self._config.batch_size):
            rows += self._score(part)
        return rows

    def _score(self, results: Sequence[Result]) -> list[Scored]:
        begun = list(self._pool.map(self._begin, results))
        ready = [(at, one) for at, one in enumerate(begun) if isinstance(one, tuple)]
        seen = self._models.measure([(results[at], pictures) for at, (pictures, _) in ready])
        rows = {at: one for at, one in enumerate(begun) if isinstance(one, Scored)}
        for (at, (_, begun_row)), (figures, notes) in zip(ready, seen, strict=True):
            rows[at] = _with(begun_row, figures, notes, self.columns)
        return [rows[at] for at in range(len(results))]

    def _begin(self, result: Result) -> Scored | tuple[Pictures, Scored]:
        """What needs no model of one result; or its row without numbers."""
        item = result.item
        if item.problem:
            return Scored(result=result, reason=item.excluded, message=item.problem.partition(": ")[2])
        if result.image is None:
            return Scored(result=result, reason=result.reason, message=result.message, notes=item.notes)
        try:
            pictures, notes = self._decoded(result)
        except _NoScoreError as error:
            return Scored(result=result, reason=error.reason, message=str(error), notes=item.notes)
        figures: dict[str, float | None] = dict(whole_figures(pictures.source, pictures.result))
        if pictures.region is not None:
            figures |= unedited_figures(pictures.source, pictures.result, pictures.region)
            figures["mask_iou"] = overlap(pictures.mask, pictures.region)
            notes += _about_region(pictures.region, figures)
        if pictures.truth is not None:
            figures |= truth_figures(pictures.truth, pictures.result, pictures.region)
        for own in self._own:
            figures |= own.measure(item, pictures.source, pictures.result, pictures.mask)
        return pictures, Scored(result=result, figures=figures, notes=(*item.notes, *notes))

    def _decoded(self, result: Result) -> tuple[Pictures, list[str]]:
        item, notes = result.item, []
        given, edited = result.pictures
        source, made = self._picture(given, "image"), self._picture(edited, "result")
        if self._size is not None:
            made = _last_panel(made, self._size)
        if made.shape != source.shape:
            if self._size is not None:
                raise _NoScoreError("result_size", f"the result is {_size(made)}, the image {_size(source)}")
            made = _scaled(made, source)
            notes.append("result_scaled")
        if self._config.jpeg_roundtrip:
            made = jpeg_roundtrip(made)
        pictures = Pictures(
            source=source,
            result=made,
            region=self._mask(item.region, source, "region"),
            truth=None if item.truth is None else self._picture(item.truth, "truth"),
            mask=self._mask(result.mask, source, "mask"),
        )
        if pictures.truth is not None and pictures.truth.shape != source.shape:
            raise _NoScoreError("truth_size", f"the truth is {_size(pictures.truth)}, the image {_size(source)}")
        return pictures, notes

    def _picture(self, data: bytes, what: str) -> np.ndarray:
        try:
            return self._decoder.image(data, MAX_PIXELS)[0]
        except DecodeError as error:
            raise _NoScoreError(f"broken_{what}", str(error)) from error

    def _mask(self, data: bytes | None, source: np.ndarray, what: str) -> np.ndarray | None:
        if data is None:
            return None
        try:
            mask = self._decoder.mask(data, MAX_PIXELS, 1, source.shape[:2])
        except DecodeError as error:
            raise _NoScoreError(f"broken_{what}", str(error)) from error
        if mask.shape != source.shape[:2]:
            raise _NoScoreError(f"{what}_size", f"the {what} is {_size(mask)}, the image {_size(source)}")
        return mask >= 128


class _NoScoreError(Exception):
    """Why a row has no numbers; `reason` is the class."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def _about_region(region: np.ndarray, figures: Mapping[str, float | None]) -> list[str]:
    """Why figures of the background are null."""
    if region.all():
        return ["full_mask"]
    return ["psnr_infinite"] if figures["mse_unedit_part"] == 0 else []


def _with(row: Scored, figures: Mapping[str, float | None], notes: Sequence[str], columns: Sequence[str]) -> Scored:
    """The row with a model's figures; a number that is none is null, and noted."""
    found = {name: value for name, value in (row.figures | figures).items() if name in columns}  # type: ignore[operator]
    wrong = sorted(name for name, value in found.items() if value is not None and not math.isfinite(value))
    return Scored(
        result=row.result,
        figures={name: None if name in wrong else value for name, value in found.items()},
        notes=(*row.notes, *notes, *(f"not_finite:{name}" for name in wrong)),
    )


def _parts(results: Sequence[Result], size: int) -> Iterator[Sequence[Result]]:
    yield from (results[at : at + size] for at in range(0, len(results), size))


def _last_panel(pixels: np.ndarray, side: int) -> np.ndarray:
    """The result of a strip of panels, as PIE-Bench's authors save it; a square picture whole."""
    height, width = pixels.shape[:2]
    return pixels[-side:, -side:] if width != height and height >= side and width >= side else pixels


def _scaled(pixels: np.ndarray, like: np.ndarray) -> np.ndarray:
    size = (like.shape[1], like.shape[0])
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def jpeg_roundtrip(pixels: np.ndarray) -> np.ndarray:
    """Pixels through a JPEG as the published results were saved: quality 75, colours at half resolution."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return decode(buffer.getvalue(), MAX_PIXELS)[0]


def own_measures(name: str) -> OwnMeasures:
    """What "package.module:factory" returns.

    Raises:
        RecipeError: it cannot be had.
    """
    module, _, factory = name.partition(":")
    try:
        made: OwnMeasures = getattr(importlib.import_module(module), factory)()
        dict(made.directions)
    except Exception as error:  # a stranger's code
        raise RecipeError("metrics", [("metrics.own", f"{name} gives no measures: {describe(error)}")]) from error
    return made
