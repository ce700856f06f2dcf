"""Negative-prompt Inversion (Miyake et al., arXiv 2305.16807): the source prompt takes the empty prompt's place.

With the source prompt as the unconditional one guidance cancels in the source branch, so that guided sampling returns
what unguided sampling does: the closed-form limit of null-text optimisation, without the optimisation. Targets are
guided away from the source prompt.

Cost: that of `ddim`. Reconstruction: approximate, as unguided DDIM. Memory: N + 1 latents and one embedding per image.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.engine.calls import EncodeText, Steps
from pipeline.inversion.ddim import DDIMInversion
from pipeline.records import Source, Trajectory


class NegativePromptInversion(DDIMInversion):
    """DDIM inversion, and the source prompt's embedding as the unconditional one."""

    exact: ClassVar = "approximately, at any guidance"
    paper: ClassVar = "Negative-prompt Inversion, arXiv 2305.16807; interpolation: ProxEdit, arXiv 2306.05414"

    method: Literal["negative_prompt"] = "negative_prompt"  # type: ignore[assignment]  # tag of the union
    """Negative-prompt inversion: DDIM inversion, with the source prompt's embedding as the unconditional one."""
    npi_interp: float = Field(default=0.0, ge=0, le=1)
    """Where the unconditional embedding stands between two; 0: the source prompt's, 1: the empty prompt's."""
    pin_source: bool = False
    """Also keep the source branch on its trajectory, as `direct` does; not in the paper."""

    @property
    @override
    def brings_uncond(self) -> bool:
        return True

    @override
    def invert(self, source: Source) -> Steps[Trajectory]:
        trajectory = yield from super().invert(source)
        cond, empty = yield EncodeText((source.prompt, ""))
        uncond = cond.embedding if self.npi_interp == 0 else slerp(cond.embedding, empty.embedding, self.npi_interp)
        return dataclasses.replace(trajectory, uncond=uncond, pinned=self.pin_source)


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two tensors, each taken as one vector; linear where they have (nearly) no angle."""
    flat_start, flat_end = start.flatten().double(), end.flatten().double()
    cosine = (flat_start @ flat_end / (flat_start.norm() * flat_end.norm())).clamp(-1.0, 1.0)
    angle = torch.acos(cosine)
    if not torch.sin(angle).abs() >= 1e-6:  # nan where one of them is zero, as the closed-form model's empty prompt
        return start + share * (end - start)
    mixed = (torch.sin((1 - share) * angle) * flat_start + torch.sin(share * angle) * flat_end) / torch.sin(angle)
    return mixed.to(start).reshape(start.shape)
