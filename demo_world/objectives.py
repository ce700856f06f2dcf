"""What a UNet of the drawn world is trained to predict: the noise in its latents, or rectified flow's velocity."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from pipeline.models.demo.networks import build_flow_scheduler, build_scheduler

SNR_CEILING = 5.0  # Min-SNR weighting (Hang et al., arXiv 2303.09556)
# At the noisiest steps an error in the image hardly moves the noise: unweighted, a model goes on reading the colour of
# large areas from what is left in the mean of the latents, and paints a quarter of the backgrounds against the prompt
# (16 of 64). After 600 more steps with a floor of 0.03 and a learning rate of 4e-4 it was 3 of 64; with a floor of 0.1
# and 1e-3 the loss grew.
SNR_FLOOR = 0.03
TOLD = 1000.0  # what the network is told of pure noise under the flow objective


class Task(NamedTuple):
    """What a UNet shall predict of one batch."""

    latents: Float[Tensor, "B 4 h w"]  # noised
    timesteps: Tensor  # (B,), what it is told
    target: Float[Tensor, "B 4 h w"]
    weights: Float[Tensor, "B"]  # of each row's mean squared error


class Objective(ABC):
    """How latents are noised, and what a network shall say of them."""

    about: ClassVar[str]
    """In the model's card."""

    @abstractmethod
    def task(self, latents: Float[Tensor, "B 4 h w"], noise: Float[Tensor, "B 4 h w"]) -> Task:
        """Clean latents and noise, mixed at levels that are drawn anew."""

    @abstractmethod
    def scheduler(self) -> Any:
        """diffusers' scheduler, which says in a checkpoint what its network was trained for."""

    @abstractmethod
    def told_for(self, shares: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """What a network is told where noise has this share of the amplitudes, 0..1."""


class Noise(Objective):
    """Predict the noise of a variance-preserving mixture, at all timesteps alike."""

    about = "noise with Min-SNR weights"

    def __init__(self) -> None:
        self.alpha_bars: Tensor = build_scheduler().alphas_cumprod

    @override
    def task(self, latents: Float[Tensor, "B 4 h w"], noise: Float[Tensor, "B 4 h w"]) -> Task:
        alpha_bars = self.alpha_bars.to(latents.device)
        timesteps = torch.randint(len(alpha_bars), (len(latents),), device=latents.device)
        alpha_bar = alpha_bars[timesteps]
        snr = alpha_bar / (1 - alpha_bar)
        signal, share = (one.sqrt()[:, None, None, None] for one in (alpha_bar, 1 - alpha_bar))
        noised = signal * latents + share * noise
        return Task(noised, timesteps, noise, snr.clamp(SNR_FLOOR, SNR_CEILING) / snr)

    @override
    def scheduler(self) -> Any:
        return build_scheduler()

    @override
    def told_for(self, shares: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        noise, signal = (1 - self.alpha_bars).sqrt(), self.alpha_bars.sqrt()
        known = noise / (noise + signal)  # ascending with the timestep
        above = torch.searchsorted(known, shares).clamp(1, len(known) - 1)
        part = (shares - known[above - 1]) / (known[above] - known[above - 1])
        return above - 1 + part.clamp(0, 1)


class Flow(Objective):
    """Predict noise minus data of a straight mixture (rectified flow, arXiv 2209.03003).

    An error in the data weighs 1 / share^2, so that noisy levels need no weights of their own. Shares of noise are
    logit-normal (arXiv 2403.03206, section 3.1): the middle is hardest. They are drawn from the batch's strata, one
    from each, which leaves their distribution as it is, and spares the gradient a part of its noise.
    """

    about = "velocity at logit-normal levels"
    spread: ClassVar[float] = 1.4  # of the logits; with the usual 1 the ends, where edits begin and end, are rare

    @override
    def task(self, latents: Float[Tensor, "B 4 h w"], noise: Float[Tensor, "B 4 h w"]) -> Task:
        count = len(latents)
        uniform = (torch.randperm(count) + torch.rand(count)) / count
        shares = torch.sigmoid(self.spread * torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4))).to(latents.device)
        share = shares[:, None, None, None]
        noised = (1 - share) * latents + share * noise
        return Task(noised, shares * TOLD, noise - latents, torch.ones_like(shares))

    @override
    def scheduler(self) -> Any:
        return build_flow_scheduler()

    @override
    def told_for(self, shares: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        return shares * TOLD


OBJECTIVES: dict[str, type[Objective]] = {"noise": Noise, "flow": Flow}


def objective_of(pipeline: Any) -> Objective:
    """What the UNet of a demo model was trained to predict, by its scheduler."""
    return Flow() if type(pipeline.scheduler) is type(build_flow_scheduler()) else Noise()


def retell(unet: Any, before: Objective, now: Objective, steps: int = 1500, batch: int = 256) -> float:
    """Let a UNet that knows its noise levels by one objective's times know them by another's.

    Its time embedding alone is fitted, a small network of two layers, to embed the new times as it did the old ones of
    the same shares of noise. Training that goes on from there need not learn anew what each time stands for.

    Returns:
        What is left of the embedding's variance over levels, 0..1.
    """
    embed = unet.time_embedding
    was = copy.deepcopy(embed).requires_grad_(False)

    def embedded(network: torch.nn.Module, told: Tensor) -> Tensor:
        return network(unet.time_proj(told).to(told.dtype))

    optimizer = torch.optim.Adam(embed.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        shares = torch.rand(batch)
        loss = (embedded(embed, now.told_for(shares)) - embedded(was, before.told_for(shares))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        shares = torch.linspace(0, 1, 512)
        target = embedded(was, before.told_for(shares))
        left = (embedded(embed, now.told_for(shares)) - target).square().mean() / target.var(dim=0).mean()
    return float(left)
