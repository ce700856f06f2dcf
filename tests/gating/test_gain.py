"""How much better a model explains a result by its target text: against algebra, and as a figure of runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.diffusion.levels import Level, Prediction
from pipeline.engine.backbone import Backbone, Offers
from pipeline.engine.calls import Denoise, Denoised, Fork
from pipeline.engine.engine import Engine
from pipeline.errors import EditError, RecipeError
from pipeline.gating.gain import NOISES, SHARES, denoise_gain, levels_near, region_of, with_gains
from pipeline.inversion.base import draw_from
from pipeline.looking.counting import RowCounter
from pipeline.looking.regenerate import regenerate
from pipeline.looking.runs import find_run
from pipeline.models.analytic import AnalyticBackbone
from pipeline.recipe import Recipe
from pipeline.records import Concept, EditRequest, Rejected
from pipeline.running import driver
from pipeline.settings.gain import ComparedTexts, compared_texts, gain_problems
from tests.closed_form_flow import SPREAD, ClosedFormFlow
from tests.running.test_gated_runs import checked, gated, rows
from tests.runs import write_shards
from tests.writing.test_encoding import a_result

ROWS = 2 * len(SHARES) * NOISES
TEXTS = ComparedTexts("a red ball", "a blue cup")
SIDE = 8  # of latents
REGION = torch.zeros((SIDE, SIDE))
REGION[2:6, 1:4] = 1


def models() -> list[tuple[Backbone, float]]:
    """A noise-predicting and a flow model in closed form, with the spread of their images."""
    analytic = AnalyticBackbone(dtype=torch.float64)
    return [(analytic, analytic.spread), (ClosedFormFlow(dtype=torch.float64), SPREAD)]


def mean_of(backbone: Any, text: str) -> Tensor:
    """The mean latents of a text's images."""
    if isinstance(backbone, ClosedFormFlow):
        return backbone.mean_of(text).expand(-1, SIDE, SIDE)
    return backbone.means(backbone.encode_text(text).embedding[None], SIDE, SIDE)[0]


def measured(backbone: Backbone, latents: Tensor, texts: ComparedTexts) -> float:
    draw = draw_from(7, tuple(latents.shape), latents.dtype)
    steps = denoise_gain(latents, texts, backbone.schedule, draw, REGION)
    (finished,) = Engine(backbone, call_size=5).run([steps])
    assert finished.error is None, finished.error
    assert finished.network_rows == ROWS
    return float(finished.value)


@pytest.mark.parametrize(("backbone", "spread"), models(), ids=["noise", "flow"])
def test_the_gain_is_the_difference_of_both_texts_squared_errors(backbone: Backbone, spread: float) -> None:
    latents = torch.randn((backbone.latent_channels, SIDE, SIDE), generator=torch.Generator().manual_seed(3)).double()
    draw, differences = draw_from(7, tuple(latents.shape), latents.dtype), []

    def squared_error(level: Level, noise: Tensor, mean: Tensor) -> float:
        """Of E[eps | x_t] for images from a Gaussian around a mean."""
        noised = level.signal * latents + level.noise * noise
        share = level.noise / (level.signal**2 * spread**2 + level.noise**2)
        return float((share * (noised - level.signal * mean) - noise)[:, 2:6, 1:4].square().mean())

    for level in levels_near(SHARES, backbone.schedule, latents):
        for _ in range(NOISES):
            noise = draw()
            source, target = (squared_error(level, noise, mean_of(backbone, text)) for text in TEXTS)
            differences.append(source - target)
    assert measured(backbone, latents, TEXTS) == pytest.approx(float(np.mean(differences)), rel=1e-6)


@pytest.mark.parametrize(("backbone", "spread"), models(), ids=["noise", "flow"])
def test_what_the_target_text_means_gains_and_what_the_source_text_means_loses(
    backbone: Backbone, spread: float
) -> None:
    source, target = (mean_of(backbone, text) for text in TEXTS)
    turned = ComparedTexts(TEXTS.target, TEXTS.source)
    assert measured(backbone, target, TEXTS) > 0 > measured(backbone, source, TEXTS)
    assert measured(backbone, target, turned) == pytest.approx(-measured(backbone, target, TEXTS))


def test_levels_have_the_shares_of_noise_that_are_asked_for() -> None:
    for backbone, _ in models():
        latents = torch.zeros((backbone.latent_channels, SIDE, SIDE))
        found = [level.share for level in levels_near(SHARES, backbone.schedule, latents)]
        assert found == pytest.approx(SHARES, abs=0.03)


def concept(prompt: str, **settings: Any) -> Concept:
    return Concept(prompt=prompt, **settings)


@pytest.mark.parametrize(
    ("request_", "texts"),
    [
        (EditRequest(source_prompt="a cat", target_prompt="a dog"), ("a cat", "a dog")),
        (EditRequest(target_prompt="a dog", concepts=(concept("a hat"),)), ("", "a dog")),
        (EditRequest(source_prompt="a face", concepts=(concept("a hat"),)), ("a face", "a face, a hat")),
        (
            EditRequest(
                source_prompt="a face",
                concepts=(concept("a hat"), concept("a beard", direction="remove"), concept("glasses")),
            ),
            ("a face, a beard", "a face, a hat, glasses"),
        ),
        (EditRequest(concepts=(concept("a hat", guidance_scale=-5),)), ("a hat", "")),
        (EditRequest(concepts=(concept("a hat", guidance_scale=-5, direction="remove"),)), ("", "a hat")),
        (EditRequest(concepts=(concept("a hat"), concept("mud", guidance_scale=0))), ("", "a hat")),
        (EditRequest(concepts=(concept("a hat", weight=0),)), None),
        (EditRequest(source_prompt="a cat"), None),
        (EditRequest(source_prompt="a cat", target_prompt="a cat", concepts=(concept("a hat"),)), None),
    ],
)
def test_texts_are_the_prompts_or_made_of_the_concepts(request_: EditRequest, texts: tuple[str, str] | None) -> None:
    assert compared_texts(request_) == texts


