"""Regions that an edit finds for itself: two classes of values; and masks with a soft edge."""

from __future__ import annotations

import pytest
import torch

from pipeline.diffusion.masks import above_otsu, blended, otsu_threshold, softly_eroded, with_soft_edge


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_divides_values_so_that_the_classes_lie_furthest_apart(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([torch.randn(90, generator=generator), torch.randn(10, generator=generator) + 6.0]).double()

    def between(threshold: float) -> float:
        low, high = values[values <= threshold], values[values > threshold]
        return float(len(low) * len(high) * (high.mean() - low.mean()) ** 2) if len(low) and len(high) else 0.0

    best = max(between(float(value)) for value in values)
    assert between(otsu_threshold(values)) == pytest.approx(best)


def test_of_equal_values_nothing_lies_above() -> None:
    assert not above_otsu(torch.full((2, 4, 4), 0.3)).any()
    assert not above_otsu(torch.zeros((1, 1, 1))).any()


def test_the_classes_are_the_images_and_hold_in_its_padding_too() -> None:
    scores = torch.zeros((1, 4, 8))
    scores[0, :, 2:4] = 1.0
    scores[0, :, 6:] = 9.0  # padding, which would have been the upper class
    inside = above_otsu(scores, lambda maps: maps[..., :6])
    assert inside[0, 0].tolist() == [False, False, True, True, False, False, True, True]


def test_a_soft_edge_is_one_in_the_mask_and_nothing_beyond_two_radii() -> None:
    mask = torch.zeros((40, 40), dtype=torch.bool)
    mask[:, 20:24] = True
    soft = with_soft_edge(mask, 4)
    assert (soft[:, 20:24] == 1).all(), "all of the mask is the edit's, at the border of the picture, too"
    assert (soft[:, :12] == 0).all()
    assert (soft[:, 32:] == 0).all()
    assert (soft[20, 11:21].diff() > 0).all()
    assert not with_soft_edge(torch.zeros_like(mask), 4).any()
    over, under = (torch.full((40, 40, 3), value, dtype=torch.uint8) for value in (200, 100))
    assert torch.equal(blended(over, under, soft)[20, :, 0], (100 + 100 * soft[20]).round().to(torch.uint8))


def test_a_softly_eroded_mask_lies_inside_is_one_in_the_middle_and_falls_off() -> None:
    mask = torch.zeros((48, 48))
    mask[6:42, 6:42] = 1.0
    soft = softly_eroded(mask)
    assert float(soft.min()) >= 0.0
    assert float(soft.max()) == 1.0
    assert float(soft[24, 24]) == 1.0
    assert (soft <= mask).all()
    assert float(soft[24, 6]) < 0.6
    assert (soft[24, 6:24].diff() >= 0).all()
    once = softly_eroded(mask, passes=1, threshold=1.1)  # one mean, scaled by its largest value
    assert float(once[24, 24]) == pytest.approx(1.0)
    assert float(once[24, 6]) > float(soft[24, 6])
