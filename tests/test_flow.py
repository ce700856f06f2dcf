"""One image on its way through `pipeline/flow.py`: which noise it gets, and what is never handed out."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import Editor
from pipeline.editing.ledits_pp import LEditsPP
from pipeline.errors import EditError, InvertError
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.recipe import recipe_from
from pipeline.rewards.closed_form import MaskedColor
from tests.methods import tiny_sd

EDITING = {"method": "diffedit", "mask_thresholding_ratio": 2.0}
PICTURE = (np.random.default_rng(0).random((40, 56, 3)) * 255).astype(np.uint8)


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=repr)
def test_values_that_are_not_finite_fail_their_stage(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(make: Any) -> Any:
        def run(*given: Any) -> Any:
            made = yield from make(*given)
            latents = made.latents.clone()
            latents.view(-1)[0] = value
            return dataclasses.replace(made, latents=latents)

        return run

    editor = Editor.load("analytic")
    for method, name, error in ((LEditsPP, "edit", EditError), (DDPMInversion, "invert", InvertError)):
        monkeypatch.setattr(method, name, spoilt(getattr(method, name)))
        with pytest.raises(error, match="gave values that are not finite"):
            editor.edit(PICTURE, "hat", inversion={"method": "ddpm", "num_steps": 2})


def test_the_noise_of_an_editor_is_the_same_after_any_inversion() -> None:
    recipe = recipe_from(
        {
            "source": {"shards": "-"},
            "edits": {"dog": {"target_prompt": "a dog"}},
            "model": {"size": 64},
            "methods": {
                name: {"inversion": {"method": name, "num_steps": 2}, "editing": EDITING} for name in ("ddim", "direct")
            },
            "sink": {"folder": "-"},
        }
    )
    one, other = (np.asarray(result.mask) for result in Editor(tiny_sd()).edit_many(PICTURE, recipe))
    assert 0 < one.mean() < 1
    np.testing.assert_array_equal(one, other)


def test_a_reward_reads_the_rows_mask_pixel_by_pixel_and_not_by_cells_of_latents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, loss = [], MaskedColor.loss

    def noting(reward: MaskedColor, pixels: torch.Tensor, sample: Any) -> torch.Tensor:
        seen.append(sample.mask)
        return loss(reward, pixels, sample)

    monkeypatch.setattr(MaskedColor, "loss", noting)
    stripes = np.zeros((64, 64), dtype=bool)
    stripes[:, ::2] = True
    Editor.load("analytic").edit(
        (np.random.default_rng(0).random((64, 64, 3)) * 255).astype(np.uint8),
        rewards=[{"method": "masked_color", "color": [0, 200, 0]}],
        inversion={"method": "ddim", "num_steps": 2},
        editing={"method": "h_edit", "user_mask": "rewards"},
        mask=stripes,
        size=64,
    )
    assert len(seen) == 2
    assert all(torch.equal(mask, torch.from_numpy(stripes).float()) for mask in seen)
