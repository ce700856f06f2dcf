"""Rewards: gradients by algebra, what each measures, and networks loaded from a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from pipeline.engine.calls import DecodeGradient
from pipeline.engine.engine import Engine
from pipeline.errors import ModelError, PrepareError
from pipeline.models.reward_networks import OWN, network, weights_problem
from pipeline.models.reward_networks import picture as reference
from pipeline.rewards import REWARDS, RewardSample
from pipeline.rewards.closed_form import Downsampling, GaussianBlur, MaskedColor, Masking, gaussian_blur
from pipeline.rewards.gram import RandomGram
from pipeline.rewards.learned import ClipGram, FaceIdentity, Likeness
from tests.methods import analytic, image_latents, tiny_sd

SIDE = 32


def picture(seed: int, side: int = SIDE) -> Tensor:
    return torch.rand((3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def sample(**parts: Any) -> RewardSample:
    return RewardSample(**{"image": picture(1), **parts})


def half_mask() -> Tensor:
    mask = torch.zeros((SIDE, SIDE), dtype=torch.float64)
    mask[:, : SIDE // 2] = 1.0
    return mask


def test_a_colours_gradient_is_the_distance_inside_the_mask() -> None:
    pixels = picture(2)
    loss, gradient = MaskedColor(color=(255, 0, 127)).value_and_grad(pixels, sample(mask=half_mask()))
    color = torch.tensor([1.0, -1.0, 127 / 127.5 - 1.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(gradient, (pixels - color) * half_mask())
    torch.testing.assert_close(loss, 0.5 * ((pixels - color).square() * half_mask()).sum())


def test_a_clean_picture_that_was_degraded_has_no_loss_and_another_one_has() -> None:
    clean, mask = picture(3), half_mask()
    blurred = gaussian_blur(clean, 2.0)
    small = torch.nn.functional.avg_pool2d(clean[None], 4)
    enlarged = torch.nn.functional.interpolate(small, scale_factor=4.0)[0]
    filled = torch.where(mask > 0, torch.zeros_like(clean), clean)
    for reward, seen in (
        (GaussianBlur(sigma=2.0), blurred),
        (GaussianBlur(sigma=2.0, observed="degraded"), clean),
        (Downsampling(factor=4), enlarged),
        (Masking(), filled),
    ):
        given = sample(image=seen, mask=mask)
        loss, gradient = reward.value_and_grad(clean, given)
        assert float(loss) < 1e-20
        assert gradient.abs().max() < 1e-10
        assert float(reward.value_and_grad(picture(4), given)[0]) > 1.0


def test_masking_pulls_outside_the_mask_alone() -> None:
    _, gradient = Masking().value_and_grad(picture(5), sample(mask=half_mask()))
    assert (gradient[..., : SIDE // 2] == 0).all()
    assert (gradient[..., SIDE // 2 :] != 0).all()


def test_a_blur_keeps_the_mean_and_an_even_picture() -> None:
    even = torch.full((3, 9, 9), 0.3, dtype=torch.float64)
    torch.testing.assert_close(gaussian_blur(even, 3.0), even)
    spike = torch.zeros((3, 33, 33), dtype=torch.float64)
    spike[:, 16, 16] = 1.0
    blurred = gaussian_blur(spike, 2.0)
    assert float(blurred.sum()) == pytest.approx(3.0)
    assert float(blurred[0, 16, 16]) == pytest.approx(1 / (2 * torch.pi * 4), rel=0.02)


def test_a_style_is_known_wherever_it_stands_and_tells_pictures_apart() -> None:
    style = picture(6)
    given = sample(reference=style)
    reward = RandomGram(reference="style")
    same, shifted = (float(reward.value_and_grad(one, given)[0]) for one in (style, style.roll(8, dims=2)))
    other = float(reward.value_and_grad(picture(7) * 0.3, given)[0])
    assert same == 0.0
    assert shifted < 0.1 * other


@pytest.mark.parametrize("name", [name for name, one in REWARDS.items() if not one.learned])
def test_gradients_are_the_slopes_of_their_losses(name: str) -> None:
    settings = {"masked_color": {"color": (3, 70, 250)}, "random_gram": {"reference": "style"}}
    reward = REWARDS[name](method=name, **settings.get(name, {}))
    given, pixels, towards = sample(mask=half_mask(), reference=picture(8)), picture(9), picture(10) * 1e-4
    _, gradient = reward.value_and_grad(pixels, given)
    up, down = (float(reward.value_and_grad(pixels + sign * towards, given)[0]) for sign in (1, -1))
    assert up - down == pytest.approx(2 * float((gradient * towards).sum()), rel=1e-3)


def test_a_quadratic_loss_of_pixels_reaches_the_latents_through_the_decoder() -> None:
    """On the closed-form model, whose decoder only moves numbers about."""
    backbone = analytic(torch.float64)
    latents, goal = image_latents(backbone, 1), image_latents(backbone, 2)
    engine = Engine(backbone)

    def ask() -> Any:
        wanted = torch.nn.functional.pixel_shuffle(goal, backbone.latent_scale)
        return (yield DecodeGradient(latents, lambda pixels: (0.5 * (pixels - wanted).square().sum(), pixels - wanted)))

    valued = engine.run_one(ask())
    torch.testing.assert_close(valued.gradient, latents - goal)
    assert valued.value == pytest.approx(0.5 * float((latents - goal).square().sum()))


def test_a_real_decoders_gradient_is_the_slope_of_what_it_decodes() -> None:
    backbone: Any = tiny_sd(torch.float64)
    latents, towards = image_latents(backbone, 1), image_latents(backbone, 2) * 1e-5
    engine, given = Engine(backbone), sample(image=torch.zeros((3, 96, 96), dtype=torch.float64))
    reward = Downsampling(factor=8)

    def ask(at: Tensor) -> Any:
        return (yield DecodeGradient(at, lambda pixels: reward.value_and_grad(pixels, given)))

    middle, up, down = (engine.run_one(ask(at)) for at in (latents, latents + towards, latents - towards))
    assert up.value - down.value == pytest.approx(2 * float((middle.gradient * towards).sum()), rel=1e-4)
    assert not any(one.requires_grad for one in backbone.autoencoder.vae.parameters())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random networks in the form that published ones are to be brought into."""
    made = {}
    torch.manual_seed(0)
    for kind in OWN:
        made[kind] = tmp_path_factory.mktemp(kind)
        state = OWN[kind]().state_dict()
        # The weights of a distance are at least 0.
        state = {name: one.abs() if name.startswith("lin") else one for name, one in state.items()}
        save_file(state, made[kind] / "model.safetensors")
    made["clip"] = tmp_path_factory.mktemp("clip")
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=tiny, text_config={**tiny, "vocab_size": 9}, projection_dim=8)
    CLIPModel(config).save_pretrained(made["clip"])
    return made


