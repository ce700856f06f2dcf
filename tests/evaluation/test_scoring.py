"""Measures against independent references and by hand; rows that cannot be measured say why."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio

from pipeline.errors import RecipeError
from pipeline.evaluation.compare import compare
from pipeline.evaluation.items import Item, Result
from pipeline.evaluation.metrics_config import MetricsConfig
from pipeline.evaluation.published import overlap, truth_figures, unedited_figures, whole_figures
from pipeline.evaluation.scoring import OwnMeasures, Scored, Scorer, jpeg_roundtrip
from pipeline.evaluation.statistics import Settings
from pipeline.records import EditRequest
from pipeline.writing.rows import encode_mask, encode_png

PIE = Path(__file__).parents[1] / "golden" / "pie_mini"
CLIP, DINO = str(PIE / "models" / "clip_tiny"), str(PIE / "models" / "dino_tiny")


def noise(seed: int, side: int = 48) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    fine = rng.integers(-20, 20, (side, side, 3))
    return (coarse.repeat(8, 0).repeat(8, 1) + fine).clip(0, 255).astype(np.uint8)


def left_half(side: int = 48) -> np.ndarray:
    region = np.zeros((side, side), dtype=bool)
    region[:, : side // 2] = True
    return region


def result(made: bytes | None = None, *, region: np.ndarray | None = None, **item: Any) -> Result:
    given = {"key": "a", "image": encode_png(noise(1)), "request": EditRequest(target_prompt="a cat"), **item}
    if region is not None:
        given["region"] = encode_mask(region)
    return Result(item=Item(**given), edit="", method="m", image=made or encode_png(noise(2)))


def scored(one: Result, **config: Any) -> Scored:
    scorer = Scorer(MetricsConfig(**config))
    try:
        return scorer.score([one])[0]
    finally:
        scorer.close()


@pytest.mark.parametrize("seed", range(4))
def test_pixel_measures_agree_with_independent_references(seed):
    source, made, region = noise(seed), noise(seed + 10), np.random.default_rng(seed).random((48, 48)) < 0.3
    kept, there = (picture * ~region[..., None] / 255.0 for picture in (source, made))
    found = unedited_figures(source, made, region)
    assert found["mse_unedit_part"] == pytest.approx(np.square(kept - there).mean(), rel=1e-9)
    reference = peak_signal_noise_ratio(torch.from_numpy(there), torch.from_numpy(kept), data_range=1.0)
    assert found["psnr_unedit_part"] == pytest.approx(float(reference), abs=1e-5)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    ssim = structural_similarity(kept, there, channel_axis=2, **settings)
    assert found["ssim_unedit_part"] == pytest.approx(ssim, abs=1e-4)
    whole = structural_similarity(source / 255.0, made / 255.0, channel_axis=2, **settings)
    assert whole_figures(source, made)["ssim"] == pytest.approx(whole, abs=1e-4)


def test_a_constant_offset_outside_weighs_by_the_share_that_is_looked_at():
    source = np.full((48, 48, 3), 100, dtype=np.uint8)
    made = source.copy()
    made[:, 24:] += 10  # outside of the region
    made[:, :24] = 0  # inside: does not count
    found = unedited_figures(source, made, left_half())
    assert found["mse_unedit_part"] == pytest.approx((10 / 255) ** 2 / 2)
    assert found["psnr_unedit_part_area_normalised"] == pytest.approx(20 * np.log10(255 / 10))


def test_what_is_equal_outside_has_no_psnr_and_says_so():
    source = noise(1)
    made = source.copy()
    made[:, :24] = 0
    row = scored(result(encode_png(made), region=left_half()))
    assert (row.figures["psnr_unedit_part"], row.figures["mse_unedit_part"]) == (None, 0.0)
    assert row.figures["ssim_unedit_part"] == pytest.approx(1)
    assert "psnr_infinite" in row.notes


def test_a_full_mask_leaves_no_background_and_says_so():
    row = scored(result(region=np.ones((48, 48), dtype=bool)))
    assert row.figures["psnr_unedit_part"] is row.figures["ssim_unedit_part"] is None
    assert row.figures["mse"] is not None
    assert "full_mask" in row.notes


def test_truth_and_overlap_are_measured_inside_of_what_shall_change():
    truth, made = np.zeros((48, 48, 3), np.uint8), np.zeros((48, 48, 3), np.uint8)
    made[:, :24] = 51
    made[:, 24:] = 255
    assert truth_figures(truth, made, left_half())["truth_psnr"] == pytest.approx(20 * np.log10(5))
    assert truth_figures(truth, truth, None)["truth_psnr"] is None
    half = np.zeros((48, 48), dtype=bool)
    half[:24, :24] = True
    assert overlap(half, left_half()) == pytest.approx(0.5)
    assert overlap(None, left_half()) is None


def test_a_jpeg_pass_is_that_of_the_published_results():
    buffer = io.BytesIO()
    Image.fromarray(noise(3)).save(buffer, "JPEG")
    assert np.array_equal(jpeg_roundtrip(noise(3)), np.asarray(Image.open(buffer)))
    plain, passed = (scored(result(), jpeg_roundtrip=on).figures["mse"] for on in (False, True))
    assert plain != passed


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (result(problem="missing_image: x.jpg is not there", image=None), "missing_image"),
        (Result(item=result().item, edit="", method="m", reason="failed_edit", message="no"), "failed_edit"),
        (result(b"no image"), "broken_result"),
        (result(image=b"no image"), "broken_image"),
        (result(region=np.ones((24, 24), dtype=bool)), "region_size"),
        (result(truth=encode_png(noise(1, 24))), "truth_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_that_cannot_be_measured_has_a_reason_and_no_number(one, reason):
    row = scored(one)
    assert (row.reason, dict(row.figures)) == (reason, {})


def test_another_size_is_scaled_and_noted_or_refused_where_a_benchmark_fixes_it():
    small = encode_png(noise(2, 24))
    assert "result_scaled" in scored(result(small)).notes
    scorer = Scorer(MetricsConfig(), size=48)
    (row,) = scorer.score([result(small)])
    assert row.reason == "result_size"
    strip = np.concatenate([noise(7), noise(8), noise(2)], axis=1)
    (row,) = scorer.score([result(encode_png(strip))])
    assert dict(row.figures) == dict(scored(result()).figures), "the last panel is the result"


def test_models_see_the_same_in_any_company_and_a_long_prompt_still_counts():
    config = {"clip": CLIP, "dino": DINO, "dinov2": DINO}
    long = EditRequest(source_prompt="a dog", target_prompt="cat " * 90)
    one, other = result(key="a", request=long), result(key="b", image=encode_png(noise(5)))
    alone = scored(one, **config)
    scorer = Scorer(MetricsConfig(**config))
    together = scorer.score([other, one, other])[1]
    assert together.figures == pytest.approx(dict(alone.figures), abs=1e-5, nan_ok=False)
    assert "clip_text_truncated" in alone.notes
    cut = scored(result(request=EditRequest(source_prompt="a dog", target_prompt="house " * 90)), **config)
    assert cut.figures["clip_sim_1"] != pytest.approx(alone.figures["clip_sim_1"], abs=1e-4), "the text is read"
    same = scored(result(encode_png(noise(1))), **config)
    assert same.figures["structure_distance"] == pytest.approx(0, abs=1e-9)
    assert same.figures["dinov2_sim"] == pytest.approx(1)
    assert same.figures["clip_sim_dir"] is None


def test_a_measure_whose_model_is_missing_is_unavailable_and_never_a_number(tmp_path):
    scorer = Scorer(MetricsConfig(dino=str(tmp_path / "nowhere"), lpips=True))
    (row,) = scorer.score([result(region=left_half())])
    assert row.figures.get("structure_distance") is row.figures.get("lpips_unedit_part") is None
    assert "no folder here" in scorer.unavailable["structure_distance"]
    assert "torchvision" in scorer.unavailable["lpips_unedit_part"]


class Odd(OwnMeasures):
    directions: Mapping[str, bool | None] = {"green": True, "odd": None}

    def measure(self, item, source, result, mask):
        return {"green": float(result[..., 1].mean()), "odd": float("nan")}


def test_a_measure_of_ones_own_counts_and_what_is_no_number_is_null():
    row = scored(result(), own=[f"{__name__}:Odd"])
    assert row.figures["green"] == pytest.approx(noise(2)[..., 1].mean())
    assert row.figures["odd"] is None
    assert "not_finite:odd" in row.notes
    with pytest.raises(RecipeError, match="gives no measures"):
        scored(result(), own=["nowhere.at_all:x"])


def test_lists_of_images_are_compared_from_python():
    items = [
        Item(key=str(at), image=encode_png(noise(at)), request=EditRequest(), region=encode_mask(left_half()))
        for at in range(12)
    ]
    near = [np.clip(noise(at).astype(int) + 2, 0, 255).astype(np.uint8) for at in range(12)]
    far: list[Any] = [noise(at + 50) for at in range(12)]
    far[3], far[4] = None, np.full((48, 48, 3), np.nan)
    tables = compare(items, {"near": near, "far": far}, settings=Settings(resamples=199))
    assert tables.reasons == {"near": {}, "far": {"broken_result": 1, "missing_result": 1}}
    line = tables.lines["psnr_unedit_part"]
    assert (line["near"].own.n, line["near"].common.n, line["far"].own.n) == (12, 10, 10)
    assert line["near"].common.mean_of_items > line["far"].common.mean_of_items
    (pair,) = tables.pairs["psnr_unedit_part"]
    assert (pair.n, pair.wins, pair.losses) == (10, 10, 0)
    with pytest.raises(ValueError, match="has 1 pictures for 12"):
        compare(items, {"short": near[:1]})
