"""What a UNet is trained to predict: mixtures and targets, what it is told, and a change of what it is told."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from demo_world.objectives import OBJECTIVES, Flow, Noise, objective_of, retell
from pipeline.models.demo.networks import build_flow_scheduler, build_scheduler, load_pipeline
from pipeline.models.loading import DEMO_FOLDER

LATENTS, NOISE = torch.randn((2, 64, 4, 8, 8), generator=torch.Generator().manual_seed(0))


def test_flow_mixes_on_a_straight_line_and_its_target_leads_back() -> None:
    torch.manual_seed(0)
    task = Flow().task(LATENTS, NOISE)
    shares = (task.timesteps / 1000)[:, None, None, None]
    torch.testing.assert_close(task.latents - shares * task.target, LATENTS, atol=1e-5, rtol=0)
    torch.testing.assert_close(task.latents + (1 - shares) * task.target, NOISE, atol=1e-5, rtol=0)
    assert torch.equal(task.weights, torch.ones(64))


def test_a_batch_of_flow_has_a_level_in_every_stratum() -> None:
    torch.manual_seed(1)
    logits = torch.logit(Flow().task(LATENTS, NOISE).timesteps / 1000) / Flow.spread
    strata = (torch.special.ndtr(logits) * 64).floor().sort().values
    assert torch.equal(strata, torch.arange(64.0))


def test_the_noise_objective_mixes_to_unit_power_and_weighs_noisy_steps_up() -> None:
    torch.manual_seed(2)
    task = Noise().task(LATENTS, NOISE)
    alpha_bar = Noise().alpha_bars[task.timesteps][:, None, None, None]
    torch.testing.assert_close(task.latents, alpha_bar.sqrt() * LATENTS + (1 - alpha_bar).sqrt() * NOISE)
    assert torch.equal(task.target, NOISE)
    noisiest, cleanest = task.timesteps.argmax(), task.timesteps.argmin()
    assert task.weights[noisiest] > 1.0 > task.weights[cleanest]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_told_of_a_share_of_noise_is_its_level(name: str) -> None:
    objective = OBJECTIVES[name]()
    timesteps = torch.tensor([50, 300, 700])
    if name == "noise":
        amplitudes = Noise().alpha_bars[timesteps]
        shares = (1 - amplitudes).sqrt() / (amplitudes.sqrt() + (1 - amplitudes).sqrt())
    else:
        shares = timesteps / 1000
    torch.testing.assert_close(objective.told_for(shares), timesteps.float(), atol=1e-2, rtol=0)
    ends = objective.told_for(torch.tensor([0.0, 1.0]))
    assert 0 <= ends[0] < ends[1] <= 1000


def test_a_scheduler_tells_what_a_network_was_trained_for() -> None:
    assert isinstance(objective_of(SimpleNamespace(scheduler=build_flow_scheduler())), Flow)
    assert isinstance(objective_of(SimpleNamespace(scheduler=build_scheduler())), Noise)


def test_a_network_that_is_told_otherwise_knows_its_levels() -> None:
    torch.manual_seed(3)
    unet = load_pipeline(DEMO_FOLDER).unet
    before = copy.deepcopy(unet)
    left = retell(unet, Noise(), Flow(), steps=300, batch=64)
    assert left < 0.2
    shares = torch.tensor([0.2, 0.5, 0.8])
    now, then = (
        one.time_embedding(one.time_proj(objective.told_for(shares)))
        for one, objective in ((unet, Flow()), (before, Noise()))
    )
    untold = before.time_embedding(before.time_proj(Flow().told_for(shares)))
    assert (now - then).norm() < (untold - then).norm() / 2
    changed = {
        name.split(".")[0] for name, one in unet.state_dict().items() if not one.equal(before.state_dict()[name])
    }
    assert changed == {"time_embedding"}
