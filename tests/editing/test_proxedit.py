"""ProxEdit and ProxMasaCtrl: the operators, what they leave of an edit, pulling back, counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline import compat
from pipeline.diffusion.steps import DDIM
from pipeline.editing.prompt_to_prompt import PromptToPrompt
from pipeline.editing.prox_masactrl import ProxMasaCtrl
from pipeline.editing.proxedit import ProxEdit, proximal, threshold_of
from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.calls import NetworkCall
from pipeline.engine.engine import Engine
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.inversion.negative_prompt import NegativePromptInversion
from pipeline.inversion.null_text import NullTextInversion
from pipeline.records import EditedLatents, EditRequest, Trajectory
from tests.facts import EditorFacts
from tests.methods import BACKBONES, analytic, invert_and_edit, rows_of_edit, source, tiny_sd

FACTS = EditorFacts(rows=4, rows_after={"negative_prompt": 3}, unguided={"prox": "none"}, finds_region=True)
N = 4
CAT, DOG = "a photo of a cat on grass", "a photo of a dog on grass"
NPI = NegativePromptInversion(num_steps=N)
HUGE = -50.0  # as a quantile: a fixed threshold that nothing exceeds
every_backbone = pytest.mark.parametrize(
    "backbone", [make(torch.float64) for make in BACKBONES.values()], ids=list(BACKBONES)
)


def edit(
    editor: Any, backbone: Any = None, target: str = DOG, inversion: Any = NPI
) -> tuple[Trajectory, EditedLatents, int]:
    backbone = tiny_sd(torch.float64) if backbone is None else backbone
    engine = Engine(backbone, call_size=8)
    generator = invert_and_edit(
        source(backbone, 1, CAT), EditRequest(target_prompt=target), inversion, editor, observe=True
    )
    trajectory, edited = engine.run_one(generator)
    return trajectory, edited, engine.stats.network_rows


def test_soft_shrinks_hard_drops_and_the_published_l1_turns_signs() -> None:
    delta = torch.tensor([-3.0, -1.5, -0.5, 0.0, 0.5, 1.5, 3.0])[:, None, None]
    assert proximal(delta, 1.0, "soft").flatten().tolist() == [-2.0, -0.5, 0.0, 0.0, 0.0, 0.5, 2.0]
    assert proximal(delta, 1.0, "hard").flatten().tolist() == [-3.0, -1.5, 0.0, 0.0, 0.0, 1.5, 3.0]
    assert proximal(delta, 1.0, "l1_compat").flatten().tolist() == [-1.0, 0.5, 0.0, 0.0, 0.0, 0.5, 1.0]
    assert torch.equal(proximal(delta, 1.0, "none"), delta)


def test_the_threshold_is_a_quantile_of_source_and_target_together_or_fixed() -> None:
    deltas = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    left = proximal(deltas, threshold_of(deltas, 0.7), "soft")
    assert (left == 0).double().mean() == pytest.approx(0.7, abs=0.005)
    assert threshold_of(deltas, -0.05) == 0.05
    deltas[0] = 0.0  # as after negative-prompt inversion: 0.75 of both is half of the target
    left = proximal(deltas, threshold_of(deltas, 0.75), "soft")
    assert (left[1] == 0).double().mean() == pytest.approx(0.5, abs=0.005)


@every_backbone
@pytest.mark.parametrize("prox", ["soft", "hard", "none"])
def test_a_threshold_of_zero_is_prompt_to_prompt(backbone: Any, prox: Any) -> None:
    _, plain, _ = edit(PromptToPrompt(guidance_scale=2.0), backbone)
    _, ours, _ = edit(ProxEdit(guidance_scale=2.0, prox=prox, quantile=0.0), backbone)
    assert torch.equal(ours.latents, plain.latents)


@every_backbone
@pytest.mark.parametrize("prox", ["soft", "hard"])
def test_where_nothing_is_left_of_the_direction_the_target_is_the_source(backbone: Any, prox: Any) -> None:
    _, edited, _ = edit(ProxEdit(prox=prox, quantile=HUGE), backbone)
    for record in edited.history:
        assert record.source_latents is not None
        torch.testing.assert_close(record.latents, record.source_latents)
    assert edited.masks.shape == (1, 12, 12)
    assert not edited.mask.any()


def test_a_target_with_the_sources_prompt_is_the_reconstruction() -> None:
    _, rebuilt, _ = edit(Reconstruct())
    _, edited, _ = edit(ProxEdit(), target=CAT)
    torch.testing.assert_close(edited.latents, rebuilt.latents, atol=1e-9, rtol=1e-9)


@every_backbone
def test_pulled_all_the_way_the_latents_are_the_trajectorys_bit_for_bit(backbone: Any) -> None:
    editor = ProxEdit(quantile=HUGE, use_inversion_guidance=True, recon_lr=1.0, recon_t=1000)
    trajectory, edited, _ = edit(editor, backbone)
    for record in edited.history:
        assert torch.equal(record.latents, trajectory.latents[record.step + 1])
    assert torch.equal(edited.latents, trajectory.latents[-1])


def test_latents_are_pulled_back_outside_of_the_edit_mask_alone() -> None:
    editor = ProxEdit(
        guidance_scale=2.0, quantile=0.9, use_inversion_guidance=True, recon_lr=1.0, recon_t=1000, dilate_mask=0
    )
    trajectory, edited, _ = edit(editor, analytic(torch.float64))
    record = edited.history[0]
    outside = ~record.details["edit_mask"][1]
    assert outside.any()
    assert torch.equal(record.latents[outside], trajectory.latents[1][outside])
    assert (record.latents[~outside] != trajectory.latents[1][~outside]).all()
    assert torch.equal(record.masks[0], ~outside.all(dim=0))


def test_dilation_widens_the_edit_mask_by_its_radius() -> None:
    sharp, wide = (
        edit(ProxEdit(guidance_scale=2.0, quantile=0.9, dilate_mask=radius), analytic())[1].history[0].details
        for radius in (0, 2)
    )
    places = sharp["edit_mask"][1].nonzero()
    expected = torch.zeros_like(sharp["edit_mask"][1])
    for channel, row, column in places.tolist():
        expected[channel, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3] = True
    assert torch.equal(wide["edit_mask"][1], expected)


def test_reconstruction_guidance_pulls_the_predicted_image_and_not_the_direction() -> None:
    backbone: Any = analytic(torch.float64)
    editor = ProxEdit(quantile=HUGE, use_reconstruction_guidance=True, recon_lr=0.2, recon_t=600)
    trajectory, edited, _ = edit(editor, backbone)
    assert isinstance(trajectory.solver, DDIM)
    prompt, latents = backbone.encode_text(CAT), trajectory.latents[0]
    for step, (start, end) in enumerate(trajectory.solver.steps):
        noise_pred = backbone.denoise(NetworkCall(latents[None], [start], [prompt])).predictions.noise[0]
        a, b = start.signal**2, end.signal**2
        image = (latents - math.sqrt(1 - a) * noise_pred) / math.sqrt(a)
        if start.timestep < 600:
            image = image - 0.2 * (image - trajectory.latents[-1])
        latents = math.sqrt(b) * image + math.sqrt(1 - b) * noise_pred
        torch.testing.assert_close(edited.history[step].latents, latents)
        torch.testing.assert_close(edited.history[step].source_latents, latents)


@pytest.mark.parametrize(
    ("recon_t", "pulled"),
    [(400, [1, 399]), (-400, [401, 981]), (1000, [1, 399, 400, 401, 981]), (0, [])],
)
def test_the_sign_of_recon_t_says_which_side_is_pulled(recon_t: int, pulled: list[int]) -> None:
    editor = ProxEdit(use_inversion_guidance=True, recon_t=recon_t)
    assert [timestep for timestep in (1, 399, 400, 401, 981) if editor.pulls(timestep)] == pulled
    assert not ProxEdit(recon_t=recon_t).pulls(1)


@pytest.mark.parametrize(
    ("inversion", "quantile", "rows"),
    [
        (NPI, 0.7, 3 * 2 + 2 * 2),  # the source's rows end with the windows
        (DirectInversion(num_steps=N), 0.7, 3 * 2 + 2 * 2),
        (DDIMInversion(num_steps=N), 0.7, 4 * 4),  # its direction is part of every quantile
        (DDIMInversion(num_steps=N), -0.1, 4 * 2 + 2 * 2),
        (NullTextInversion(num_steps=N, num_inner_steps=0), 0.7, 4 * 4),
    ],
)
def test_the_source_has_rows_only_where_they_are_read(inversion: Any, quantile: float, rows: int) -> None:
    assert rows_of_edit(inversion, ProxEdit(quantile=quantile), EditRequest(target_prompt=DOG), CAT) == rows


def test_looking_at_every_step_changes_no_edit() -> None:
    for inversion in (NPI, DDIMInversion(num_steps=N), DirectInversion(num_steps=N, offset_scale=0.5)):
        generator = invert_and_edit(
            source(analytic(), 1, CAT), EditRequest(target_prompt=DOG), inversion, ProxEdit(guidance_scale=2.0)
        )
        _, short = Engine(analytic(), call_size=8).run_one(generator)
        _, whole, _ = edit(ProxEdit(guidance_scale=2.0), analytic(), inversion=inversion)
        assert torch.equal(short.latents, whole.latents)


def test_an_edit_has_the_same_bits_beside_other_edits() -> None:
    editors = [ProxEdit(guidance_scale=2.0), ProxEdit(guidance_scale=5.0, prox="hard"), ProxMasaCtrl()]

    def run(number: int) -> Any:
        generators = [
            invert_and_edit(source(tiny_sd(), at, CAT), EditRequest(target_prompt=DOG), NPI, editor)
            for at, editor in enumerate(editors[:number])
        ]
        finished = Engine(tiny_sd(), call_size=8).run(generators)
        return next(one.value[1].latents for one in finished if one.index == 0)

    assert torch.equal(run(1), run(3))


def test_the_published_names_are_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    compat._note_published_name.cache_clear()
    assert [ProxEdit(prox="l0").prox, ProxEdit(prox="l0").prox, ProxMasaCtrl(prox="l1").prox] == [
        "soft",
        "soft",
        "l1_compat",
    ]
    assert [record.getMessage().split(" is ")[0] for record in caplog.records] == ["prox: l0", "prox: l1"]


def test_settings_that_would_not_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="Input should be 'none', 'soft', 'hard' or 'l1_compat'"):
        ProxEdit(prox=["l0"])
    with pytest.raises(ValueError, match="prox is none"):
        ProxEdit(prox="none", use_inversion_guidance=True)
    for editor in (ProxEdit, ProxMasaCtrl):
        with pytest.raises(ValueError, match="at guidance_scale 1 there is no direction"):
            editor(guidance_scale=1.0)
        assert editor(guidance_scale=1.0, prox="none").prox == "none"