@pytest.mark.parametrize(
    "reward",
    [FaceIdentity(reference="face"), Likeness(), ClipGram(reference="style")],
    ids=lambda one: one.method,
)
def test_a_learned_reward_loads_its_network_and_is_least_at_what_it_wants(
    reward: Any, folders: dict[str, Path]
) -> None:
    assert not list(weights_problem(reward.learned, str(folders[reward.learned])))
    wanted = picture(11, 64).float()
    given = RewardSample(image=wanted, reference=wanted, network=network(reward.learned, str(folders[reward.learned])))
    here, there = (reward.value_and_grad(one, given) for one in (wanted + 1e-6, picture(12, 64).float()))
    assert float(here[0]) < 0.1 * float(there[0])
    assert there[1].shape == wanted.shape
    assert torch.isfinite(there[1]).all()
    assert there[1].abs().max() > 0
    # A step against the gradient lessens the loss.
    length = 0.05 * float(there[0]) / float(there[1].square().sum())
    stepped, _ = reward.value_and_grad(picture(12, 64).float() - length * there[1], given)
    assert float(stepped) < float(there[0])


def test_a_network_that_lacks_parameters_is_told_by_its_files_and_refused_at_load(tmp_path: Path) -> None:
    state = OWN["lpips"]().state_dict()
    state.pop("lin3.model.1.weight")
    save_file(state, tmp_path / "model.safetensors")
    (problem,) = weights_problem("lpips", str(tmp_path))
    assert "lacks lin3.model.1.weight. It should hold torchvision's VGG-16" in problem
    with pytest.raises(ModelError, match=r"lacks lin3\.model\.1\.weight"):
        network("lpips", str(tmp_path))(torch.device("cpu"))


@pytest.mark.timeout(30)  # a pipe that nobody writes to is waited for, for ever
def test_a_named_pipe_in_place_of_weights_or_of_a_picture_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    (problem,) = weights_problem("arcface", str(tmp_path))
    assert problem.startswith("weights.arcface: ")
    assert "model.safetensors, which is a named pipe" in problem
    with pytest.raises(ModelError, match="which is a named pipe"):
        network("lpips", str(tmp_path))(torch.device("cpu"))
    with pytest.raises(ModelError, match="does not open"):
        reference(str(tmp_path / "model.safetensors"))


def test_a_reward_without_what_it_reads_says_so() -> None:
    with pytest.raises(PrepareError, match="no network"):
        Likeness().value_and_grad(picture(1), sample())
    with pytest.raises(PrepareError, match="none was brought"):
        RandomGram(reference="style").value_and_grad(picture(1), sample())
