"""The smallest canvases and the longest: attention fields of one cell in a row, and every method works on them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.diffusion.masks import smooth_attention
from pipeline.engine.engine import Engine
from pipeline.flow import edit_row
from pipeline.reading.prepare import HERE
from pipeline.reading.requests import asked_of
from pipeline.recipe import recipe_from
from pipeline.records import Edited
from pipeline.samples import Sample
from pipeline.writing.restoring import outcome_of
from tests.facts import editor_facts
from tests.methods import tiny_sd
from tests.test_every_pair import PAIRS, REQUEST

SETTINGS: dict[str, dict[str, Any]] = {editor: {"method": editor, **editor_facts(editor).quick} for _, editor in PAIRS}
SETTINGS |= {
    "masactrl_auto": {"method": "masactrl", "start_step": 1, "mask": "auto"},
    "diffedit": {"method": "diffedit", "num_maps": 2},
    "fast_diffedit": {"method": "fast_diffedit", "num_maps": 2},
    "flow_edit": {"method": "flow_edit", "n_max": 2},
}


@pytest.mark.parametrize(
    ("size", "fit", "shape"),
    [
        (32, "pad", (40, 56)),  # latents of 4 x 4, a field of one cell
        (64, "pad", (4, 90)),  # the image is thinner than a cell of the field
        (64, "bucket", (16, 256)),  # latents of 4 x 32
        (64, "bucket", (256, 16)),
    ],
)
def test_every_method_works_on_the_smallest_and_the_longest_canvas(size: int, fit: str, shape: tuple[int, int]) -> None:
    inversions = {editor: name for name, editor in reversed(PAIRS) if name != "null_text"}
    recipe = recipe_from(
        {
            "source": {"shards": "-"},
            "edits": REQUEST.model_dump(exclude_unset=True),
            "model": {"size": size, "fit": fit},
            "methods": {
                name: {"inversion": {"method": inversions[editing["method"]], "num_steps": 2}, "editing": editing}
                for name, editing in SETTINGS.items()
            },
            "sink": {"folder": "-"},
        }
    )
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)).save(out, "PNG")
    sample = Sample(id="a", shard="", key="a", index=0, image=out.getvalue())
    results = [
        outcome_of(one)
        for one in Engine(tiny_sd(), call_size=16).run_one(edit_row(asked_of(sample, recipe), recipe, tiny_sd(), HERE))
    ]
    assert {one.method for one in results} == set(SETTINGS)
    for one in results:
        assert isinstance(one, Edited), one
        assert one.image.shape == (*shape, 3)


def test_a_field_of_one_row_is_blurred_along_it() -> None:
    row = torch.rand((2, 1, 7), generator=torch.Generator().manual_seed(0))
    tall = row.expand(2, 5, 7)
    torch.testing.assert_close(smooth_attention(row), smooth_attention(tall)[:, :1])
    torch.testing.assert_close(smooth_attention(row.mT), smooth_attention(row).mT)
    torch.testing.assert_close(smooth_attention(row[:, :, :1]), row[:, :, :1])