def gaining(folder: Path, out: str, least: float, **sections: Any) -> Recipe:
    return gated(folder, out, {"preset": "none", "denoise_gain": {"min": least}}, **sections)


def test_a_run_measures_it_where_a_gate_asks_for_it_and_pays_what_the_plan_says(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", shards=1, rows=2, damaged=())
    recipe, plain = (
        gaining(tmp_path, "out", 0.0),
        gated(tmp_path, "plain", {"preset": "none", "mask_share": {"min": 0}}),
    )
    summary, cheaper = driver.run(recipe, progress="off"), driver.run(plain, progress="off")
    assert summary.network_rows - cheaper.network_rows == 4 * ROWS
    assert RowCounter(recipe).rows(recipe.edits) == summary.network_rows / 2
    found = [row for kind in ("data", "rejected") for row in rows(recipe, kind)]
    assert len(found) == 4
    for row in found:
        assert (row["denoise_gain"] < 0) == (row["reject_reasons"] == ["denoise_gain"])
    assert len({row["denoise_gain"] for row in found}) == 4
    assert checked(recipe).findings == []
    assert "denoise_gain" not in rows(plain, "data")[0]
    made = regenerate(find_run(recipe.sink.folder), found[0]["id"], edit=found[0]["edit"])
    assert made.equal, made.differences


def test_attempts_meet_the_same_noise_and_the_one_that_gains_most_is_kept(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", shards=1, rows=2, damaged=())
    gates = {"preset": "none", "background_psnr": {"min": 0}}
    vary = [{"editing": {"method": "reconstruct"}}, {"editing": {"method": "reconstruct"}}]
    best = {"attempts": 3, "until": "budget", "vary": vary}
    recipe = gated(tmp_path, "out", gates, best_of=best)
    driver.run(recipe, progress="off")
    every = [row for kind in ("data", "rejected") for row in rows(recipe, kind)]
    by_result: dict[Any, list[dict[str, Any]]] = {}
    for row in sorted(every, key=lambda row: row["attempt"]):
        by_result.setdefault((row["id"], row["edit"]), []).append(row)
    for first, second, third in by_result.values():
        assert second["seed"] != third["seed"]
        assert second["denoise_gain"] == third["denoise_gain"] != first["denoise_gain"]  # the same picture twice
        assert first["chosen"] == (first["denoise_gain"] > second["denoise_gain"])


def test_an_edit_without_words_is_refused_with_the_way_out(tmp_path: Path) -> None:
    edits = {"edits": {"a": {"source_prompt": "a cat"}}, "editing": {"method": "reconstruct"}}
    with pytest.raises(RecipeError, match=r"edits.a: denoise_gain compares two texts, and this edit has no target_pro"):
        gaining(tmp_path, "out", 0.0, **edits)


def test_a_model_that_cannot_tell_texts_apart_is_refused_with_the_way_out(tmp_path: Path) -> None:
    assert list(gain_problems(Offers())) == []
    (inpainting,) = gain_problems(Offers(inputs=frozenset({"inpaint"})))
    assert "this one takes inpaint too. Set gates.denoise_gain to null" in inpainting
    recipe = gaining(tmp_path, "out", 0.0)
    with pytest.raises(RecipeError, match=r"gates: few steps: what such a model predicts is no noise"):
        recipe.refuse_what_lacks(Offers(distilled="few steps"), "turbo")


def test_a_result_is_looked_at_inside_its_masks_and_the_users_own() -> None:
    plain, latents = a_result(16), torch.zeros((4, 1, 4))
    left, even = np.arange(16)[None] < 8, np.arange(16)[None] % 2 == 0
    assert region_of(plain, latents).tolist() == [[1, 1, 1, 1]]
    assert region_of(replace(plain, masks=()), latents).tolist() == [[1, 1, 1, 1]]  # nothing was found
    assert region_of(replace(plain, masks=(left & even, left)), latents).tolist() == [[1, 1, 0, 0]]
    own = replace(plain.prepared, mask=even.astype(np.float32))
    assert region_of(replace(plain, prepared=own, masks=(left,)), latents).tolist() == [[0.5, 0.5, 0, 0]]


def test_a_result_whose_gain_is_not_finite_fails_alone() -> None:
    backbone = AnalyticBackbone()
    latents = torch.zeros((backbone.latent_channels, SIDE, SIDE))
    steps = denoise_gain(latents, TEXTS, backbone.schedule, draw_from(0, tuple(latents.shape)), REGION)
    next(steps)
    call = steps.send([backbone.encode_text(text) for text in TEXTS])
    assert isinstance(call, Denoise)
    lost = torch.full((ROWS, *latents.shape), torch.nan)
    with pytest.raises(EditError, match=r"predictions for denoise_gain are not finite"):
        steps.send(Denoised(Prediction(lost, lost), None))


def test_a_failed_gain_fails_its_result_and_no_other() -> None:
    decoded = a_result(1)
    gains = with_gains([decoded, decoded], AnalyticBackbone().schedule, 0)
    assert isinstance(next(gains), Fork)
    with pytest.raises(StopIteration) as done:
        gains.send([EditError("lost"), 0.5])
    failed, kept = done.value.value
    assert isinstance(failed, Rejected)
    assert (failed.stage, failed.message, failed.edit) == ("edit", "lost", decoded.edit)
    assert kept.denoise_gain == 0.5
