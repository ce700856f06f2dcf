"""Negative-prompt Inversion (Miyake et al., arXiv 2305.16807): the source prompt takes the empty prompt's place.

With the source prompt as the unconditional one guidance cancels in the source branch, so that guided sampling returns
what unguided sampling does: the closed-form limit of null-text optimisation, without the optimisation. Targets are
guided away from the source prompt.

Cost: that of `ddim`. Reconstruction: approximate, as unguided DDIM. Memory: 2 N + 1 latents and one embedding per
image.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.engine.calls import Conditioning, EncodeText, Steps
from pipeline.inversion.ddim import DDIMInversion
from pipeline.records import Source, Trajectory, UncondScope


class NegativePromptInversion(DDIMInversion):
    """DDIM inversion, and the source prompt's embedding as the unconditional one."""

    provides: ClassVar = frozenset({"DDIM steps", "path", "faithful source"})
    demands: ClassVar = frozenset({"unconditional prompt"})
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
    def uncond_for(self) -> UncondScope:
        return "all"

    @override
    def invert(self, source: Source) -> Steps[Trajectory]:
        trajectory = yield from super().invert(source)
        cond, empty = yield EncodeText((source.prompt, ""))
        uncond = cond if self.npi_interp == 0 else between(cond, empty, self.npi_interp)
        return dataclasses.replace(trajectory, uncond=(uncond,) * trajectory.num_steps, pinned=self.pin_source)


def between(start: Conditioning, end: Conditioning, share: float) -> Conditioning:
    """What the network is told on the way from one prompt to another, each part for itself."""
    return start.replacing(**{name: slerp(part, end.parts[name], share) for name, part in start.parts.items()})


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two tensors, each taken as one vector; linear where they have (nearly) no angle."""
    flat_start, flat_end = start.flatten().double(), end.flatten().double()
    cosine = (flat_start @ flat_end / (flat_start.norm() * flat_end.norm())).clamp(-1.0, 1.0)
    angle = torch.acos(cosine)
    if not torch.sin(angle).abs() >= 1e-6:  # nan where one of them is zero, as the closed-form model's empty prompt
        return start + share * (end - start)
    mixed = (torch.sin((1 - share) * angle) * flat_start + torch.sin(share * angle) * flat_end) / torch.sin(angle)
    return mixed.to(start).reshape(start.shape)
