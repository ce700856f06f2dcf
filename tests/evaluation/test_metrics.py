"""The figures of a result, against torchmetrics and against algebra."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from pipeline.evaluation.metrics import MAX_PSNR, NAMES, changes, figures, ssim_map


@pytest.fixture
def picture() -> np.ndarray:
    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.normal(size=(48, 61, 3)), axis=0), axis=1)
    smooth = (smooth - smooth.min()) / np.ptp(smooth) * 255
    return smooth.astype(np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((48, 61), dtype=bool)
    mask[10:30, 20:50] = True
    return mask


def noisy(picture: np.ndarray, amount: int = 9) -> np.ndarray:
    noise = np.random.default_rng(1).integers(-amount, amount + 1, picture.shape)
    return np.clip(picture.astype(int) + noise, 0, 255).astype(np.uint8)


def test_the_similarity_map_is_that_of_torchmetrics(picture):
    edited = noisy(picture)
    _, expected = structural_similarity_index_measure(
        torch.from_numpy(picture).permute(2, 0, 1)[None].double(),
        torch.from_numpy(edited).permute(2, 0, 1)[None].double(),
        data_range=255.0,
        return_full_image=True,
    )
    ours = np.stack([ssim_map(picture[..., c], edited[..., c]) for c in range(3)], axis=-1)
    np.testing.assert_allclose(ours, expected[0, :, 5:-5, 5:-5].permute(1, 2, 0).numpy(), atol=1e-4)


def test_without_a_mask_there_is_no_background_but_a_figure_of_the_whole_image(picture):
    edited = noisy(picture)
    found = figures(picture, None, edited, None)
    expected = peak_signal_noise_ratio(
        torch.from_numpy(edited.astype(np.float32)), torch.from_numpy(picture.astype(np.float32)), data_range=255.0
    )
    assert found["image_psnr"] == pytest.approx(float(expected), abs=1e-4)
    assert {name for name, value in found.items() if value is not None} == {"image_psnr"}


def test_what_happens_inside_the_mask_leaves_the_background_figures_alone(picture, mask):
    edited = picture.copy()
    edited[mask] = 255 - edited[mask]
    found = figures(picture, picture, edited, mask)
    assert found["background_psnr"] == MAX_PSNR
    assert found["background_ssim"] == pytest.approx(1.0, abs=1e-6)
    assert found["reconstruction_psnr"] == MAX_PSNR
    assert found["mask_share"] == pytest.approx(20 * 30 / (48 * 61))
    change = np.sort(np.abs(picture[mask].astype(int) - edited[mask]).mean(axis=1))
    assert found["edit_change"] == pytest.approx(change[-6:].mean()), "a hundredth of the mask's 600 pixels"
    assert found["rest_change"] == 0.0


def test_a_change_outside_the_mask_lowers_the_background_figures(picture, mask):
    edited = np.where(mask[..., None], picture, noisy(picture))
    found = figures(picture, picture, edited, mask)
    assert found["edit_change"] == 0.0
    outside = np.abs(picture[~mask].astype(int) - edited[~mask]).mean()
    assert found["rest_change"] == pytest.approx(outside)
    assert found["background_psnr"] is not None
    assert 30 < found["background_psnr"] < 40
    assert found["background_ssim"] is not None
    assert found["background_ssim"] < 0.999


def test_an_image_that_is_looked_at_in_bands_has_the_same_figures(picture, mask, monkeypatch):
    whole = figures(picture, noisy(picture, 3), noisy(picture), mask)
    monkeypatch.setattr("pipeline.evaluation.metrics.BAND_VALUES", 7 * 3 * picture.shape[1])  # of seven rows
    assert figures(picture, noisy(picture, 3), noisy(picture), mask) == pytest.approx(whole, rel=1e-6)


def test_a_mask_over_everything_leaves_no_background_to_judge(picture):
    found = figures(picture, picture, noisy(picture), np.ones(picture.shape[:2], dtype=bool))
    assert found["background_psnr"] is None
    assert found["background_ssim"] is None
    assert found["rest_change"] is None
    assert found["edit_change"] is not None


def test_what_the_autoencoder_loses_is_neither_an_edit_nor_harm(picture, mask):
    round_trip = noisy(picture)
    for where in (mask, None):
        found = changes(round_trip, round_trip, where)
        assert found == {"edit_change": 0.0, "rest_change": 0.0}
    assert figures(picture, round_trip, round_trip, mask)["background_psnr"] < 40


def test_a_small_edit_stands_out_from_an_error_that_is_spread_everywhere(picture):
    """Means of all pixels would rank the error above the edit."""
    error, edit = picture.astype(int), picture.copy()
    error = np.clip(error + np.where(error > 127, -4, 4), 0, 255).astype(np.uint8)
    edit[10:18, 10:18] = np.where(edit[10:18, 10:18] > 127, 0, 255)
    assert np.abs(edit.astype(int) - picture).mean() < np.abs(error.astype(int) - picture).mean()
    spread, local = changes(picture, error, None), changes(picture, edit, None)
    assert (spread["edit_change"], spread["rest_change"]) == (4.0, 4.0)
    assert local["edit_change"] > 50
    assert local["rest_change"] == 0.0


@pytest.mark.parametrize("size", [(1, 1), (10, 40), (40, 10), (11, 11)])
def test_small_images_have_figures_too(size):
    image = np.full((*size, 3), 7, dtype=np.uint8)
    found = figures(image, image, image, np.zeros(size, dtype=bool))
    assert found["background_psnr"] == MAX_PSNR
    assert (found["background_ssim"] is None) == (min(size) < 11)


def test_figures_are_json_numbers_under_their_announced_names(picture, mask):
    found = figures(picture, noisy(picture), noisy(picture), mask)
    assert tuple(found) == NAMES
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_picture_of_512_pixels_costs_little():
    rng = np.random.default_rng(2)
    picture = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    mask = np.zeros((512, 512), dtype=bool)
    mask[100:300, 100:300] = True
    seconds = []
    for _ in range(5):
        start = time.process_time()
        figures(picture, picture, picture, mask)
        seconds.append(time.process_time() - start)
    # About 0.03 s of one core; the bound leaves room for a busy machine and still tells a slow window (0.3 s) apart.
    assert min(seconds) < 0.15
