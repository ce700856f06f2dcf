"""Thresholds are the image's: what stands in the padding of `fit: pad` moves none of them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.diffusion.levels import prediction_of
from pipeline.diffusion.masks import above_average, attention_mask, noise_mask
from pipeline.editing.masactrl import AutoMasks
from pipeline.editing.masactrl import foreground as foreground_of
from pipeline.editing.prompt_to_prompt import local_blend_mask
from pipeline.editing.proxedit import threshold_of
from pipeline.engine.calls import NetworkAnswer, NetworkCall
from pipeline.engine.engine import Engine
from pipeline.models.analytic import AnalyticBackbone
from pipeline.one_image import Setup, edit_prepared
from pipeline.reading.placement import place
from pipeline.reading.prepare import prepare
from pipeline.reading.requests import asked_of
from pipeline.recipe import recipe_from
from pipeline.records import Decoded, Placement, Source
from pipeline.samples import Sample
from tests.methods import analytic, source
from tests.test_every_pair import PAIRS, REQUEST, method

# A wide image in the middle of a square canvas of 12 x 12 latents: rows 3 to 8 show it.
WIDE = Placement(original=(48, 96), crop=(0, 0, 48, 96), scaled=(48, 96), offset=(24, 0), canvas=(96, 96))
ROWS = slice(3, 9)


def shown() -> Source:
    return dataclasses.replace(source(analytic(), 1), placement=WIDE)


def foreground(fields: Tensor, of_image: Callable[[Tensor], Tensor]) -> Tensor:
    """MasaCtrl's automatic masks of two fields."""
    return foreground_of(fields, AutoMasks(torch.zeros((2, 77)), 0.5, of_image))


HALF = torch.tensor([0.5, 0.5])
THRESHOLDS: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor]], Any]] = {
    "noise mask": lambda maps, of_image: noise_mask(maps[:, None], HALF, of_image),
    "attention mask": lambda maps, of_image: attention_mask(maps, HALF, (12, 12), of_image),
    "above average": lambda maps, of_image: above_average(maps, 2.0, of_image),
    "local blend": lambda maps, of_image: local_blend_mask(maps, 0.9, (12, 12), of_image, dilate=False),
    "local blend, dilated": lambda maps, of_image: local_blend_mask(maps, 0.9, (12, 12), of_image, dilate=True),
    "automatic foreground": foreground,
    "proximal": lambda maps, of_image: maps.abs()[:, None] > threshold_of(maps[:, None], 0.7, of_image),
}


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_what_stands_in_the_padding_moves_no_threshold(threshold: str) -> None:
    of_image = shown().of_image
    maps = torch.rand((2, 12, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for padding in (0.0, 0.5, 100.0):
        padded = maps.clone()
        padded[:, :3], padded[:, 9:] = padding, padding
        found = THRESHOLDS[threshold](padded, of_image)
        results.append(found.reshape(2, 12, 12)[:, 4:8])  # blurs and dilations reach across the edge by one
    assert all(torch.equal(result, results[0]) for result in results)
    assert 0 < results[0].double().mean() < 1
    if threshold in ("noise mask", "above average", "proximal"):
        alone = THRESHOLDS[threshold](maps[:, ROWS], lambda whole: whole).reshape(2, 6, 12)
        assert torch.equal(alone[:, 1:-1], results[0]), "thresholds are those of the image by itself"


@pytest.mark.parametrize("fit", ["crop", "stretch", "bucket"])
def test_an_image_that_fills_its_canvas_is_all_of_it(fit: Any) -> None:
    placement = place((60, 96), fit, size=64, multiple=16)
    for size in ((4, 4), (16, 16), (3, 7)):
        assert placement.image_part(size) == (slice(0, size[0]), slice(0, size[1]))


@pytest.mark.parametrize(
    ("original", "size", "rows", "columns"),
    [
        ((48, 96), (12, 12), slice(3, 9), slice(0, 12)),
        ((48, 96), (3, 3), slice(1, 2), slice(0, 3)),  # rows 0.75 to 2.25: the outer ones show a quarter
        ((64, 96), (12, 12), slice(2, 10), slice(0, 12)),
        ((72, 96), (4, 4), slice(0, 4), slice(0, 4)),  # the outer rows show one half
        ((96, 72), (4, 4), slice(0, 4), slice(0, 4)),
        ((70, 96), (4, 4), slice(1, 3), slice(0, 4)),
        ((6, 96), (12, 12), slice(6, 7), slice(0, 12)),  # thinner than a cell: the one that holds its middle
        ((2, 96), (3, 3), slice(1, 2), slice(0, 3)),
        ((1, 96), (12, 12), slice(5, 6), slice(0, 12)),
    ],
)
def test_the_images_part_is_what_is_at_least_half_image_and_never_nothing(
    original: tuple[int, int], size: tuple[int, int], rows: slice, columns: slice
) -> None:
    assert place(original, "pad", size=96, multiple=8).image_part(size) == (rows, columns)


class PointByPoint(AnalyticBackbone):
    """Answers each latent by itself, and how much two prompts differ there depends on the latent."""

    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        answer = super().denoise(call)
        strengths = torch.stack([one.embedding for one in call.conditioning])[:, 0, 3, None, None, None]
        bent = answer.predictions.noise + 0.3 * strengths * torch.tanh(3.0 * call.latents)
        predictions = prediction_of("epsilon", bent.detach(), call.latents, call.levels)
        return dataclasses.replace(answer, predictions=predictions)


def test_no_editor_lets_the_padding_decide_what_happens_in_the_image() -> None:
    # The optimised embeddings of null_text are the whole canvas's.
    pairs = [pair for pair in PAIRS if pair[0] != "null_text"]
    methods = {"-".join(pair): method(*pair) for pair in pairs}
    for name in [name for name in methods if name.endswith("ledits_pp")]:
        only = methods[name].editing.model_copy(update={"mask": "noise"})  # type: ignore[attr-defined]
        methods[name] = methods[name].model_copy(update={"editing": only})
    picture = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    recipe = recipe_from({"source": {"shards": "-"}, "edits": REQUEST.model_dump(), "sink": {"folder": "-"}})
    row = Sample(id="a", shard="", key="a", index=0, image=out.getvalue())
    prepared = prepare(asked_of(row, recipe), recipe, size=64, multiple=16)
    other = prepared.pixels.copy()
    other[:16], other[48:] = 0, 255
    backbone = PointByPoint()
    engine = Engine(backbone, call_size=16)
    one, two = (
        {
            result.method: result
            for result in engine.run_one(edit_prepared(given, Setup(methods=methods, run_seed=0), backbone))
        }
        for given in (prepared, dataclasses.replace(prepared, pixels=other))
    )
    assert not np.array_equal(one["ddim-cfg"].pixels[:16], two["ddim-cfg"].pixels[:16])
    for name in methods:
        assert isinstance(one[name], Decoded), one[name]
        inside = slice(20, 44)  # a region in the padding may grow into the image, by the latent that it is dilated by
        difference = one[name].pixels[inside].astype(int) - two[name].pixels[inside]
        assert np.abs(difference).max() <= 1, name
        for mask, mask_too in zip(one[name].masks or (), two[name].masks or (), strict=True):
            assert np.array_equal(mask[inside], mask_too[inside]), name
