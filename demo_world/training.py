"""What every stage of the demo model's training shares: presets, planned time, learning rate, checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pipeline.models.demo.networks import Sizes

LOG_SECONDS, SAVE_SECONDS = 30, 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Sizes and lengths of one training, for one kind of machine."""

    minutes: float  # of the whole training
    vae_share: float  # of the minutes, for the autoencoder
    decoder_share: float  # of the minutes, for its decoder alone
    vae_batch: int
    vae_learning_rate: float
    pool: int  # scenes drawn and encoded once, from which the UNet learns
    batch: int
    learning_rate: float
    ema_decay: float
    sizes: Sizes


PRESETS = {
    "cpu": Preset(
        minutes=95,
        vae_share=0.2,
        decoder_share=0.1,
        vae_batch=8,
        vae_learning_rate=2e-3,
        pool=14_000,
        batch=32,
        learning_rate=1e-3,
        ema_decay=0.998,
        sizes=Sizes(),
    ),
    "onward": Preset(  # for --start-from: few steps of a model that is nearly there
        minutes=60,
        vae_share=0.0,
        decoder_share=0.0,
        vae_batch=8,
        vae_learning_rate=0.0,
        pool=1200,
        batch=16,
        learning_rate=5e-4,
        ema_decay=0.98,
        sizes=Sizes(),
    ),
    "gpu": Preset(
        minutes=45,
        vae_share=0.15,
        decoder_share=0.1,
        vae_batch=64,
        vae_learning_rate=1e-3,
        pool=200_000,
        batch=512,
        learning_rate=8e-4,
        ema_decay=0.9995,
        sizes=Sizes(vae_channels=(32, 64, 128), unet_channels=(64, 128, 192), unet_layers=2, unet_heads=4),
    ),
}


class Clock:
    """Counts the steps and the seconds of one stage over all its runs, against the seconds planned for it."""

    def __init__(self, planned_seconds: float) -> None:
        self.planned_seconds = planned_seconds
        self.steps = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._last: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Used so far, in this run and in those before it."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """Share of the planned time that is used, 0..1."""
        return min(self.seconds / self.planned_seconds, 1.0)

    def due(self, name: str, every_seconds: float) -> bool:
        """Whether it is time again for what is to be done every so many seconds."""
        if self.seconds - self._last.setdefault(name, self.seconds) < every_seconds:
            return False
        self._last[name] = self.seconds
        return True

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"steps": self.steps, "seconds": self.seconds}

    def resume(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.steps, self._seconds_before = int(state["steps"]), state["seconds"]

    def __str__(self) -> str:
        return f"step {self.steps} minute {self.seconds / 60:.1f} of {self.planned_seconds / 60:.1f}"


class RunningMeans:
    """Means of named figures since they were last taken."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, **values: float) -> None:
        """Count one more value of each figure."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def take(self) -> str:
        """The means as text, and a new beginning."""
        text = " ".join(f"{name} {sum(values) / len(values):.4f}" for name, values in self._values.items())
        self._values = {}
        return text


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, clock: Clock) -> None:
    """A warm-up of 100 steps, then a cosine over the planned time down to a fiftieth of the peak."""
    annealed = 0.02 + 0.98 * (1 + math.cos(math.pi * clock.progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = peak * annealed * min(1.0, (clock.steps + 1) / 100)


def descend(loss: Tensor, network: torch.nn.Module, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    """One step of training, gradients clipped to a norm of 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    clock.steps += 1


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 for convolutions and matrix products; float32 weights and sums."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def write_checkpoint(path: Path, **state: object) -> None:
    """Write beside, then replace: a kill leaves the old checkpoint or the new one."""
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    beside.replace(path)


def to_model_range(pixels: UInt8[np.ndarray, "B H W 3"], device: torch.device) -> Float[Tensor, "B 3 H W"]:
    """uint8 0..255 to float -1..1, channels first."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(error: Tensor) -> float:
    """In dB, of an error in images that span -1..1."""
    return -10 * math.log10(error.square().mean().item() / 4)
