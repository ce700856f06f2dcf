"""A result that is black all over has failed, as one that is not finite has; a black input may stay black."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.engine.engine import Engine
from pipeline.flow import edit_rows
from pipeline.models.analytic import AnalyticBackbone
from pipeline.reading.prepare import HERE
from pipeline.reading.requests import asked_of
from pipeline.recipe import Recipe, recipe_from
from pipeline.records import Decoded, Rejected
from pipeline.samples import Sample
from tests.runs import recipe_data


class BlackingBackbone(AnalyticBackbone):
    """Decodes every edit to black, as a half-precision decoder does that overflows; the round trip comes first."""

    decoded = 0

    def decode_latents(self, latents: Tensor) -> Tensor:
        self.decoded += 1
        pixels = super().decode_latents(latents)
        return pixels if self.decoded == 1 else torch.zeros_like(pixels)


@pytest.fixture
def recipe() -> Recipe:
    return recipe_from(recipe_data("in", "out", engine="local"))


def edited(recipe: Recipe, level: int) -> list[Decoded | Rejected]:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (level,) * 3).save(buffer, "PNG")
    row = Sample(id="s/one", shard="s", key="one", index=0, image=buffer.getvalue())
    return list(edit_rows([asked_of(row, recipe)], recipe, Engine(BlackingBackbone(32), call_size=4), HERE))


def test_a_black_result_is_rejected_with_a_class_and_a_reason_of_its_own(recipe: Recipe) -> None:
    results = edited(recipe, 120)
    assert [type(one) for one in results] == [Rejected, Rejected]
    for one in results:
        assert isinstance(one, Rejected)
        assert (one.stage, one.error_class) == ("edit", "BlackImageError")
        assert "black all over" in one.message


@pytest.mark.parametrize("level", [0, 2])  # 2: black as a JPEG may hold it
def test_an_image_that_was_black_may_stay_black(recipe: Recipe, level: int) -> None:
    assert [type(one) for one in edited(recipe, level)] == [Decoded, Decoded]
