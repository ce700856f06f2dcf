"""The inversions by name. A new one is its file, its line here, its test and its page in docs/methods."""

from __future__ import annotations

from pipeline.inversion.base import Inversion
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.inversion.dna import DNAInversion
from pipeline.inversion.negative_prompt import NegativePromptInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.inversion.null_text import NullTextInversion
from pipeline.inversion.uni_inv import UniInv

INVERSIONS: dict[str, type[Inversion]] = {
    "ddim": DDIMInversion,
    "ddpm": DDPMInversion,
    "direct": DirectInversion,
    "dna": DNAInversion,
    "negative_prompt": NegativePromptInversion,
    "noise": NoiseStart,
    "null_text": NullTextInversion,
    "uni_inv": UniInv,
}
