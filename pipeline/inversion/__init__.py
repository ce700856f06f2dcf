"""The inversions by name. A new one is its file, its line here, its test and its page in docs/methods."""

from __future__ import annotations

from pipeline.inversion.base import Inversion
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.inversion.noise import NoiseStart

INVERSIONS: dict[str, type[Inversion]] = {
    "ddim": DDIMInversion,
    "ddpm": DDPMInversion,
    "noise": NoiseStart,
}
