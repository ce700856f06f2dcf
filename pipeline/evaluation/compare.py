"""Measures and tables from Python, for images that are at hand: no job, no folder, no model of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from pipeline.errors import DecodeError
from pipeline.evaluation.items import Item, Result
from pipeline.evaluation.measures import MEASURES, measure_of
from pipeline.evaluation.metrics_config import MetricsConfig
from pipeline.evaluation.score_rows import row_of
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.statistics import Settings
from pipeline.evaluation.tables import Tables, tables_of
from pipeline.reading.pictures import AnyImage, picture
from pipeline.writing.rows import encode_png


def compare(
    items: Sequence[Item],
    results: Mapping[str, Sequence[AnyImage | None]],
    *,
    metrics: MetricsConfig | None = None,
    settings: Settings | None = None,
) -> Tables:
    """Measure what several methods made of the same items.

    Args:
        items: what was asked for; their keys differ.
        results: by method, one picture per item in their order; None where it made none.
        metrics: what is measured; None: pixels alone.
        settings: of intervals and tests.

    Raises:
        ValueError: a method has another number of pictures, or two items share a key.
    """
    if len({item.key for item in items}) < len(items):
        raise ValueError("two items have the same key. Give each a key of its own")
    for method, pictures in results.items():
        if len(pictures) != len(items):
            raise ValueError(f"{method} has {len(pictures)} pictures for {len(items)} items. Give None where one lacks")
    scorer = Scorer(metrics or MetricsConfig())
    try:
        scored = scorer.score(
            [
                _result(item, method, pictures[at])
                for at, item in enumerate(items)
                for method, pictures in results.items()
            ]
        )
    finally:
        scorer.close()
    own = dict(scorer.own_directions)
    names = [name for name in (*MEASURES, *own) if name in scorer.columns]
    return tables_of(
        [row_of(one, cost={}, judged={}) | {"facts": {}} for one in scored],
        list(results),
        {name: measure_of(name, own) for name in names},
        settings or Settings(),
        title=f"{len(items)} items",
        unavailable=scorer.unavailable,
    )


def _result(item: Item, method: str, image: AnyImage | None) -> Result:
    """One result; a picture that is none, such as an array with NaN, is a row without a number."""
    if image is None:
        return Result(item=item, edit="", method=method, reason="missing_result", message="there is no picture")
    try:
        held = picture(image, "result")
    except DecodeError as error:
        return Result(item=item, edit="", method=method, reason="broken_result", message=str(error))
    if isinstance(held, Image.Image):
        held = encode_png(np.asarray(held.convert("RGB")))
    return Result(item=item, edit="", method=method, image=held)
